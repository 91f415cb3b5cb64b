"""The cache of the compiled program, the choice of the engine, and machines without a compiler."""

import errno
import multiprocessing
import os
import re
import stat
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compilers import needs_compiler
from processes import forked, run_code
from transformers import GenerationMixin

from vanilla_transformer import engine_choice
from vanilla_transformer import engine_program as program


LENGTHS = (7, 4, 1, 6)


@pytest.fixture
def source(padded):
    return dict(zip(("input_ids", "attention_mask"), padded(LENGTHS), strict=True))


@pytest.fixture(autouse=True)
def cache(program_cache):
    """For every test of this file."""
    return program_cache


@pytest.fixture
def quick_compiler(monkeypatch):
    """Compiles without optimisation: these tests compile often, and speed does not matter here."""
    monkeypatch.setattr(program, "FLAGS", [flag for flag in program.FLAGS if flag != "-O3"])


@pytest.fixture
def expected(lively_model, source):
    return GenerationMixin.generate(lively_model(), **source, max_new_tokens=8)


def assert_decodes_without_it(model, source, expected, reason: str) -> None:
    """By default the output is the same, and `last_engine` gives the reason; `compiled=True` raises it."""
    assert torch.equal(model.generate(**source, max_new_tokens=8), expected)
    assert model.last_engine.name == "packed"
    assert reason in model.last_engine.reason
    with pytest.raises(program.ProgramError, match=re.escape(reason)):
        model.generate(**source, max_new_tokens=8, compiled=True)


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
class TestFile:
    def test_it_is_compiled_once(self, lively_model, source, monkeypatch, cache, expected):
        assert torch.equal(lively_model().generate(**source, max_new_tokens=8), expected)
        monkeypatch.setattr(program.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
        program.forget()
        model = lively_model()
        assert torch.equal(model.generate(**source, max_new_tokens=8), expected)
        assert model.last_engine == ("compiled", "")
        assert [path.suffix for path in cache.iterdir()] == [".so"]
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700

    @pytest.fixture
    def file(self, cache):
        """A file that stands where the program is looked for, by the name that it should have."""
        cache.mkdir(parents=True)
        content = b"no program"
        file = cache / f"{program._Program().key}-{program._digest(content)}.so"
        file.write_bytes(content)
        return file

    def test_a_file_that_others_could_have_written_is_refused(self, lively_model, source, file, expected):
        file.chmod(0o775)
        assert_decodes_without_it(lively_model(), source, expected, "somebody else could have written it")

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
    def test_a_file_of_another_user_is_refused(self, lively_model, source, file, expected):
        os.chown(file, 12345, 12345)
        assert_decodes_without_it(lively_model(), source, expected, "belongs to user 12345")

    def test_a_folder_of_another_user_is_refused(self, lively_model, source, monkeypatch, file, expected):
        monkeypatch.setattr(program.os, "getuid", lambda: 12345)
        assert_decodes_without_it(lively_model(), source, expected, f"{file.parent} belongs to user")

    def test_beside_a_program_that_this_machine_cannot_load_it_is_compiled(
        self, lively_model, source, monkeypatch, cache, file, expected
    ):
        """With a shared home folder it may come from another machine, with newer libraries."""
        for _ in range(2):
            model = lively_model()
            assert torch.equal(model.generate(**source, max_new_tokens=8), expected)
            assert model.last_engine == ("compiled", "")
            assert file.exists()
            assert len(list(cache.iterdir())) == 2
            monkeypatch.setattr(program.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
            program.forget()

    def test_another_layout_is_refused(self, lively_model, source, monkeypatch, expected):
        fields = [(name, kind) for name, kind in program.Job._fields_ if name != "beams"]
        shorter = type("Structure", (program.ctypes.Structure,), {"_fields_": fields})
        monkeypatch.setattr(program, "Job", shorter)
        assert_decodes_without_it(lively_model(), source, expected, "lays out its data")

    def test_without_a_home_there_is_no_cache_folder(self, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(program.Path, "expanduser", _no_home)
        assert program._cache_folder() is None


def _no_home(_):
    raise RuntimeError("Could not determine home directory.")


# In a separate process, because a damaged program would end it. Each is a file that was never loaded.
DAMAGED = """
import random, sys
from pathlib import Path
from vanilla_transformer import engine_program as program

program.load()
(file,) = Path(sys.argv[1]).iterdir()
whole = file.read_bytes()
damages = {
    "empty": b"",
    "cut off": whole[: len(whole) // 2],
    "cut off at its end": whole[:-100],
    "zeros, as a crash leaves it": bytes(len(whole)),
    "zeros at its end": whole[:-4096] + bytes(4096),
    "garbage": random.Random(0).randbytes(len(whole)),
}
for name, damaged in damages.items():
    print(name, flush=True)
    file.unlink()
    file.write_bytes(damaged)
    program.forget()
    program.load()
    assert [each.read_bytes() for each in file.parent.iterdir()] == [whole]
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """The program, compiled once for all tests that need no more than that."""
    file = tmp_path_factory.mktemp("built") / "program.so"
    command = [*program._compiler(), *program.FLAGS, "-O0", *program.compiler_flags(), "-shared", str(program.SOURCE)]
    subprocess.run([*command, "-o", str(file)], check=True)
    return file


@pytest.fixture
def ready_compiler(monkeypatch, tmp_path, built) -> None:
    """A compiler that has it at hand."""
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\nfor last; do :; done\ncp {built} "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


def decodes(model, source, expected) -> None:
    """By the compiled program."""
    assert torch.equal(model.generate(**source, max_new_tokens=8), expected)
    assert model.last_engine == ("compiled", "")


@needs_compiler
@pytest.mark.usefixtures("ready_compiler")
class TestDamage:
    """A program that a crash or a full disk has left, and folders that a program cannot be kept in."""

    def test_a_damaged_file_is_found_and_compiled_anew(self, cache):
        done = run_code(DAMAGED, cache)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("\n") == 6

    def test_processes_may_compile_at_once(self, cache):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: forked(program.load, check=True), range(3)))
        assert [path.suffix for path in cache.iterdir()] == [".so"]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
    def test_a_fork_while_a_thread_compiles_compiles_for_itself(self, cache, tmp_path):
        """A fork has neither the thread nor the holder of the lock."""
        wait, script = tmp_path / "wait", Path(os.environ["CXX"])
        wait.touch()
        script.write_text(script.read_text().replace("for last", f"while [ -e {wait} ]; do sleep 0.02; done\nfor last"))
        assert program.load_soon() is None
        process = multiprocessing.get_context("fork").Process(target=program.load, daemon=True)
        with program._lock:
            process.start()
        wait.unlink()
        process.join(timeout=60)
        assert process.exitcode == 0, "it hangs"
        program.load()

    def test_a_read_only_folder_gives_its_program(self, lively_model, source, monkeypatch, cache, expected):
        decodes(lively_model(), source, expected)

        def read_only(*_, **__):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        for name in ("mkdir", "chmod", "unlink"):
            monkeypatch.setattr(Path, name, read_only)
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        monkeypatch.setattr(program.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
        program.forget()
        decodes(lively_model(), source, expected)

    def test_without_a_folder_that_can_be_written_it_is_compiled_for_the_process(
        self, lively_model, source, monkeypatch, expected
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")  # where nobody can make a folder, root included
        decodes(lively_model(), source, expected)

    def test_a_read_only_folder_without_it_is_left_alone(self, lively_model, source, monkeypatch, cache, expected):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        decodes(lively_model(), source, expected)
        assert not list(cache.iterdir())

    def test_a_folder_mounted_noexec_is_left_alone(self, lively_model, source, monkeypatch, cache, expected):
        monkeypatch.setattr(program, "_is_noexec", lambda path: cache == path)
        decodes(lively_model(), source, expected)
        assert not list(cache.iterdir())

    def test_where_every_folder_is_mounted_noexec_it_is_told(self, lively_model, source, monkeypatch, expected):
        def refused(path):
            raise OSError(f"{path}: failed to map segment from shared object")

        monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
        monkeypatch.setattr(program.ctypes, "PyDLL", refused)
        told = "on a file system mounted noexec, set TMPDIR to another"
        assert_decodes_without_it(lively_model(), source, expected, told)

    def test_a_full_disk_is_told(self, lively_model, source, monkeypatch, expected):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/compiling-1")

        monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
        told = "the compiled program cannot be written: [Errno 28] No space left on device: '/cache/compiling-1'"
        assert_decodes_without_it(lively_model(), source, expected, told)

    def test_after_an_interrupt_the_next_call_looks_anew(self, lively_model, source, monkeypatch, expected):
        cached = program._Program.cached

        def interrupted(self):
            monkeypatch.setattr(program._Program, "cached", cached)
            raise KeyboardInterrupt

        monkeypatch.setattr(program._Program, "cached", interrupted)
        with suppress(KeyboardInterrupt):
            lively_model().generate(**source, max_new_tokens=8)
        decodes(lively_model(), source, expected)


# Compilers that fail, as shell scripts, and the reason that must be reported.
FAILURES = {
    "kill -9 $$": "was killed by SIGKILL: is there enough memory?",
    "echo 'g++: fatal error: Killed signal terminated program cc1plus' >&2; exit 1": (
        "crashed: g++: fatal error: Killed signal terminated program cc1plus: is there enough memory?"
    ),
    "echo 'collect2: fatal error: ld terminated with signal 9 [Killed]' >&2; exit 1": (
        "crashed: collect2: fatal error: ld terminated with signal 9 [Killed]: is there enough memory?"
    ),
    "echo '/tmp/cc1.s: fatal error: /tmp/cc1.o: No space left on device' >&2; exit 1": (
        "failed because the disk is full: /tmp/cc1.s: fatal error: /tmp/cc1.o: No space left on device"
    ),
    "echo 'error: unterminated argument list' >&2; exit 1": (
        "failed with exit status 1; set CXX to one that supports C++20\nerror: unterminated argument list"
    ),
    "exit 0": "the compiled program cannot be written: [Errno 2] No such file or directory",
    'for last; do :; done; echo nonsense > "$last"': "the compiled program cannot be loaded: ",
}


class TestMissing:
    @pytest.mark.parametrize(("script", "told"), FAILURES.items(), ids=range(len(FAILURES)))
    def test_why_a_compiler_fails(self, lively_model, source, monkeypatch, tmp_path, cache, expected, script, told):
        compiler = tmp_path / "compiler"
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        assert_decodes_without_it(lively_model(), source, expected, told)
        assert not list(cache.iterdir())

    @pytest.mark.parametrize(
        ("compiler", "told"), [("/no/such/compiler", "cannot be run"), ("false", "false failed with exit status 1")]
    )
    def test_a_compiler_that_cannot_compile(self, lively_model, source, monkeypatch, cache, expected, compiler, told):
        monkeypatch.setenv("CXX", compiler)
        assert_decodes_without_it(lively_model(), source, expected, told)
        assert not list(cache.iterdir())

    def test_no_compiler(self, lively_model, source, monkeypatch, expected):
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(program.shutil, "which", lambda _: None)
        assert_decodes_without_it(lively_model(), source, expected, "there is no C++ compiler")

    def test_no_source(self, lively_model, source, monkeypatch, tmp_path, expected):
        monkeypatch.setattr(program, "SOURCE", tmp_path / "missing.cpp")
        assert_decodes_without_it(lively_model(), source, expected, "the source is missing")

    def test_it_is_told_once(self, lively_model, source, monkeypatch, caplog):
        monkeypatch.setenv("CXX", "/no/such/compiler/at/all")
        monkeypatch.setattr(engine_choice.logger, "propagate", True)
        model = lively_model()
        for _ in range(3):
            model.generate(**source, max_new_tokens=4)
        told = [record for record in caplog.records if "without its compiled program" in record.message]
        assert len(told) <= 1


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
class TestWaiting:
    def test_a_first_request_does_not_wait_for_the_compiler(self, lively_model, source, monkeypatch, expected):
        monkeypatch.setattr(engine_choice, "load_soon", program.load_soon)
        may_compile, compile_it = threading.Event(), program._Program.compiled

        def compile_later(self):
            may_compile.wait(timeout=60)
            return compile_it(self)

        monkeypatch.setattr(program._Program, "compiled", compile_later)
        model = lively_model()
        assert torch.equal(model.generate(**source, max_new_tokens=8), expected)
        assert model.last_engine == ("packed", "the program is being compiled")
        may_compile.set()
        program.load()
        assert torch.equal(model.generate(**source, max_new_tokens=8), expected)
        assert model.last_engine == ("compiled", "")

    def test_nothing_is_compiled_where_nothing_is_decoded(self, tiny_model, padded, cache):
        tokens, mask = padded()
        tiny_model().train()(tokens, mask, labels=tokens).loss.backward()
        assert not cache.exists()


@needs_compiler
def test_the_source_gives_no_warnings():
    strict = ["-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command = ["g++", *program.FLAGS, *program.compiler_flags(), *strict, str(program.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

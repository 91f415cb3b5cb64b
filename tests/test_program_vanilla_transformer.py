"""Where the compiled program comes from, which engine decodes and why, and what a machine may lack."""

import os
import re
import stat
import subprocess
import sys
import threading

import pytest
import torch
from compilers import needs_compiler
from transformers import GenerationMixin

from vanilla_transformer import generation_vanilla_transformer as generation
from vanilla_transformer import program_vanilla_transformer as program


LENGTHS = (7, 4, 1, 6)


@pytest.fixture
def source(padded):
    return dict(zip(("input_ids", "attention_mask"), padded(LENGTHS), strict=True))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache folder, and nothing loaded in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program.forget()
    yield tmp_path / "cache" / "vanilla_transformer"
    program.forget()


@pytest.fixture
def quick_compiler(monkeypatch):
    """Without optimisation: what is compiled does not matter here, and most of these tests compile."""
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

    def test_processes_may_compile_at_once(self, cache):
        code = "from vanilla_transformer.program_vanilla_transformer import load; load()"
        several = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
        assert [process.wait(timeout=300) for process in several] == [0, 0, 0]
        assert [path.suffix for path in cache.iterdir()] == [".so"]

    @pytest.fixture
    def file(self, cache):
        """A file that stands where the program is looked for."""
        cache.mkdir(parents=True)
        file = cache / program._Program().name
        file.write_bytes(b"no program")
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

    def test_a_file_that_is_no_program_is_refused(self, lively_model, source, file, expected):
        assert_decodes_without_it(lively_model(), source, expected, "cannot be loaded")

    def test_another_layout_is_refused(self, lively_model, source, monkeypatch, expected):
        fields = [(name, kind) for name, kind in program.Job._fields_ if name != "beams"]
        shorter = type("Structure", (program.ctypes.Structure,), {"_fields_": fields})
        monkeypatch.setattr(program, "Job", shorter)
        assert_decodes_without_it(lively_model(), source, expected, "lays out its data")

    def test_without_a_folder_that_can_be_written_it_is_compiled_for_the_process(
        self, lively_model, source, monkeypatch, expected
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")  # where nobody can make a folder, root included
        model = lively_model()
        assert torch.equal(model.generate(**source, max_new_tokens=8), expected)
        assert model.last_engine.name == "compiled"

    def test_without_a_home_there_is_no_cache_folder(self, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(program.Path, "expanduser", _no_home)
        assert program._cache_folder() is None


def _no_home(_):
    raise RuntimeError("Could not determine home directory.")


class TestMissing:
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
        monkeypatch.setattr(generation.logger, "propagate", True)
        model = lively_model()
        for _ in range(3):
            model.generate(**source, max_new_tokens=4)
        told = [record for record in caplog.records if "without its compiled program" in record.message]
        assert len(told) <= 1


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
class TestWaiting:
    def test_a_first_request_does_not_wait_for_the_compiler(self, lively_model, source, monkeypatch, expected):
        monkeypatch.setattr(generation, "load_soon", program.load_soon)
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


# What decodes, by default and with `compiled=False`; the reasons are in plain words.
CHOICES = {
    "default": ({}, "compiled", ""),
    "greedy": ({"num_beams": 1}, "compiled", ""),
    "told not to": ({"compiled": False}, "packed", "compiled=False"),
    "sampling": ({"do_sample": True, "num_beams": 1}, "packed", "it does not know sampling"),
    "bfloat16": ({"compute_type": "bfloat16"}, "packed", "it computes in float32 or int8, not in bfloat16"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "transformers", "output_attentions"),
}


@needs_compiler
@pytest.mark.parametrize(("options", "name", "reason"), CHOICES.values(), ids=CHOICES.keys())
def test_which_engine_decodes_and_why(lively_model, source, monkeypatch, options, name, reason):
    monkeypatch.delenv("XDG_CACHE_HOME")
    model = lively_model(attention="eager")
    model.generate(**source, **options, max_new_tokens=4)
    assert model.last_engine.name == name
    assert reason in model.last_engine.reason


@needs_compiler
def test_the_source_gives_no_warnings():
    strict = ["-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command = ["g++", *program.FLAGS, *program.compiler_flags(), *strict, str(program.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

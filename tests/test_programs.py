"""How programs end: closed streams, other encodings, readers that leave, Ctrl-C, and outputs that cannot be written."""

import errno
import os
import re
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from processes import WITHOUT_PACKAGE, run_code, run_command

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training import evaluate
from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.files import new_folder
from vanilla_transformer.training.program import EXTRAS, run_program
from vanilla_transformer_commands import average, convert, export, tokenizer, translate
from vanilla_transformer_commands.benchmark import command as benchmark


ROOT = Path(__file__).parents[1]
# One process has all imports. For each case a fork of it runs a program, and ends as Python does.
# Without torch, whose modules are most of what would end with each of them.
DRIVER = """
import os, sys, types
sys.modules["torch"] = types.SimpleNamespace(
    get_num_threads=lambda: 1,
    set_num_threads=lambda count: None,
    distributed=types.SimpleNamespace(is_available=lambda: False),
)
sys.modules["transformers.utils.logging"] = types.SimpleNamespace(disable_progress_bar=lambda: None)
from tqdm import tqdm
from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.program import EXTRAS, run_program

def unread(descriptor):
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, descriptor)

def closed(*names):
    for name in names:
        os.close(["stdin", "stdout", "stderr"].index(name))
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)

CASES = eval(sys.argv[1])
for number, (setup, body) in enumerate(CASES):
    if not (child := os.fork()):
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        exec(setup)
        run_program(lambda _: exec(body), [])
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Case(NamedTuple):
    """A case: the state of a program's streams, its task, and its end: status, output, errors."""

    setup: str
    body: str
    status: int
    output: bytes = b""
    errors: bytes = b""


JAPANESE = r"print('\u00fc \u65e5\u672c \ud83d', flush=True); print('then')"
CASES = {
    "Latin-1": Case("sys.stdout.reconfigure(encoding='latin-1')", JAPANESE, 0, b"\xfc \\u65e5\\u672c \\ud83d\nthen\n"),
    "ASCII": Case("sys.stdout.reconfigure(encoding='ascii')", JAPANESE, 0, b"\\xfc \\u65e5\\u672c \\ud83d\nthen\n"),
    "UTF-8": Case("sys.stdout.reconfigure(encoding='utf-8')", JAPANESE, 0, "ü 日本 \\ud83d\nthen\n".encode()),
    "a reader who has left": Case("unread(1)", "while True: print('a line')", 141),
    "a reader of bytes who has left": Case(
        "unread(1)", "while True: sys.stdout.buffer.write(b'a line'); sys.stdout.flush()", 141
    ),
    "a reader who has left before the end": Case("unread(1)", "print('a line')", 141),
    "a reader of errors who has left": Case("unread(2)", "while True: print('a line', file=sys.stderr)", 141),
    "Ctrl-C": Case("", "raise KeyboardInterrupt", 130, errors=b"\ninterrupted\n"),
    "closed input": Case("closed('stdin')", "assert sys.__stdin__ is None; print(repr(sys.stdin.read()))", 0, b"''\n"),
    "closed output": Case(
        "closed('stdout')",
        "assert sys.__stdout__ is None; sys.stdout.write('x'); print('x'); sys.stderr.write(str(os.dup(0) > 2))",
        0,
        errors=b"True",
    ),
    "closed errors": Case(
        "closed('stderr')",
        "print('x', file=sys.stderr); list(tqdm([1])); print('out'); raise UserError('wrong')",
        2,
        b"out\n",
    ),
    "all closed": Case("closed('stdin', 'stdout', 'stderr')", "tqdm.write('x'); raise SystemExit(7)", 7),
    "a full disk": Case(
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
        "print('x')",
        2,
        errors=b"error: the disk is full: [Errno 28] No space left on device\n",
    ),
    "a mistake": Case("", "print('out'); raise UserError('wrong')", 2, b"out\n", b"error: wrong\n"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, tuple[int, bytes, bytes]]:
    """Status, output and errors of each case."""
    folder = tmp_path_factory.mktemp("programs")
    cases = repr([case[:2] for case in CASES.values()])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    driver = [sys.executable, "-c", WITHOUT_PACKAGE + DRIVER, cases]
    run = subprocess.run(driver, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {
        name: (int(status), *((folder / f"{number}.{kind}").read_bytes() for kind in ("out", "err")))
        for number, (name, status) in enumerate(zip(CASES, run.stdout.split(), strict=True))
    }


@pytest.mark.parametrize("name", CASES)
def test_a_program_ends_as_a_shell_expects(name, ended):
    case = CASES[name]
    assert ended[name] == (case.status, case.output, case.errors)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG])
def test_what_the_file_system_refuses_is_one_line(number, capsys):
    def main(argv):
        raise OSError(number, os.strerror(number), "a/place")

    with pytest.raises(SystemExit) as refused:
        run_program(main, [])
    assert refused.value.code == 2
    assert capsys.readouterr().err == f"error: [Errno {number}] {os.strerror(number)}: 'a/place'\n"


def fails(argv):
    raise KeyError("beta1")


def test_a_pipe_that_is_not_a_standard_stream_is_a_fault_like_others(capsys):
    def main(argv):
        read, write = os.pipe()
        os.close(read)
        os.write(write, b"x")

    with pytest.raises(SystemExit) as ended:
        run_program(main, [])
    assert ended.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith("error: BrokenPipeError: ")
    Path(line.split()[-1].rstrip(")")).unlink()


def refuses(argv):
    raise UserError(argv)


def test_a_fault_of_the_program_is_one_line_and_its_traceback_is_kept(capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(fails, [])
    assert ended.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith("error: KeyError: 'beta1' (this is a bug; the traceback is in ")
    assert line.count("\n") == 1
    kept = Path(line.split()[-1].rstrip(")"))
    assert 'raise KeyError("beta1")' in kept.read_text()
    kept.unlink()


def test_verbose_shows_the_traceback_and_is_no_word_of_the_program():
    with pytest.raises(KeyError, match="beta1"):
        run_program(fails, ["--verbose"])
    with pytest.raises(UserError, match=r"\['a', 'b'\]"):
        run_program(refuses, ["a", "--verbose", "b"])


def test_bars_of_loading_and_saving_are_hidden_and_those_of_downloads_are_not(tiny_model, tmp_path):
    tokenizer = train_tokenizer(["some text"], 290)
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for words in (["info", "model"], ["export", "model", "--format", "marian", "--output", "new"]):
        assert run_command(*words, cwd=tmp_path, check=True).stderr == ""
    run_program(lambda argv: None, [])
    assert not are_progress_bars_disabled()


def imports(argv, name):
    raise ModuleNotFoundError(name=name)


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_package_that_is_not_installed_is_named_with_the_extra_that_brings_it(extra, capsys):
    for package in EXTRAS[extra]:
        with pytest.raises(SystemExit) as ended:
            run_program(partial(imports, name=f"{package}.part"), [])
        assert ended.value.code == 2
        expected = f"error: the package {package} is not installed: pip install 'vanilla-transformer[{extra}]'\n"
        assert capsys.readouterr().err == expected


def test_the_packages_of_each_extra_are_those_of_pyproject():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    imported = {"Babel": "babel", "PyYAML": "yaml", "protobuf": "google"}
    for extra, packages in EXTRAS.items():
        names = [re.match(r"[\w-]+", line)[0] for line in extras[extra] if not line.startswith("vanilla-transformer")]
        assert packages == tuple(imported.get(name, name) for name in names)


# The arguments of each program, OUTPUT last. There is no model of this name, and no checkpoint.
WRITERS = {
    "translate": (translate.main, ["nowhere", "--input", "a.txt", "--output"]),
    "evaluate": (evaluate.main, ["nowhere", "--test_file", "a.txt", "a.txt", "--output_file"]),
    "export": (export.main, ["nowhere", "--format", "marian", "--output"]),
    "convert": (convert.main, ["a.txt", "--format", "torch", "--output"]),
    "average": (average.main, ["MODEL", "--output_dir"]),
    "tokenizer": (tokenizer.main, ["--train_file", "nowhere", "nowhere", "--output_dir"]),
    "benchmark": (benchmark.main, ["train", "--cells", "base", "--output"]),
}
PLACES = {
    "below a file": "a.txt/new",
    "a folder of the kernel": "/proc/new",
    "a long name": "n" * 300,
    "a name that is too long with its ending": "n" * 253,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(("program", "argv"), WRITERS.values(), ids=WRITERS)
def test_an_output_that_cannot_be_written_is_named_before_any_work(
    program, argv, place, tiny_model, tmp_path, monkeypatch, capsys
):
    if len(place) == 253 and argv[0] == "--train_file":
        pytest.skip("a folder that has its own name from the beginning")
    (tmp_path / "a.txt").write_text("a\n")
    if "MODEL" in argv:
        tiny_model().save_pretrained(tmp_path / "MODEL")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        run_program(program, [*argv, place])
    assert refused.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {argv[-1].removeprefix('--')}={place}")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_that_is_written_is_whole_or_not_there(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise RuntimeError

    with pytest.raises(RuntimeError), new_folder("output", tmp_path / "above" / "new") as folder:
        fail(folder)
    assert not list((tmp_path / "above").iterdir())
    with new_folder("output", tmp_path / "above" / "new") as folder:
        (folder / "whole").write_text("")
        assert not (tmp_path / "above" / "new").exists()
    assert [path.name for path in (tmp_path / "above").rglob("*")] == ["new", "whole"]
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("above", "link"):
        with pytest.raises(UserError, match=f"output=.*{name} exists"), new_folder("output", tmp_path / name):
            pass


def test_the_phrasebook_is_printed_in_any_encoding():
    code = """
import runpy, sys
sys.stdout.reconfigure(encoding="latin-1")
sys.modules.pop("vanilla_transformer.training.data.phrasebook", None)
runpy.run_module("vanilla_transformer.training.data.phrasebook", run_name="__main__", alter_sys=True)
"""
    run = run_code(code, "en-ja", "--per-kind", 1)
    assert (run.returncode, run.stderr) == (0, "")
    assert r"\u" in run.stdout

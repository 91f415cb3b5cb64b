"""Programs in processes of their own that need no new interpreter: forks of one that has everything imported."""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils.other import get_free_port

from vanilla_transformer_commands.main import run


# It computes nothing: OpenMP's threads are not forked with it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "vanilla_transformer.training.train",
        "vanilla_transformer.training.evaluate",
        "matplotlib",
        "pytest",
        "hypothesis",
    ]
)
# Of the test run: a test that starts the first process may have changed it.
ENVIRONMENT = dict(os.environ)

# Code that comes before others: modules of the package can then be imported without all of it and transformers, which
# take most of the time of an import.
WITHOUT_PACKAGE = """
import importlib.util, sys
sys.modules["vanilla_transformer"] = importlib.util.module_from_spec(importlib.util.find_spec("vanilla_transformer"))
"""


def start(work: Callable, *arguments: Any, **options: Any) -> multiprocessing.Process:
    """Starts `work(*arguments, **options)`, a function of a module, in a fork."""
    with mock.patch.dict(os.environ, ENVIRONMENT, clear=True):
        forkserver.ensure_running()
    process = FORKS.Process(target=work, args=arguments, kwargs=options)
    process.start()
    return process


def forked(
    work: Callable, *arguments: Any, cwd: Path | str | None = None, check: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """
    Runs `work(*arguments)` in a fork and waits for its end.

    Args:
        work: a function of a module.
        cwd: the folder that it runs in. Default: this one.
        check: whether another exit status than 0 is an error.
        environment: variables that it has besides those of this process.

    Returns:
        As `subprocess.run` does, with what it wrote as text.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        place = str(cwd or Path.cwd())
        process = start(live, work, arguments, files, place, {**os.environ, **environment})
        process.join()
        said = [file.read_text(encoding="utf-8", errors="backslashreplace") for file in files]
    assert not check or process.exitcode == 0, said[1][-3000:]
    return subprocess.CompletedProcess((work, *arguments), process.exitcode, *said)


def live(work: Callable, arguments: tuple, files: list[Path], place: str, environment: dict[str, str]) -> None:
    """What a fork does: its output and its errors go to the two files."""
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    torch.set_num_threads(1)  # several of them share the machine's cores
    PartialState._reset_state()  # that of the process that was forked
    work(*arguments)


def forked_ranks(work: Callable, *arguments: Any, **options: Any) -> None:
    """Runs `work(*arguments)` in two forks that are ranks of one process group, and checks that both end well."""
    port = get_free_port()
    places = [place_of(rank, 2, port) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda place: forked(work, *arguments, check=True, **options, **place), places))


def place_of(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables by which torch tells a process that it is one of several on this machine."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()}


def run_command(name: str, *argv: Any, **options: Any) -> subprocess.CompletedProcess:
    """Runs `vanilla-transformer NAME ARGV`. The options are those of `forked`."""
    return forked(run, name, [str(word) for word in argv], **options)


def run_code(code: str, *argv: Any, **options: Any) -> subprocess.CompletedProcess:
    """Runs `python -c CODE ARGV`. The options are those of `forked`."""
    return forked(execute, code, [str(word) for word in argv], **options)


def execute(code: str, argv: list[str]) -> None:
    sys.argv = ["-c", *argv]
    sys.path.insert(0, "")
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def run_new_python(code: str, *argv: Any, cwd: Path) -> str:
    """What `python -c CODE ARGV` prints in a new interpreter, offline, with an empty cache of the Hub in `cwd`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hub"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", code, *map(str, argv)]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

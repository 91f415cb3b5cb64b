"""Users of the Hub of `hub_server.py`: Python processes of their own, one of them where only transformers is installed.

`huggingface_hub` reads HF_ENDPOINT when it is imported, so whoever is to speak to another Hub is another process. Each
runs what it is sent, for as long as it is wanted, since importing torch and transformers takes seconds.
"""

import json
import os
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement


# Runs code that it reads as lines of JSON. Answers with the code's variable `answer`, its output, and its error.
PROGRAM = """
import contextlib, io, json, os, sys, traceback

orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
# What the code itself reads and writes is not for it: transformers asks whether to trust code.
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
for line in orders:
    asked = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(asked["environment"])
    scope, told = {"__name__": "__main__", **asked["values"]}, {"error": None, "answer": None}
    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            exec(asked["code"], scope)
        told["answer"] = scope.get("answer")
    except SystemExit as ended:
        told["error"] = f"exit status {ended.code}"
    except BaseException:
        told["error"] = traceback.format_exc()
    told |= {"output": output.getvalue(), "errors": errors.getvalue()}
    print(json.dumps(told), file=answers, flush=True)
"""


class ClientError(Exception):
    """The error that ended a client's code: a traceback, or its standard error before it exited."""


class Client:
    """
    A Python process that knows one Hub only, with a home of its own for what it downloads.

    Args:
        python: its interpreter.
        endpoint: address of the Hub.
        home: an empty folder, in which it runs.
    """

    def __init__(self, python: str | Path, endpoint: str, home: Path):
        hidden = ("HF_", "TRANSFORMERS_", "PYTHON")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        environment = {
            **inherited,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home / "huggingface"),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONNOUSERSITE": "1",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen([python, "-c", PROGRAM], cwd=home, env=environment, **pipes)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def run(self, code: str, token: str | None = None, **values: Any) -> Any:
        """
        Runs code with `values` as its variables, and returns what it assigns to `answer`, or what it printed.

        Raises:
            ClientError: it failed.
        """
        environment = {} if token is None else {"HF_TOKEN": token}
        asked = {"code": code, "values": values, "environment": environment}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        told = json.loads(self.process.stdout.readline())
        if told["error"] is not None:
            raise ClientError(told["errors"] if told["error"].startswith("exit") else told["error"])
        return told["output"] if told["answer"] is None else told["answer"]


def requirements_of(*names: str) -> set[str]:
    """Installed distributions, with all their requirements."""
    found: set[tuple[str, frozenset[str]]] = set()
    wanted = [Requirement(name) for name in names]
    while wanted:
        requirement = wanted.pop()
        asked = (requirement.name.lower().replace("_", "-"), frozenset(requirement.extras))
        if asked in found:
            continue
        found.add(asked)
        for needed in map(Requirement, distribution(requirement.name).requires or []):
            extras = [{"extra": extra} for extra in (requirement.extras or {""})]
            if needed.marker is None or any(needed.marker.evaluate(extra) for extra in extras):
                wanted.append(needed)
    return {name for name, _ in found}


def fresh_environment(folder: Path, *names: str) -> Path:
    """
    Makes a virtual environment that holds these distributions and what they require, by links to those of this one.

    Returns:
        Its interpreter.
    """
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for installed in map(distribution, requirements_of(*names)):
        for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
            if not (packages / top).is_symlink():
                (packages / top).symlink_to(installed.locate_file(top))
    return folder / "bin" / Path(sys.executable).name

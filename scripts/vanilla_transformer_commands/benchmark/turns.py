"""Contenders that take turns, each in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from vanilla_transformer.training.errors import UserError

from .contenders import Contender


class Worker:
    """A contender's process. It takes one step for each `go()`, and reports it in one line of JSON."""

    def __init__(self, job: dict[str, Any], threads: int, **environment: str):
        self.log = log = Path(job["folder"]) / f"{Contender(*job['contender'])}.log"
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
            )
        self.send(json.dumps(job))

    def send(self, line: str) -> None:
        """One line to the process. That it may have ended is found when its answer is read."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def go(self) -> dict[str, Any]:
        """Lets the process take its next step, and waits for the report."""
        self.send("")
        return self.report()

    def report(self) -> dict[str, Any]:
        """The next report. Raises UserError with the process's last words if it has ended."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        last_words = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise UserError(f"a contender ended with status {self.process.wait()}:\n{last_words}")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def take_turns(
    cell: str, starts: Sequence[Callable[[], Worker]], rounds: int, before_round: Callable[[], None] = lambda: None
) -> list[list[dict[str, Any]]]:
    """The reports of each worker: one after it has warmed up, and one of each round, in which it takes its turn."""
    turns = (rounds + 1) * len(starts)
    with ExitStack() as stack, tqdm(total=turns, desc=f"{cell}, warming up", unit="turns", disable=None) as progress:
        workers, reports = [], []
        for begin in starts:
            workers.append(stack.enter_context(begin()))
            # One after the other here too: two at a time would be slow, and short of memory.
            reports.append([workers[-1].report()])
            progress.update()
        for number in range(rounds):
            progress.set_description(f"{cell}, round {number + 1}")
            before_round()
            for worker, reported in zip(workers, reports, strict=True):
                reported.append(worker.go())
                progress.update()
    return reports

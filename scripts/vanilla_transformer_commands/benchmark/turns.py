"""Runs contenders in turns, each in its own process."""

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
    """A contender's process. Each `go()` makes it take one step and report it in one line of JSON."""

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
        """Sends one line to the process. If it has ended, `report` raises the error."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def go(self) -> dict[str, Any]:
        """Lets the process take its next step, and waits for its report."""
        self.send("")
        return self.report()

    def report(self) -> dict[str, Any]:
        """The next report. Raises UserError with the end of the process's log if it has ended."""
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
    """The reports of each worker: one after its warm-up, then one for each round. Only one worker runs at a time."""
    turns = (rounds + 1) * len(starts)
    with ExitStack() as stack, tqdm(total=turns, desc=f"{cell}, warming up", unit="turns", disable=None) as progress:
        workers, reports = [], []
        for begin in starts:
            workers.append(stack.enter_context(begin()))
            # Also one at a time here: two would be slow and use more memory.
            reports.append([workers[-1].report()])
            progress.update()
        for number in range(rounds):
            progress.set_description(f"{cell}, round {number + 1}")
            before_round()
            for worker, reported in zip(workers, reports, strict=True):
                reported.append(worker.go())
                progress.update()
    return reports

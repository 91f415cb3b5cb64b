"""A contender's process, `python -m vanilla_transformer_commands.benchmark.worker`: reads a job and does it."""

import json
import os
import sys
from pathlib import Path
from typing import Any


def work() -> None:
    """Reads a job from standard input, trains or translates, and reports to the original standard output."""
    # The log of the Trainer, and prints of imported libraries, go to standard error instead.
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from .contenders import Contender

    job = json.loads(sys.stdin.readline())
    contender, folder = Contender(*job["contender"]), Path(job["folder"])

    def report(figures: dict[str, Any]) -> None:
        print(json.dumps(figures), file=reports, flush=True)

    if "model" in job:
        from .translators import build_decoder, translate_in_turns

        translate_in_turns(*build_decoder(contender, job["model"], folder, job["threads"]), job["task"], report)
        return
    if contender.side == "Marian C++":
        from .marian import train_marian

        train_marian(job["recipe"], folder, report, job["threads"], **job["orders"])
        return
    from .losses import measure_losses
    from .trainers import build_contender, measure_speed

    trainer = build_contender(job["recipe"], folder, contender)
    if "loss_tokens" in job["orders"]:
        report(measure_losses(trainer, folder, **job["orders"]))
    else:
        measure_speed(trainer, report, **job["orders"])


if __name__ == "__main__":
    work()

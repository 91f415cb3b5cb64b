"""Handles SIGTERM and SIGINT: the run saves a checkpoint and stops, in all processes after the same update."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


# A launcher forwards a signal to processes that may have received it already; such repeats are ignored.
ECHO_SECONDS = 1.0


class StopSignal:
    """
    SIGTERM or SIGINT. If any process receives it, all processes stop after the same update.

    The first signal makes the run save and stop. A second one ends the process at once.

    Args:
        processes: number of processes of the run.
        speaks: whether this process prints a message about the signal.
    """

    def __init__(self, processes: int, speaks: bool):
        self.received = 0
        self.speaks = speaks
        self.process = os.getpid()
        # gloo works on the CPU and in the background.
        self.group = dist.new_group(backend="gloo") if processes > 1 else None
        self.shared = torch.tensor(0)
        self.pending: dist.Work | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals inside the `with`."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if not self.received:
            self.received, self.at = number, time.monotonic()
            # DataLoader workers inherit this handler. `print` is not safe in a signal handler.
            if self.speaks and os.getpid() == self.process:
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: saving after this update. A second signal ends the run at once.\n".encode())
        elif time.monotonic() - self.at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def finish(self) -> None:
        """Waits until the last message is delivered: gloo aborts a process that exits before that."""
        if self.pending is not None:
            self.pending.wait()
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def agreed(self) -> int:
        """
        The signal, or 0; the same in all processes. All of them must call this after each update.

        Each call starts sharing the signal that this process has received, and returns the previous call's result.
        """
        if self.group is None:
            return self.received
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        if not (number := int(self.shared)):
            self.shared = torch.tensor(self.received)
            self.pending = dist.all_reduce(self.shared, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return number

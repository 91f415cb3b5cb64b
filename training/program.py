"""Runs a program for the shell: standard streams, exit status, and one line instead of a traceback."""

import errno
import io
import os
import select
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils.logging import disable_progress_bar

from .errors import UserError, message_of
from .threads import fit_threads


# Errors of the file system that are not the program's fault.
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED_BY_SYSTEM = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


# The packages that each of our extras installs, by their import names.
EXTRAS = {
    "train": (
        "accelerate", "babel", "datasets", "evaluate", "ftfy", "matplotlib", "peft", "psutil", "yaml", "rapidfuzz",
        "sacrebleu", "shtab", "tensorboard",
    ),
    "convert": ("google", "sacremoses", "sentencepiece"),
    "bench": ("ctranslate2",),
}  # fmt: skip


def run_program(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """
    Runs a program and ends it as shells expect, with at most one line on stderr:

    - a mistake of the user, or an error of the file system: exit status 2;
    - a bug: exit status 1, and the traceback in a file that the line names, or on the screen with `--verbose`;
    - Ctrl-C: exit status 130;
    - a closed pipe (`| head -1`): exit status 141, without a line.

    Args:
        main: the program.
        argv: its command line. `--verbose` is removed from it.
    """
    verbose = "--verbose" in argv
    _prepare_streams()
    _hide_bars()
    fit_threads()
    try:
        main([word for word in argv if word != "--verbose"])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        sys.stdout.flush()
    except KeyboardInterrupt:
        _end(130, "\ninterrupted")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and (_is_unread(1) or _is_unread(2)):
            _end(141)
        if verbose:
            raise
        _end(*_status_and_line(error))


def _status_and_line(error: Exception) -> tuple[int, str]:
    """The exit status for an error, and the line that reports it."""
    words = message_of(error)
    if isinstance(error, (UserError, StrictDataclassError)):
        return 2, f"error: {words}"
    if isinstance(error, OSError) and error.errno in REFUSED_BY_SYSTEM:
        return 2, f"error: {'the disk is full: ' if error.errno in FULL else ''}{words}"
    if isinstance(error, ModuleNotFoundError):
        package = str(error.name).partition(".")[0]
        for extra, packages in EXTRAS.items():
            if package in packages:
                return 2, f"error: the package {package} is not installed: pip install 'vanilla-transformer[{extra}]'"
    with tempfile.NamedTemporaryFile("w", prefix="vanilla-transformer-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    return 1, f"error: {type(error).__name__}: {words} (this is a bug; the traceback is in {file.name})"


def _prepare_streams() -> None:
    """
    Redirects closed standard streams to the null device, since libraries write to them; `sys.__stdout__` stays None.
    Characters that the terminal's encoding lacks are written as escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _hide_bars() -> None:
    """Hides the progress bars of loading and saving a model. Those of downloads and of training stay."""
    shows_downloads = not are_progress_bars_disabled()
    disable_progress_bar()  # also those of downloads
    if shows_downloads:
        enable_progress_bars()


def _is_unread(descriptor: int) -> bool:
    """Whether this is a pipe whose reader has closed it."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _end(status: int, message: str | None = None) -> NoReturn:
    """Ends the program. Output that can no longer be written is dropped; Python would print an error about it."""
    for descriptor, stream, text in ((1, sys.stdout, None), (2, sys.stderr, message)):
        try:
            if text is not None:
                print(text, file=stream)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    raise SystemExit(status)

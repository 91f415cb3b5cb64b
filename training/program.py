"""How programs end at a shell: streams, exit status, and one line in place of a traceback."""

import errno
import io
import os
import select
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError

from .errors import UserError
from .threads import fit_threads


# What a file system refuses, for no fault of the program.
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED_BY_SYSTEM = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


# The packages that an extra of ours brings, as they are imported.
EXTRAS = {
    "train": (
        "accelerate", "babel", "datasets", "evaluate", "ftfy", "matplotlib", "peft", "psutil", "yaml", "sacrebleu",
        "shtab", "tensorboard",
    ),
    "convert": ("google", "sacremoses", "sentencepiece"),
    "bench": ("ctranslate2",),
}  # fmt: skip


def run_program(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """
    Runs a program as people at a shell expect it to end.

    A mistake of the user's, or a file system that refuses, ends it with one line and exit status 2. A fault of the
    program's own ends it with one line and 1; the traceback is in a file that the line names, and on the screen with
    `--verbose`. Ctrl-C ends it with one line and 130, a pipe that nobody reads any more (`| head -1`) without a word
    and with 141.

    Args:
        main: the program.
        argv: its command line. `--verbose` is taken out of it.
    """
    verbose = "--verbose" in argv
    _prepare_streams()
    fit_threads()
    try:
        main([word for word in argv if word != "--verbose"])
        sys.stdout.flush()
    except KeyboardInterrupt:
        _end(130, "\ninterrupted")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and (_is_unread(1) or _is_unread(2)):
            _end(141)
        if verbose:
            raise
        _end(*_told(error))


def _told(error: Exception) -> tuple[int, str]:
    """The exit status that an error has, and the line that tells of it."""
    words = " ".join(str(error).split())
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
    return 1, f"error: {type(error).__name__}: {words} (a fault of the program; its traceback is in {file.name})"


def _prepare_streams() -> None:
    """
    Opens the standard streams that the caller has closed on the null device, since libraries write to them; Python's
    own `sys.__stdout__` stays None. Characters that the terminal's encoding lacks are written as escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_unread(descriptor: int) -> bool:
    """Whether this is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _end(status: int, message: str | None = None) -> NoReturn:
    """Ends the program. What can no longer be written is dropped, where Python would complain of it."""
    for descriptor, stream, text in ((1, sys.stdout, None), (2, sys.stderr, message)):
        try:
            if text is not None:
                print(text, file=stream)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    raise SystemExit(status)

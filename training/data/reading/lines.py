"""Lines of text files, the same for training, streams, evaluation and `vanilla-transformer translate`.

A line ends at a line feed, before which a carriage return is dropped, and nowhere else: U+0085, U+2028, form feeds,
vertical tabs and other carriage returns are text. (`str.splitlines` would break there, and misalign parallel files.)
"""

import bz2
import gzip
import io
import logging
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...files import missing
from ...words import counted


logger = logging.getLogger(__name__)

BYTE_ORDER_MARK = "\ufeff"


def _open_zstd(path: str | Path, mode: str) -> io.BufferedReader:
    import pyarrow as pa  # slow to import

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 2**16)


# Suffix of a compressed file -> its format, and what opens it. All of them read files of several members.
COMPRESSED: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    ".gz": ("gzip file", gzip.open),
    ".bz2": ("bzip2 file", bz2.open),
    ".xz": ("xz file", lzma.open),
    ".zst": ("zstd file", _open_zstd),
}


@contextmanager
def open_binary(path: str | Path) -> Iterator[Any]:
    """
    A file's bytes, decompressed as its suffix says (.gz, .bz2, .xz, .zst). `-` is the standard input.

    Raises:
        DataError: the file cannot be opened, or its bytes cannot be read inside the block.
    """
    kind, opener = COMPRESSED.get(Path(path).suffix, ("file", open))
    try:
        with open(sys.stdin.fileno(), "rb", closefd=False) if str(path) == "-" else opener(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise DataError(missing(path, "file")) from None
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        # Only errors of the system have a number; gzip, bz2 and pyarrow raise OSError without one.
        if (number := getattr(error, "errno", None)) is None:
            raise DataError(f"{path}: the {kind} is damaged or cut off ({error})") from error
        raise DataError(f"{path}: {os.strerror(number)}") from error


def read_lines(path: str | Path) -> Iterator[str]:
    """
    Yields the lines of a UTF-8 text file without their ends.

    A byte order mark at the start is dropped. Others are text, and a warning counts them.

    Args:
        path: plain, or compressed as its suffix says. `-` is the standard input.

    Raises:
        DataError: the file cannot be read, or holds bytes that are not UTF-8 (names the line).
    """
    number = marks = first = 0
    with open_binary(path) as file:
        try:
            for number, line in enumerate(file, 1):
                text = line.decode().removesuffix("\n").removesuffix("\r")
                if BYTE_ORDER_MARK in text:
                    text = text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text
                    marks += text.count(BYTE_ORDER_MARK)
                    first = first or (number if marks else 0)
                yield text
        except UnicodeDecodeError as error:
            found = error.object[error.start]
            raise DataError(f"{path}, line {number}: byte 0x{found:02x} is not UTF-8 ({error.reason})") from error
    if marks:
        warn_once(f"{path}, line {first}: a byte order mark (U+FEFF) inside the text, kept ({marks} in the file)")


def read_parallel_lines(source: str | Path, target: str | Path) -> Iterator[tuple[str, str]]:
    """
    Yields the lines of two files side by side. A warning counts the lines that are blank in one file only.

    Raises:
        DataError: one file has more lines than the other, or as read_lines.
    """
    paths, blank, first = (source, target), [0, 0], [0, 0]
    pairs: Iterator[tuple[Any, Any]] = zip_longest(read_lines(source), read_lines(target))
    for number, pair in enumerate(pairs, 1):
        text, translation = pair
        if not text or not translation or text.isspace() or translation.isspace():
            if None in pair:
                shorter, longer = number - 1, number + sum(1 for _ in pairs)
                counts = (shorter, longer) if text is None else (longer, shorter)
                raise DataError(
                    f"{source} has {counted(counts[0], 'line')} and {target} has {counts[1]}: "
                    "line N of one must be the translation of line N of the other"
                )
            if (has_text := bool(text.strip())) != bool(translation.strip()):
                side = int(has_text)
                blank[side] += 1
                first[side] = first[side] or number
        yield pair
    for side, count in enumerate(blank):
        if count:
            warn_once(
                f"{paths[side]}, line {first[side]}: blank, where {paths[1 - side]} has text ({count} such lines)"
            )


@cache
def warn_once(message: str) -> None:
    """Logs a warning once: a file is read in each epoch of a stream, and by programs that count its lines first."""
    logger.warning(message)

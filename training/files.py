"""
Writes files and folders so that a crash, or a loss of power, leaves the old or the new, whole: each is written beside
its place, brought to the disk, and then renamed. And asks, before any work is done, whether that will be possible.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


@contextmanager
def beside(path: str | Path) -> Iterator[Path]:
    """
    Gives a path, `PATH.part`, at which to write a file or to make a folder. After the `with` it is renamed to `path`;
    if an error is raised inside, it is removed.
    """
    part = Path(f"{path}.part")
    try:
        yield part
        put_in_place(part, Path(path))
    except BaseException:
        _remove(part)
        raise


def put_in_place(part: Path, path: Path) -> None:
    """Renames a file or a folder, after all of it is on the disk. A file takes the place of an older one."""
    to_disk(part)
    os.replace(part, path)
    to_disk(path.parent, recursive=False)


def to_disk(path: Path, recursive: bool = True) -> None:
    """Returns when a file, or a folder with all that it holds, would survive a loss of power (fsync)."""
    if recursive and path.is_dir():
        for inside in path.iterdir():
            to_disk(inside)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_beside(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    with beside(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(option: str, path: str | Path) -> Iterator[Path]:
    """
    Makes a folder to write into inside the `with`, and renames it to `path` after that: `path` is whole or not there.

    Raises:
        UserError: `path` exists, or no folder can be made there. The message names the option.
    """
    with refusing(option, path):
        str(path).encode()  # tokenizers would fail
        if os.path.lexists(path):
            raise UserError(f"{option}={path} exists: choose another, or delete it first")
        shutil.rmtree(f"{path}.part", ignore_errors=True)  # of a program that was killed
        Path(f"{path}.part").mkdir(parents=True)
    with beside(path) as part:
        yield part


def make_folder(option: str, path: str | Path, kind: type[UserError] = UserError) -> None:
    """
    Makes a folder, where it is not there, and makes sure that it can be written into.

    Raises:
        UserError: of that kind: it cannot. The message names the option.
    """
    with refusing(option, path, kind):
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


def make_sure_of_folder(option: str, path: str | Path) -> None:
    """
    Checks, before any work is done, that a folder at `path` can be written into, or made. Makes none.

    Raises:
        UserError: it cannot. The message names the option.
    """
    with refusing(option, path):
        str(path).encode()  # tokenizers would fail
        there = next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=there):
            pass


def make_sure_of_file(option: str, path: str | Path) -> None:
    """
    Checks, before any work is done, that `write_beside` can write this file. A file that is there stays as it is.

    Raises:
        UserError: it cannot. The message names the option.
    """
    path = Path(path)
    with refusing(option, path):
        if path.exists() and not path.is_file():
            raise UserError(f"{option}={path} is not a file, and cannot be replaced by one")
        if not path.parent.is_dir():
            raise UserError(f"{option}={path}: there is no folder {path.parent}")
        with tempfile.NamedTemporaryFile(prefix=f"{path.name}.part", dir=path.parent):
            pass


@contextmanager
def refusing(option: str, path: str | Path, kind: type[UserError] = UserError) -> Iterator[None]:
    """
    Turns what the file system raises, when it refuses to write, into an error of the user's.

    Raises:
        UserError: of that kind. The message names the option.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{option}={path} cannot be written into: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise kind(f"{option}={path} cannot be written into: its name is not UTF-8") from error

"""
Writes files and folders atomically: after a crash or a power loss, either the old version or the new one is there,
complete. Each is written to a temporary path beside its place, synced to disk (fsync), and renamed. Other functions
check, before any work is done, that writing will be possible. `missing` words the error about a path that is not there.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from .errors import UserError


@contextmanager
def beside(path: str | Path) -> Iterator[Path]:
    """
    Yields a temporary path, `PATH.part`, for a file or a folder. After the `with` it is renamed to `path`; after an
    error it is removed.
    """
    part = Path(f"{path}.part")
    try:
        yield part
        put_in_place(part, Path(path))
    except BaseException:
        _remove(part)
        raise


def put_in_place(part: Path, path: Path) -> None:
    """Syncs a file or a folder to disk, then renames it. A file replaces an older one."""
    to_disk(part)
    os.replace(part, path)
    to_disk(path.parent, recursive=False)


def to_disk(path: Path, recursive: bool = True) -> None:
    """Syncs a file, or a folder and its contents, to disk (fsync), so that it survives a power loss."""
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
    """Writes a text file in UTF-8, atomically."""
    with beside(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(option: str, path: str | Path) -> Iterator[Path]:
    """
    Yields a new temporary folder, and renames it to `path` after the `with`: `path` is complete or missing.

    Raises:
        UserError: `path` exists, or no folder can be made there. The message names the option.
    """
    with refusing(option, path):
        str(path).encode()  # tokenizers would fail
        if os.path.lexists(path):
            raise UserError(f"{option}={path} exists: choose another, or delete it first")
        shutil.rmtree(f"{path}.part", ignore_errors=True)  # left by a killed program
        Path(f"{path}.part").mkdir(parents=True)
    with beside(path) as part:
        yield part


def make_folder(option: str, path: str | Path, kind: type[UserError] = UserError) -> None:
    """
    Creates a folder if it is missing, and checks that it is writable.

    Raises:
        UserError: a `kind`: it is not. The message names the option.
    """
    with refusing(option, path, kind):
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


def make_sure_of_folder(option: str, path: str | Path) -> None:
    """
    Checks, before any work is done, that the folder `path` is writable or can be created. Does not create it.

    Raises:
        UserError: it is not. The message names the option.
    """
    with refusing(option, path):
        str(path).encode()  # tokenizers would fail
        there = next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=there):
            pass


def make_sure_of_file(option: str, path: str | Path) -> None:
    """
    Checks, before any work is done, that `write_beside` can write this file. An existing file is not changed.

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
    Turns errors of the file system into a UserError.

    Raises:
        UserError: a `kind`. The message names the option.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{option}={path} cannot be written into: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise kind(f"{option}={path} cannot be written into: its name is not UTF-8") from error


def missing(path: str | Path, kind: str = "folder") -> str:
    """
    The message about a path that does not exist, with the names beside it that the user may have meant.

    Args:
        path: the missing path.
        kind: what it should be: "folder", "file" or "file or folder".
    """
    likely = likely_names(path, kind)
    return f"{path}: no such {kind}" + (f": did you mean {likely}?" if likely else "")


def likely_names(path: str | Path, kind: str = "folder") -> str:
    """The paths beside a missing one whose names are close to its own, as words; "" if there are none."""
    path, is_wanted = Path(path), {"folder": os.path.isdir, "file": os.path.isfile}.get(kind, os.path.exists)
    there = [name for name in os.listdir(path.parent) if is_wanted(path.parent / name)] if path.parent.is_dir() else []
    return " or ".join(str(path.parent / name) for name in get_close_matches(path.name, there))

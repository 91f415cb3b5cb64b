"""A translation that can be stopped and resumed: each finished window is a file until all are joined."""

import fcntl
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.files import beside, write_beside


# How many line numbers a warning lists.
NAMED = 5
ADVICE = "repeat the original command, delete the folder to start over, or choose another --output"


class Parts:
    """
    The finished windows of a translation, one file each in the folder OUTPUT.parts.

    A part begins with a line of JSON: the checksum of its source lines, and the numbers of the lines whose translation
    reached the maximum length. Parts are written atomically. A folder can be resumed while its settings.json exists: it
    is the first file to be written and the first to be deleted.

    Raises:
        UserError: the folder cannot be created or written to.
    """

    def __init__(self, output: Path):
        self.output = output
        self.folder = Path(f"{output}.parts")
        self.settings = self.folder / "settings.json"
        try:
            self.folder.mkdir(exist_ok=True)
            self.lock_file = (self.folder / "lock").open("a")
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written into: {error.strerror}") from error

    def begin(self, settings: dict[str, Any]) -> None:
        """
        Checks that the folder's parts have these settings. Called by the main process before the others start.

        Raises:
            UserError: the settings differ, or another process is still writing there.
        """
        self.lock(alone=True)
        if not self.settings.exists():
            for path in self.folder.glob("*.txt"):
                path.unlink()
            write_beside(self.settings, json.dumps(settings))
        begun = json.loads(self.settings.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if begun.get(name) != value:
                found = f"with {name}={begun.get(name)}, but this run has {name}={value}"
                if name == "model":
                    found = "with another model (its weights, vocabulary or decoding settings differ)"
                raise UserError(f"{self.folder} holds a translation that was begun {found}: {ADVICE}")
        # From exclusive to shared, for the other processes.
        self.lock()

    def lock(self, alone: bool = False) -> None:
        """
        Locks the folder until this process ends. The processes of a run share the lock.

        Args:
            alone: take an exclusive lock.

        Raises:
            UserError: a process of another run holds the lock.
        """
        try:
            fcntl.flock(self.lock_file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.folder} is being written to by another process, maybe of a run whose launcher was killed: "
                "wait for it, or end it"
            ) from None

    def refuse_other_input(self, lines: list[str], name: str) -> None:
        """
        Raises:
            UserError: there is a part for the first window, but from other lines.
        """
        if self._path(0).exists() and not self.has(0, lines):
            raise UserError(
                f"{self.folder} holds a translation whose input began with other lines than {name}: {ADVICE}"
            )

    def has(self, number: int, lines: list[str]) -> bool:
        """Whether there is a part for this window, from these lines."""
        try:
            with open(self._path(number), "rb") as part:
                return json.loads(part.readline())["lines"] == checksum(lines)
        except FileNotFoundError:
            return False

    def write(self, number: int, lines: list[str], text: str, unfinished: list[int]) -> None:
        """Writes the part of a window."""
        header = json.dumps({"lines": checksum(lines), "unfinished": unfinished})
        write_beside(self._path(number), f"{header}\n{text}")

    def join(self, count: int) -> tuple[int, list[int]]:
        """
        Joins `count` parts into the output, and deletes them.

        Returns:
            How many translations reached the maximum length, and the first line numbers among them.
        """
        total, first = 0, list[int]()
        with beside(self.output) as joined, open(joined, "wb") as whole:
            for number in range(count):
                with open(self._path(number), "rb") as part:
                    unfinished = json.loads(part.readline())["unfinished"]
                    shutil.copyfileobj(part, whole)
                total, first = total + len(unfinished), (first + unfinished)[:NAMED]
        self.settings.unlink()
        shutil.rmtree(self.folder)
        return total, first

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08}.txt"


def checksum(lines: list[str]) -> str:
    """The checksum of a window's lines."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()

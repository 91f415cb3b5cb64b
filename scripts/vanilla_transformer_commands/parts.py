"""A translation that can be stopped and resumed: its finished windows are files of their own until all are joined."""

import fcntl
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.files import beside, write_beside


# How many of the lines that a warning is about it names.
NAMED = 5
ADVICE = "go on as it was begun, delete the folder to start over, or name another --output"


class Parts:
    """
    The finished windows of a translation, a file for each in the folder OUTPUT.parts.

    A part begins with a line of JSON: a checksum of the lines that it is the translation of, and the numbers of those
    that ran into the greatest length. A part is whole or not there: it is written beside, then renamed. A folder is
    something to go on with as long as its settings.json is there, which comes first and goes first.

    Raises:
        UserError: there can be no such folder.
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
        Makes sure that what the folder holds has these settings. For the main process, before the others.

        Raises:
            UserError: it has others, or a process is still writing there.
        """
        self.lock(alone=True)
        if not self.settings.exists():
            for path in self.folder.glob("*.txt"):
                path.unlink()
            write_beside(self.settings, json.dumps(settings))
        begun = json.loads(self.settings.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if begun[name] != value:
                found = f"with {name}={begun[name]}, and this run has {name}={value}"
                if name == "model":
                    found = "by another model (its weights, vocabulary or way to decode differ)"
                raise UserError(f"{self.folder} holds a translation that was begun {found}: {ADVICE}")
        # As the other processes do.
        self.lock()

    def lock(self, alone: bool = False) -> None:
        """
        Locks the folder until this process ends, in whatever way; the processes of a run share the lock.

        Args:
            alone: let no other process have it.

        Raises:
            UserError: a process of another run has it.
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
            UserError: there is a part for the first window, and it is not of these lines.
        """
        if self._path(0).exists() and not self.has(0, lines):
            raise UserError(
                f"{self.folder} holds a translation whose input began with other lines than {name}: {ADVICE}"
            )

    def has(self, number: int, lines: list[str]) -> bool:
        """Whether the window of this number is done, and was of these lines."""
        try:
            with open(self._path(number), "rb") as part:
                return json.loads(part.readline())["lines"] == checksum(lines)
        except FileNotFoundError:
            return False

    def write(self, number: int, lines: list[str], text: str, unfinished: list[int]) -> None:
        """Keeps the translation of a window."""
        header = json.dumps({"lines": checksum(lines), "unfinished": unfinished})
        write_beside(self._path(number), f"{header}\n{text}")

    def join(self, count: int) -> tuple[int, list[int]]:
        """
        Makes the output of so many parts, and removes them.

        Returns:
            How many lines ran into the greatest length, and the first of them.
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
    """Of a window's lines."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()

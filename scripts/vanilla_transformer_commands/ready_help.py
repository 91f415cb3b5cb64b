"""Writes the texts in help/, which `--help` shows without importing a large library: `make help`."""

import os
import sys
from pathlib import Path

from .main import COMMANDS, PROGRAM, parser_of


FOLDER = Path(__file__).parent / "help"
WIDTH = 100


def text(name: str) -> str:
    """The help of a command, from its parser."""
    # argparse takes the program's name and the width of the screen from here.
    sys.argv[0] = f"{PROGRAM} {name}"
    os.environ["COLUMNS"] = str(WIDTH)
    return parser_of(name).format_help()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, command in COMMANDS.items():
        if command.ready_help:
            (FOLDER / f"{name}.txt").write_text(text(name), encoding="utf-8")

"""The command-line parser shared by all commands."""

import argparse
import sys
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """
    An ArgumentParser that keeps the line breaks of its description, and reports errors in one line.

    Args:
        description: usually the module's docstring.
        options: arguments of argparse.ArgumentParser.
    """

    def __init__(self, description: str | None = None, **options: Any):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"description": description, "formatter_class": form, **options})
        # `run_program` reads it.
        self.add_argument("--verbose", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit status 2, without the usage that argparse prints before the message."""
        print(f"error: {message} (`{self.prog} --help` lists the options)", file=sys.stderr)
        raise SystemExit(2)

"""From a clone, `python scripts/export.py` is `vanilla-transformer export`."""

import sys

from vanilla_transformer_commands.main import run


if __name__ == "__main__":
    run("export", sys.argv[1:])

"""From a clone, `python scripts/translate.py` is `vanilla-transformer translate`."""

import sys

from vanilla_transformer_commands.main import run


if __name__ == "__main__":
    run("translate", sys.argv[1:])

"""From a clone, `python scripts/convert_checkpoint.py` is `vanilla-transformer convert`."""

import sys

from vanilla_transformer_commands.main import run


if __name__ == "__main__":
    run("convert", sys.argv[1:])

"""From a clone, `python scripts/average_checkpoints.py` is `vanilla-transformer average`."""

import sys

from vanilla_transformer_commands.main import run


if __name__ == "__main__":
    run("average", sys.argv[1:])

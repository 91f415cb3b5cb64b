"""From a clone, `python scripts/benchmark.py` is `vanilla-transformer benchmark`."""

import sys

from vanilla_transformer_commands.main import run


if __name__ == "__main__":
    run("benchmark", sys.argv[1:])

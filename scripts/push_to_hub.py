"""From a clone, `python scripts/push_to_hub.py` is `vanilla-transformer push`."""

import sys

from vanilla_transformer_commands.main import run


if __name__ == "__main__":
    run("push", sys.argv[1:])

"""From a clone, `python scripts/train_tokenizer.py` is `vanilla-transformer tokenizer`."""

import sys

from vanilla_transformer_commands.main import run


if __name__ == "__main__":
    run("tokenizer", sys.argv[1:])

"""Averages the weights of checkpoints: `vanilla-transformer average RUN --last 5 --output_dir FOLDER`.

Checkpoints can also be listed one by one, instead of a run and `--last`. Configuration, generation config and tokenizer
are copied from the last checkpoint.
"""

import argparse
from pathlib import Path

from .parser import CommandParser


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="folders of saved models, or a run's folder")
    parser.add_argument("--last", type=int, help="average this many checkpoints of the run, the last ones")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder to write the model into")
    return parser


def main(argv: list[str]) -> None:
    """Chooses, loads, averages, writes."""
    arguments = build_parser().parse_args(argv)
    # Imported here to keep --help fast.
    from vanilla_transformer.training.files import new_folder
    from vanilla_transformer.training.loop.averaging import load_average, refuse_different
    from vanilla_transformer.training.saved_model import load_model

    checkpoints = chosen(arguments)
    refuse_different(checkpoints)
    with new_folder("output_dir", arguments.output_dir) as folder:
        model, tokenizer = load_model(str(checkpoints[-1]))
        load_average(model, checkpoints)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"the mean of {', '.join(map(str, checkpoints))}, saved in {arguments.output_dir}")


def chosen(arguments: argparse.Namespace) -> list[Path]:
    """The checkpoints on the command line, or the last ones of the run on it."""
    from vanilla_transformer.training.loop.averaging import AveragingError, last_checkpoints
    from vanilla_transformer.training.words import counted

    if arguments.last is None:
        return arguments.checkpoints
    if arguments.last < 1:
        raise AveragingError(f"--last {arguments.last} must be at least 1")
    if len(arguments.checkpoints) > 1:
        raise AveragingError(f"--last needs one folder, that of a run, not {len(arguments.checkpoints)}")
    run = arguments.checkpoints[0]
    checkpoints = last_checkpoints(run, arguments.last)
    if len(checkpoints) < arguments.last:
        raise AveragingError(f"--last {arguments.last}, but {run} holds {counted(len(checkpoints), 'checkpoint')}")
    return checkpoints

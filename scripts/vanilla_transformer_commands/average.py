"""Averages the weights of checkpoints: `vanilla-transformer average RUN --last 5 --output_dir FOLDER`.

Instead of a run and `--last`, the folders of the checkpoints can be named one by one. Configuration, generation config
and tokenizer are those of the last checkpoint.
"""

import argparse
from pathlib import Path

from .parser import CommandParser


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="folders of saved models, or a run's folder")
    parser.add_argument("--last", type=int, help="average the last so many checkpoints in the run's folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write the model into, a new one")
    return parser


def main(argv: list[str]) -> None:
    """Chooses, loads, averages, writes."""
    arguments = build_parser().parse_args(argv)
    # Imported here, so that --help answers at once.
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
    """The checkpoints that the command line names, or the last ones of the run that it names."""
    from vanilla_transformer.training.loop.averaging import AveragingError, last_checkpoints

    if arguments.last is None:
        return arguments.checkpoints
    if arguments.last < 1:
        raise AveragingError(f"--last {arguments.last} must be at least 1")
    if len(arguments.checkpoints) > 1:
        raise AveragingError(f"--last needs one folder, a run's, not {len(arguments.checkpoints)}")
    run = arguments.checkpoints[0]
    checkpoints = last_checkpoints(run, arguments.last)
    if len(checkpoints) < arguments.last:
        raise AveragingError(f"--last {arguments.last}, but {run} holds {len(checkpoints)} checkpoints")
    return checkpoints

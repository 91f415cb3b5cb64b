"""Averages checkpoints: `python scripts/average_checkpoints.py RUN --last 5 --output_dir FOLDER`.

In place of a run and `--last`, the checkpoints' folders can be named one by one. The weights are the mean of theirs;
configuration, way to decode and tokenizer are the last one's.
"""

import argparse
import sys
from pathlib import Path


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="folders of saved models, or a run's folder")
    parser.add_argument("--last", type=int, help="average the last so many checkpoints in the run's folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write the model into, a new one")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Chooses, loads, averages, writes."""
    arguments = parse_arguments(argv)
    # Imported here, so that --help is instant.
    from vanilla_transformer.training.averaging import load_average, refuse_different
    from vanilla_transformer.training.evaluate import load_model
    from vanilla_transformer.training.report import new_folder

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
    from vanilla_transformer.training.averaging import AveragingError, last_checkpoints

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


def run() -> None:
    """Ends with one line, not with a traceback, where the user got something wrong."""
    if "--help" in sys.argv or "-h" in sys.argv:
        parse_arguments(sys.argv[1:])
    from vanilla_transformer.training.arguments import run_program

    run_program(main, sys.argv[1:])


if __name__ == "__main__":
    run()

"""Compares this package with others on this machine: `vanilla-transformer benchmark train`, or `decode`.

`train` compares training with transformers' MarianMTModel in the stock Seq2SeqTrainer, and with the C++ program Marian,
at the same size. `decode` compares translating on the CPU with transformers' own search, MarianMTModel, Marian and
CTranslate2. Contenders run in turns, each in its own process, so that a machine whose speed varies affects all alike.
Contenders that are not installed, or that the processor has no instructions for, are left out with a message. Linux
only, since memory is read from /proc. docs/benchmarks.md explains what is measured and why.
"""

import argparse
import os
from importlib import import_module

from ..parser import CommandParser
from .cells import CELLS, SEARCHES
from .contenders import DECODERS


def build_parser() -> CommandParser:
    """The parser of the options. Unknown words are fields of a recipe."""
    parser = CommandParser(__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True)

    def add_command(name: str, about: str) -> argparse.ArgumentParser:
        after = "Any field of a recipe can be added, as in training, e.g. --d_model 64; the peers get the same size."
        added = commands.add_parser(name, help=about, description=f"{about}.", epilog=after, allow_abbrev=False)
        added.set_defaults(command=name)
        folder = os.environ.get("MULTI30K_DIR")
        added.add_argument("--multi30k_dir", default=folder, help="folder of Multi30k (default: $MULTI30K_DIR)")
        added.add_argument("--rounds", type=positive, default=5, help="turns of each contender (default: 5)")
        added.add_argument("--threads", type=positive, help="CPU threads (default: one for each core)")
        added.add_argument("--output", help="write all measurements to this file, as JSON")
        return added

    train = add_command("train", "compares training with MarianMTModel and Marian C++")
    train.add_argument("--cells", nargs="+", choices=list(CELLS), help="sizes (default: tiny base; on a GPU big too)")
    train.add_argument("--updates", type=positive, help="updates in a turn (default: tiny 10, base and big 2)")
    train.add_argument("--warmup", type=positive, help="updates before the first (default: tiny 5, base and big 1)")
    train.add_argument("--preload", help="LD_PRELOAD for our processes: an allocator, e.g. libtcmalloc_minimal.so.4")
    train.add_argument(
        "--loss_tokens", type=positive, help="compare tiny's losses after this many target tokens instead of the speed"
    )
    decode = add_command("decode", "compares translating with transformers, Marian and CTranslate2")
    decode.add_argument(
        "--cells", nargs="+", choices=list(SEARCHES), help="beams x sentences in a batch (default: all)"
    )
    decode.add_argument("--contenders", nargs="+", choices=list(DECODERS), help="contenders to compare (default: all)")
    decode.add_argument("--model", help="a trained model, to translate Multi30k's test set instead of random text")
    decode.add_argument(
        "--memory", action="store_true", help="compare the memory of ours and stock at other source lengths and beams"
    )
    return parser


def main(argv: list[str]) -> None:
    """Runs the comparison that the command line asks for."""
    options, fields = build_parser().parse_known_args(argv)
    options.fields = fields
    # Imported here, so that --help answers at once.
    import_module(f".{options.command}", __package__).compare(options)


def positive(text: str) -> int:
    """A whole number above 0."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number

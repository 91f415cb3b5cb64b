"""`vanilla-transformer COMMAND ...`: finds the command, shows its help, or runs it."""

import sys
from argparse import ArgumentParser
from importlib import import_module
from importlib.resources import files
from typing import NamedTuple, NoReturn


class Command(NamedTuple):
    """
    A command: a short description, and the module with its `build_parser()` and `main(argv)`.

    Importing the module takes seconds if its options are fields of a recipe. `ready_help` then shows a file of help/.
    """

    about: str
    module: str
    ready_help: bool = False


TRAINING, HERE = "vanilla_transformer.training", "vanilla_transformer_commands"
COMMANDS = {
    "train": Command("train a model from a recipe", f"{TRAINING}.train", ready_help=True),
    "evaluate": Command("score a saved model on a test set", f"{TRAINING}.evaluate", ready_help=True),
    "translate": Command("translate a text file, line by line", f"{HERE}.translate"),
    "info": Command("show a model's sizes, and the engine that decodes it here", f"{HERE}.info"),
    "tokenizer": Command("learn a vocabulary that several runs can share", f"{HERE}.tokenizer", ready_help=True),
    "average": Command("average the weights of checkpoints", f"{HERE}.average"),
    "export": Command("write a model for CTranslate2, ONNX, Marian or torch.export", f"{HERE}.export"),
    "convert": Command("read a model of another framework", f"{HERE}.convert"),
    "push": Command("publish a finished run on the Hub", f"{HERE}.push"),
    "benchmark": Command("compare the speed of training and decoding with other programs", f"{HERE}.benchmark.command"),
    "completion": Command("print a script for the shell's tab completion", f"{HERE}.completion"),
}
PROGRAM = "vanilla-transformer"
USAGE = f"""\
usage: {PROGRAM} COMMAND [OPTIONS]

The encoder-decoder Transformer of "Attention Is All You Need", for your own text.

commands:
{{commands}}

`{PROGRAM} COMMAND --help` shows the options of a command. --verbose shows the traceback of an error.
`{PROGRAM} --version` shows the version."""


def main() -> None:
    """Runs the command that the command line names."""
    name, argv = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "--version":
        from importlib.metadata import version

        print(f"vanilla-transformer {version('vanilla-transformer')}")
    elif name in COMMANDS:
        run(name, argv)
    else:
        refuse(name)


def usage() -> str:
    """The help of the program: one line per command."""
    return USAGE.format(commands="\n".join(f"  {name:12}{command.about}" for name, command in COMMANDS.items()))


def refuse(name: str) -> NoReturn:
    """Ends the program with an error: there is no such command."""
    from difflib import get_close_matches

    likely = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {likely[0]}?" if likely else f"choose one of {', '.join(COMMANDS)}"
    print(f"error: there is no command {name!r}: {hint}", file=sys.stderr)
    raise SystemExit(2)


def run(name: str, argv: list[str]) -> None:
    """Runs a command, or shows its help without importing a large library."""
    # argparse takes a program's name from here.
    sys.argv[0] = f"{PROGRAM} {name}"
    if "--help" in argv or "-h" in argv:
        show_help(name, argv)
        return
    try:
        from vanilla_transformer.training.program import run_program
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run_program(lambda argv: import_module(COMMANDS[name].module).main(argv), argv)


def show_help(name: str, argv: list[str]) -> None:
    """Prints the help of a command, or of the subcommand in `argv`."""
    if COMMANDS[name].ready_help:
        print((files(HERE) / "help" / f"{name}.txt").read_text(encoding="utf-8"), end="")
    else:
        parser_of(name).parse_args(argv)


def parser_of(name: str) -> ArgumentParser:
    """The parser of a command's options."""
    return import_module(COMMANDS[name].module).build_parser()

"""Prints a shell script for tab completion of commands and options: `vanilla-transformer completion bash`.

bash: vanilla-transformer completion bash > ~/.local/share/bash-completion/completions/vanilla-transformer
zsh:  vanilla-transformer completion zsh > "${fpath[1]}/_vanilla-transformer"
tcsh: vanilla-transformer completion tcsh > ~/.vanilla-transformer.csh, which ~/.cshrc then sources
"""

from argparse import ArgumentParser

from .main import COMMANDS, PROGRAM, parser_of
from .parser import CommandParser


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(__doc__)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return parser


def main(argv: list[str]) -> None:
    """Prints the script, which shtab makes from the parsers of all commands."""
    import shtab

    shell = build_parser().parse_args(argv).shell
    whole = ArgumentParser(prog=PROGRAM)
    commands = whole.add_subparsers()
    for name, command in COMMANDS.items():
        parents = [parser_of(name)]
        commands.add_parser(name, help=command.about, parents=parents, add_help=False, conflict_handler="resolve")
    print(shtab.complete(whole, shell))

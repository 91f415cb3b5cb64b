"""Publishes a run on the Hub: `vanilla-transformer push RUN NAME/MODEL [--private] [--revision BRANCH]`.

It uploads the model, tokenizer, model card, scores and recipe, and the code that loads the model where this package is
not installed. Everything is checked first and sent in one commit, so an interrupted upload changes nothing. The token
comes from `hf auth login` or from the environment variable HF_TOKEN.
"""

from .parser import CommandParser


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(__doc__)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("repo_id", help="NAME/MODEL; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make it a private repository")
    parser.add_argument("--revision", help="branch to push to; created if it does not exist (default: main)")
    return parser


def main(argv: list[str]) -> None:
    """Checks and pushes."""
    arguments = build_parser().parse_args(argv)
    # Imported here to keep --help fast.
    from vanilla_transformer.training.publishing.hub import push_run

    pushed = push_run(arguments.run, arguments.repo_id, arguments.private or None, arguments.revision)
    print(f"{arguments.run} is at {pushed.repo_url}, revision {pushed.oid}")

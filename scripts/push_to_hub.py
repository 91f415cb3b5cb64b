"""Publishes a run on the Hub: `python scripts/push_to_hub.py RUN NAME/MODEL [--private] [--revision BRANCH]`.

The repository gets the model, its tokenizer, card, scores and recipe, and the code with which it loads where this
package is not installed. All is checked first, and sent in one commit: an upload that is interrupted changes nothing.
The token is that of `hf auth login`, or the environment's HF_TOKEN.
"""

import argparse
import sys


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("repo_id", help="NAME/MODEL; made where it does not exist")
    parser.add_argument("--private", action="store_true", help="make it a private repository")
    parser.add_argument("--revision", help="branch to push to; made where it does not exist (default: main)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Checks and pushes."""
    arguments = parse_arguments(argv)
    # Imported here, so that --help is instant.
    from vanilla_transformer.training.hub import push_run

    pushed = push_run(arguments.run, arguments.repo_id, arguments.private or None, arguments.revision)
    print(f"{arguments.run} is at {pushed.repo_url}, revision {pushed.oid}")


def run() -> None:
    """Ends with one line, not with a traceback, where the user got something wrong."""
    if "--help" in sys.argv or "-h" in sys.argv:
        parse_arguments(sys.argv[1:])
    from vanilla_transformer.training.arguments import run_program

    run_program(main, sys.argv[1:])


if __name__ == "__main__":
    run()

"""Translates a file or the standard input, line for line: `python scripts/translate.py MODEL --input FILE`.

Lines are translated in batches of similar length, and come out in their own order. An empty line stays empty.
"""

import argparse
import sys


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub name of a trained model")
    parser.add_argument("--input", default="-", help="text file, plain or .gz (default: standard input)")
    parser.add_argument("--output", default="-", help="text file to write (default: standard output)")
    parser.add_argument(
        "--batch_tokens", type=int, default=4096, help="source tokens of lines translated together (default: 4096)"
    )
    parser.add_argument("--num_beams", type=int, help="width of the beam (default: the model's own)")
    parser.add_argument("--length_penalty", type=float, help="transformers' length_penalty (default: the model's own)")
    parser.add_argument("--max_new_tokens", type=int, help="longest translation in tokens (default: the model's own)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Reads, loads, translates, writes."""
    arguments = parse_arguments(argv)
    # Imported here, so that --help is instant.
    from vanilla_transformer.training.data import read_lines
    from vanilla_transformer.training.evaluate import load_model, translate
    from vanilla_transformer.training.report import write_beside

    lines = list(read_lines(arguments.input))
    model, tokenizer = load_model(arguments.model)
    names = ("num_beams", "length_penalty", "max_new_tokens")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    translations = translate(model, tokenizer, lines, arguments.batch_tokens, **options)
    # A line is a line: a line feed that the model wrote would shift all that follow.
    text = "".join(translation.replace("\n", " ") + "\n" for translation in translations)
    if arguments.output == "-":
        sys.stdout.write(text)
    else:
        write_beside(arguments.output, text)


def run() -> None:
    """Ends with one line, not with a traceback, where the user got something wrong."""
    if "--help" in sys.argv or "-h" in sys.argv:
        parse_arguments(sys.argv[1:])
    from vanilla_transformer.training.arguments import run_program

    run_program(main, sys.argv[1:])


if __name__ == "__main__":
    run()

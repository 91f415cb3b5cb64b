"""Translates a file or the standard input, line by line: `vanilla-transformer translate MODEL --input FILE`.

The input may have any length: lines are read in windows, translated in batches of similar length, and written in their
original order. Empty lines stay empty.

With --output FILE, finished windows are kept in FILE.parts until all are joined; if it is interrupted, the same command
resumes there. Several processes can share the windows: `accelerate launch -m vanilla_transformer_commands translate
MODEL ...`. Their number and --batch_tokens may change when a translation is resumed.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from .parser import CommandParser


# Options passed to `generate()` if they are given.
OPTIONS = ("num_beams", "length_penalty", "max_new_tokens", "compute_type", "compiled")
# Settings that must not change when a translation is resumed.
SETTINGS = (*OPTIONS, "n_best", "scores", "window", "source_lang", "target_lang", "target_lang_column")
# How long processes wait for the slowest: in effect, forever.
PATIENCE = timedelta(days=365)


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(__doc__)
    parser.add_argument("model", help="folder or Hub name of a trained model")
    parser.add_argument(
        "--input",
        default="-",
        help="text file, plain or compressed (.gz, .xz, .zst, .bz2), or .tmx, .xlf, .po (default: standard input)",
    )
    parser.add_argument(
        "--source_column",
        help="column of the source, if --input is .tsv, .csv or .jsonl (without a header: its number)",
    )
    parser.add_argument("--output", default="-", help="text file to write (default: standard output)")
    parser.add_argument("--source_lang", help="language of the input, for a model of several directions")
    parser.add_argument("--target_lang", help="language to translate into, for a model of several directions")
    parser.add_argument(
        "--target_lang_column",
        type=int,
        choices=(1, 2),
        help="the input has two columns separated by a tab; this one is each line's language to translate into",
    )
    parser.add_argument(
        "--batch_tokens",
        type=int,
        default=4096,
        help="maximum source tokens of a batch, padding included (default: 4096)",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=8192,
        help="number of lines read, sorted by length and written together (default: 8192)",
    )
    parser.add_argument("--num_beams", type=int, help="beam size (default: the model's)")
    parser.add_argument("--length_penalty", type=float, help="transformers' length_penalty (default: the model's)")
    parser.add_argument(
        "--max_new_tokens", type=int, help="maximum length of a translation in tokens (default: the model's)"
    )
    parser.add_argument(
        "--n_best",
        type=int,
        metavar="N",
        help="write the N best as `number ||| translation ||| score`; numbers start at 0",
    )
    parser.add_argument("--scores", action="store_true", help="write `score<TAB>translation`")
    parser.add_argument(
        "--compute_type",
        choices=("float32", "bfloat16", "int8"),
        help="type of the computation (default: the model's dtype)",
    )
    parser.add_argument(
        "--compiled", action="store_true", default=None, help="fail if the compiled engine cannot be used"
    )
    return parser


def main(argv: list[str]) -> None:
    """Checks, counts, loads, translates, writes."""
    arguments = build_parser().parse_args(argv)
    # Imported here to keep --help fast.
    import torch
    from accelerate import PartialState

    from vanilla_transformer.training.data.reading.formats import read_sources

    processes = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    refuse_impossible(arguments, processes.num_processes)
    total = None
    if processes.is_main_process and os.path.isfile(arguments.input):
        # Reports faults of the file before anything is translated.
        total = own_lines(
            sum(1 for _ in read_sources(arguments.input, arguments.source_column)), arguments.window, processes
        )
    translator = Translator(arguments, total, processes)
    # Closes the progress bar before any message, also before an error.
    with translator.progress:
        unfinished = write_stream(translator) if arguments.output == "-" else write_file(translator, processes)
    warn(*unfinished)


def refuse_impossible(arguments: argparse.Namespace, num_processes: int) -> None:
    """
    Raises:
        UserError: an option is invalid, excludes another, or there is nothing to read from or write to.
    """
    from vanilla_transformer.training.errors import UserError
    from vanilla_transformer.training.files import make_sure_of_file
    from vanilla_transformer.training.settings.rules import check_numbers

    check_numbers(arguments, UserError)
    if arguments.output != "-":
        make_sure_of_file("output", arguments.output)
    if num_processes > 1 and (arguments.output == "-" or not os.path.isfile(arguments.input)):
        raise UserError(f"{num_processes} processes cannot share standard streams: name files by --input and --output")
    # Python's original streams: run_program replaces closed ones.
    for name, stream in (("input", sys.__stdin__), ("output", sys.__stdout__)):
        if getattr(arguments, name) == "-" and stream is None:
            raise UserError(f"the standard {name} is closed: name a file by --{name}")


def own_lines(count: int, window: int, processes: Any) -> int:
    """How many of `count` lines are in this process's windows."""
    starts = range(processes.process_index * window, count, processes.num_processes * window)
    return sum(min(window, count - start) for start in starts)


def windows(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yields `size` lines at a time; holds no more in memory."""
    lines = iter(lines)
    return iter(lambda: list(islice(lines, size)), [])


def split_columns(lines: list[str], column: int, place: Callable[[int], str]) -> tuple[list[str], list[str]]:
    """
    Splits lines of two columns.

    Args:
        column: the one, 1 or 2, that holds the languages. The other holds the texts.
        place: what an error calls the line of a number, from 1.

    Returns:
        The languages and the texts; both are empty for a blank line.

    Raises:
        DataError: a line has another number of columns.
    """
    from vanilla_transformer.training.errors import DataError

    rows = [line.split("\t") if line.strip() else ["", ""] for line in lines]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise DataError(f"{place(number)} has {len(row)} columns, but --target_lang_column needs two, with a tab")
    return [row[column - 1] for row in rows], [row[2 - column] for row in rows]


class Translator:
    """
    Translates windows of lines with the command line's settings, and shows the progress.

    Args:
        arguments: the command line.
        total: number of lines that this process translates, if known.
        processes: accelerate's state.

    Raises:
        UserError: the model does not exist, it gives no scores, or this machine does not support the compute_type.
    """

    def __init__(self, arguments: argparse.Namespace, total: int | None, processes: Any):
        from tqdm.auto import tqdm

        from vanilla_transformer.tokenization_languages import multilingual
        from vanilla_transformer.training.errors import UserError
        from vanilla_transformer.training.saved_model import load_model
        from vanilla_transformer.training.translator import engine_for

        self.arguments = arguments
        self.model, self.tokenizer = load_model(arguments.model)
        self.options = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
        languages = {"src_lang": arguments.source_lang, "tgt_lang": arguments.target_lang}
        self.languages = {name: code for name, code in languages.items() if code is not None}
        if arguments.target_lang and arguments.target_lang_column:
            raise UserError(
                f"target_lang={arguments.target_lang} and target_lang_column are both given: leave one of them out"
            )
        if arguments.target_lang_column and not multilingual(self.tokenizer):
            raise UserError("target_lang_column is given, but the model translates in one direction only")
        self.with_scores = arguments.scores or arguments.n_best is not None
        beams = self.options.get("num_beams", self.model.generation_config.num_beams or 1)
        if self.with_scores and beams < 2:
            raise UserError(f"num_beams={beams} gives no scores: --scores and --n_best need --num_beams 2 or more")
        if (arguments.n_best or 1) > beams:
            raise UserError(f"--n_best {arguments.n_best} is more than num_beams={beams}: raise --num_beams")
        # What the model or this machine does not support is reported before anything is translated.
        try:
            if self.languages:
                self.tokenizer("", **self.languages)
            engine_for(self.model, **self.options)
        except ValueError as error:
            raise UserError(str(error)) from error
        # With several processes, the first shows its own progress times their number.
        self.progress = tqdm(
            total=total,
            desc="translating",
            unit="lines",
            unit_scale=processes.num_processes if processes.num_processes > 1 else False,
            disable=None if processes.is_main_process else True,
            # Long lines come first in each window, so only the mean speed predicts the remaining time.
            smoothing=0,
        )

    def lines(self) -> Iterator[list[str]]:
        """The windows of the input."""
        from vanilla_transformer.training.data.reading.formats import read_sources

        return windows(read_sources(self.arguments.input, self.arguments.source_column), self.arguments.window)

    def translate(self, number: int, lines: list[str]) -> tuple[str, list[int]]:
        """
        Translates window `number`, counted from 0.

        Returns:
            The text to write, and the numbers, from 1, of the lines whose best translation reached the maximum length.

        Raises:
            DataError: a line has more tokens than learned positions, or has no language that the model knows.
        """
        from vanilla_transformer.training.translator import encode, translate_rows

        name = "standard input" if self.arguments.input == "-" else self.arguments.input
        first = number * self.arguments.window

        def place(line: int) -> str:
            return f"{name}, line {first + line}"

        languages: str | list[str] | None = self.arguments.target_lang
        if self.arguments.target_lang_column:
            languages, lines = split_columns(lines, self.arguments.target_lang_column, place)
            # A blank text needs no language, and stays blank.
            some = self.tokenizer.languages[0]
            languages = [code if text.strip() else some for code, text in zip(languages, lines, strict=True)]
        rows = encode(self.model, self.tokenizer, lines, place, languages)
        found = translate_rows(
            self.model,
            self.tokenizer,
            rows,
            self.arguments.batch_tokens,
            n_best=self.arguments.n_best or 1,
            scores=self.with_scores,
            progress=self.progress.update,
            **self.options,
        )
        text = "".join(self._format(line, hypotheses) for line, hypotheses in enumerate(found, first))
        return text, [line for line, hypotheses in enumerate(found, first + 1) if not hypotheses[0].ended]

    def _format(self, line: int, hypotheses: list) -> str:
        # A line feed generated by the model would shift all following lines.
        texts = [hypothesis.text.replace("\n", " ") for hypothesis in hypotheses]
        if not self.with_scores:
            return f"{texts[0]}\n"
        scored = [(text, f"{hypothesis.score:.6f}") for text, hypothesis in zip(texts, hypotheses, strict=True)]
        if self.arguments.n_best is None:
            return "".join(f"{score}\t{text}\n" for text, score in scored)
        return "".join(f"{line} ||| {text} ||| {score}\n" for text, score in scored)

    def skip(self, count: int) -> None:
        """Counts lines that were translated earlier, without counting them for the speed."""
        if not self.progress.disable:
            self.progress.initial += count
            self.progress.n += count
            self.progress.refresh()

    def settings(self) -> dict[str, Any]:
        """Everything that decides the output: the same settings give the same lines."""
        import torch

        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
        digest.update(self.model.generation_config.to_json_string().encode())
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        return {"model": digest.hexdigest()} | {name: getattr(self.arguments, name) for name in SETTINGS}


def write_stream(translator: Translator) -> tuple[int, list[int]]:
    """Prints each window. Returns how many translations reached the maximum length, and their first line numbers."""
    from .parts import NAMED

    count, first = 0, list[int]()
    for number, lines in enumerate(translator.lines()):
        text, unfinished = translator.translate(number, lines)
        sys.stdout.buffer.write(text.encode())
        sys.stdout.flush()
        count, first = count + len(unfinished), (first + unfinished)[:NAMED]
    return count, first


def write_file(translator: Translator, processes: Any) -> tuple[int, list[int]]:
    """
    Writes this process's windows, except those already done. The main process then joins all of them.

    Returns:
        As write_stream in the main process; (0, []) in the others.

    Raises:
        UserError: the existing parts are from another translation.
    """
    from .parts import Parts

    parts = Parts(Path(translator.arguments.output))
    if processes.is_main_process:
        parts.begin(translator.settings())
    processes.wait_for_everyone()
    parts.lock()
    number = -1
    for number, lines in enumerate(translator.lines()):
        if number == 0:
            parts.refuse_other_input(lines, translator.arguments.input)
        if number % processes.num_processes != processes.process_index:
            continue
        if parts.has(number, lines):
            translator.skip(len(lines))
        else:
            parts.write(number, lines, *translator.translate(number, lines))
    processes.wait_for_everyone()
    return parts.join(number + 1) if processes.is_main_process else (0, [])


def warn(count: int, first: list[int]) -> None:
    """Warns of translations that may have been cut."""
    if count:
        lines = ", ".join(map(str, first)) + (", ..." if count > len(first) else "")
        print(
            f"warning: {count} of the translations reached the maximum length and may be cut (lines {lines}): raise "
            "--max_new_tokens, or look at these lines",
            file=sys.stderr,
        )

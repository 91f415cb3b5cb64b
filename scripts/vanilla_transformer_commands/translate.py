"""Translates a file or the standard input, line by line: `vanilla-transformer translate MODEL --input FILE`.

The input may be of any length: a window of lines at a time is read, translated in batches of similar length, and
written in its own order. An empty line stays empty.

With --output FILE each finished window is kept in FILE.parts until all are joined, so that the same command goes on
where an earlier one was stopped, by whatever. Several processes share the windows, and their number may change in
between, as --batch_tokens may: `accelerate launch -m vanilla_transformer_commands translate MODEL ...`.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from .parser import CommandParser


# What `generate()` is told, where it is given.
OPTIONS = ("num_beams", "length_penalty", "max_new_tokens", "compute_type", "compiled")
# What a translation that goes on must have in common with its beginning.
SETTINGS = (*OPTIONS, "n_best", "scores", "window")
# The processes wait for the slowest of them: as long as that takes.
PATIENCE = timedelta(days=365)


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(__doc__)
    parser.add_argument("model", help="folder or Hub name of a trained model")
    parser.add_argument("--input", default="-", help="text file, plain or .gz (default: standard input)")
    parser.add_argument("--output", default="-", help="text file to write (default: standard output)")
    parser.add_argument(
        "--batch_tokens", type=int, default=4096, help="source tokens of lines translated together (default: 4096)"
    )
    parser.add_argument(
        "--window", type=int, default=8192, help="lines read, sorted by length and written together (default: 8192)"
    )
    parser.add_argument("--num_beams", type=int, help="width of the beam (default: the model's own)")
    parser.add_argument("--length_penalty", type=float, help="transformers' length_penalty (default: the model's own)")
    parser.add_argument("--max_new_tokens", type=int, help="longest translation in tokens (default: the model's own)")
    parser.add_argument(
        "--n_best", type=int, metavar="N", help="write N lines for each, `number ||| translation ||| score`, from 0"
    )
    parser.add_argument("--scores", action="store_true", help="write `score<TAB>translation`")
    parser.add_argument(
        "--compute_type", choices=("float32", "bfloat16", "int8"), help="type to compute in (default: the model's own)"
    )
    parser.add_argument(
        "--compiled", action="store_true", default=None, help="refuse to go on without the compiled program"
    )
    return parser


def main(argv: list[str]) -> None:
    """Checks, counts, loads, translates, writes."""
    arguments = build_parser().parse_args(argv)
    # Imported here, so that --help answers at once.
    import torch
    from accelerate import PartialState

    from vanilla_transformer.training.data.pairs import read_lines

    processes = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    refuse_impossible(arguments, processes.num_processes)
    total = None
    if processes.is_main_process and os.path.isfile(arguments.input):
        # What is wrong with the file is said before anything is translated.
        total = own_lines(sum(1 for _ in read_lines(arguments.input)), arguments.window, processes)
    translator = Translator(arguments, total, processes)
    # Its bar ends before anything is said, an error too.
    with translator.progress:
        unfinished = write_stream(translator) if arguments.output == "-" else write_file(translator, processes)
    warn(*unfinished)
    processes.destroy_process_group()


def refuse_impossible(arguments: argparse.Namespace, num_processes: int) -> None:
    """
    Raises:
        UserError: an option has no sense, or does not go with the others; or there is nowhere to read from or write to.
    """
    from vanilla_transformer.training.errors import UserError
    from vanilla_transformer.training.files import make_sure_of_file
    from vanilla_transformer.training.settings.rules import check_numbers

    check_numbers(arguments, UserError)
    if arguments.output != "-":
        make_sure_of_file("output", arguments.output)
    if num_processes > 1 and (arguments.output == "-" or not os.path.isfile(arguments.input)):
        raise UserError(f"{num_processes} processes read and write in turn: name files by --input and --output")
    # Python's own streams: a program gives those that are closed others in their place.
    for name, stream in (("input", sys.__stdin__), ("output", sys.__stdout__)):
        if getattr(arguments, name) == "-" and stream is None:
            raise UserError(f"the standard {name} is closed: name a file by --{name}")


def own_lines(count: int, window: int, processes: Any) -> int:
    """How many lines of `count` are in the windows of this process."""
    starts = range(processes.process_index * window, count, processes.num_processes * window)
    return sum(min(window, count - start) for start in starts)


def windows(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """So many lines at a time; no more are held."""
    lines = iter(lines)
    return iter(lambda: list(islice(lines, size)), [])


class Translator:
    """
    A model that translates windows of lines as the command line says, and shows how far it is.

    Args:
        arguments: the command line.
        total: lines that this process translates, if that is known.
        processes: accelerate's state.

    Raises:
        UserError: there is no such model, it gives no scores, or this machine cannot compute as is asked for.
    """

    def __init__(self, arguments: argparse.Namespace, total: int | None, processes: Any):
        import torch
        from tqdm.auto import tqdm

        from vanilla_transformer.training.errors import UserError
        from vanilla_transformer.training.saved_model import load_model

        self.arguments = arguments
        self.model, self.tokenizer = load_model(arguments.model)
        self.options = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
        self.with_scores = arguments.scores or arguments.n_best is not None
        beams = self.options.get("num_beams", self.model.generation_config.num_beams or 1)
        if self.with_scores and beams < 2:
            raise UserError(f"num_beams={beams} gives no scores: --scores and --n_best need --num_beams 2 or more")
        if (arguments.n_best or 1) > beams:
            raise UserError(f"--n_best {arguments.n_best} is more than num_beams={beams} find: raise --num_beams")
        # What this machine cannot do is said before anything is translated.
        try:
            token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            mask = torch.ones_like(token)  # whichever it is, it is no padding
            self.model.generate(token, attention_mask=mask, **{**self.options, "max_new_tokens": 1})
        except ValueError as error:
            raise UserError(str(error)) from error
        # Of several processes the first one shows its share, times their number.
        self.progress = tqdm(
            total=total,
            desc="translating",
            unit="lines",
            unit_scale=processes.num_processes if processes.num_processes > 1 else False,
            disable=None if processes.is_main_process else True,
            # Long lines come first in each window: only the mean speed tells the time that is left.
            smoothing=0,
        )

    def lines(self) -> Iterator[list[str]]:
        """The windows of the input."""
        from vanilla_transformer.training.data.pairs import read_lines

        return windows(read_lines(self.arguments.input), self.arguments.window)

    def translate(self, number: int, lines: list[str]) -> tuple[str, list[int]]:
        """
        Translates the window of this number, from 0.

        Returns:
            What to write, and the numbers, from 1, of the lines whose best translation ran into the greatest length.

        Raises:
            DataError: a line is longer than learned positions reach.
        """
        from vanilla_transformer.training.translator import encode, translate_rows

        name = "standard input" if self.arguments.input == "-" else self.arguments.input
        first = number * self.arguments.window
        rows = encode(self.model, self.tokenizer, lines, lambda line: f"{name}, line {first + line}")
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
        # A line is a line: a line feed that the model wrote would shift all that follow.
        texts = [hypothesis.text.replace("\n", " ") for hypothesis in hypotheses]
        if not self.with_scores:
            return f"{texts[0]}\n"
        scored = [(text, f"{hypothesis.score:.6f}") for text, hypothesis in zip(texts, hypotheses, strict=True)]
        if self.arguments.n_best is None:
            return "".join(f"{score}\t{text}\n" for text, score in scored)
        return "".join(f"{line} ||| {text} ||| {score}\n" for text, score in scored)

    def skip(self, count: int) -> None:
        """Lines that were translated before: they count, but not for the speed."""
        if not self.progress.disable:
            self.progress.initial += count
            self.progress.n += count
            self.progress.refresh()

    def settings(self) -> dict[str, Any]:
        """All that decides what is written for a line: the same settings give the same lines."""
        import torch

        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
        digest.update(self.model.generation_config.to_json_string().encode())
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        return {"model": digest.hexdigest()} | {name: getattr(self.arguments, name) for name in SETTINGS}


def write_stream(translator: Translator) -> tuple[int, list[int]]:
    """Prints each window; returns how many lines ran into the greatest length, and the first of them."""
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
    Writes this process's windows, but for those that are there; the main process then joins all of them.

    Returns:
        As write_stream; nothing where this is not the main process.

    Raises:
        UserError: what was begun there is not the beginning of this.
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
    """Tells of translations that may have been cut."""
    if count:
        lines = ", ".join(map(str, first)) + (", ..." if count > len(first) else "")
        print(
            f"warning: {count} of the translations did not end before the greatest length (lines {lines}): raise "
            "--max_new_tokens, or look at these lines",
            file=sys.stderr,
        )

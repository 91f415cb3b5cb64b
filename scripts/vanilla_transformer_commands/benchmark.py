"""Measures this package beside its peers on this machine: `vanilla-transformer benchmark train`, or `decode`.

`train` compares training with transformers' MarianMTModel under its stock Seq2SeqTrainer and with Marian, the C++
program, at the same size. `decode` compares translating, on the CPU, with transformers' own search, with MarianMTModel,
with Marian and with CTranslate2. Contenders take turns, each in a process of its own, so that a machine whose speed
varies treats them alike. Those that this machine lacks, or has no instructions for, are left out by name. Memory is
read from /proc: Linux only. What is measured, and why so, is in docs/benchmarks.md.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .parser import CommandParser


class Cell(NamedTuple):
    """One size to compare at: a recipe, and how many updates warm a contender up and make a round."""

    recipe: list[str]
    warmup: int
    updates: int


# Random text: 64 sentences an update (on a GPU four times as many), each of 32 tokens on both sides.
SENTENCES, LENGTH, GPU_FACTOR = 64, 32, 4
RANDOM_TEXT = ["--vocab_size", "16000", "--per_device_train_batch_tokens", str(SENTENCES * LENGTH)]
CELLS = {
    # This budget makes updates of about 3,900 target tokens.
    "tiny": Cell(["multi30k_en_de_tiny.yaml", "--per_device_train_batch_tokens", "4608"], warmup=5, updates=10),
    "base": Cell(["wmt14_en_de_base.yaml", *RANDOM_TEXT], warmup=1, updates=2),
    "big": Cell(["wmt14_en_de_big.yaml", *RANDOM_TEXT], warmup=1, updates=2),
}
# Only training is measured, update by update.
TRAINING_ALONE = shlex.split(
    "--gradient_accumulation_steps 1 --eval_strategy no --load_best_model_at_end false "
    "--report_to none --disable_tqdm true --logging_steps 10"
)
MULTI30K = "Multi30k (https://github.com/multi30k/dataset): name its folder by --multi30k_dir or MULTI30K_DIR"
# What the peer's Trainer is told as ours is. All else is stock.
SHARED_ARGUMENTS = (
    "output_dir", "max_steps", "seed", "bf16", "torch_compile", "use_cpu", "dataloader_pin_memory", "optim",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay",
    "max_grad_norm", "logging_steps", "save_strategy", "report_to", "disable_tqdm",
)  # fmt: skip
SHARED_SIZES = (
    "vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads",
    "encoder_ffn_dim", "decoder_ffn_dim", "activation_function", "dropout", "attention_dropout", "activation_dropout",
    "scale_embedding", "max_position_embeddings", "pad_token_id", "eos_token_id", "decoder_start_token_id",
)  # fmt: skip
MATMUL_SECONDS = 0.5
# The program is not a package that scripts can ask for its progress: it logs each update.
MARIAN_UPDATE = re.compile(r"Up\. (\d+) : Sen\. [\d,]+ : Cost \S+ \* ([\d,]+) @")

# `decode`: width of the beam and sentences that are translated together.
SEARCHES = {"1x1": (1, 1), "4x1": (4, 1), "4x16": (4, 16), "1x32": (1, 32), "4x64": (4, 64)}
# With --memory: other source lengths and beams, a few new tokens.
MEMORY_LENGTHS, MEMORY_BEAMS, MEMORY_BATCH, MEMORY_NEW_TOKENS = (32, 128, 512), (1, 4, 8), 8, 8
# Of a test set, cells of one sentence at a time translate only the first, and the largest cell has its BLEU measured.
SPEED_SENTENCES, BLEU_CELL = 100, "4x64"


class Contender(NamedTuple):
    """Who works, and how. `same_batches` gives the peer our batches instead of those that its Trainer makes."""

    side: str
    dtype: str
    compiled: bool = False
    same_batches: bool = False

    def __str__(self) -> str:
        extras = [", compiled"] * self.compiled + [", our batches"] * self.same_batches
        return f"{self.side} {self.dtype}{''.join(extras)}"


DECODERS = {
    str(contender): contender
    for contender in (
        *(Contender("ours", dtype) for dtype in ("float32", "bfloat16", "int8")),
        *(Contender("ours", dtype, compiled=True) for dtype in ("float32", "int8")),
        Contender("stock", "float32"),
        *(Contender("MarianMTModel", dtype) for dtype in ("float32", "bfloat16")),
        *(Contender("Marian C++", dtype) for dtype in ("float32", "intgemm8", "packed8")),
        *(Contender("ctranslate2", dtype) for dtype in ("float32", "int8")),
    )
}
# What the others' speed is divided by: the fastest of these.
PEERS = {
    "CTranslate2 int8": ["ctranslate2 int8"],
    "CTranslate2 float32": ["ctranslate2 float32"],
    "MarianMTModel": ["MarianMTModel float32", "MarianMTModel bfloat16"],
    "Marian C++": ["Marian C++ float32", "Marian C++ intgemm8", "Marian C++ packed8"],
}
# Bytes of a weight, and the type that the machine's rate of products is measured in.
TYPES = {
    "float32": (4, "float32"),
    "bfloat16": (2, "bfloat16"),
    "int8": (1, "int8"),
    "intgemm8": (1, "int8"),
    "packed8": (1, "int8"),
}


def build_parser() -> CommandParser:
    """The options. Words that none of them knows are fields of a recipe."""
    parser = CommandParser(__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True)

    def add_command(name: str, about: str, command: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        after = "Any field of a recipe may follow, as in training, e.g. --d_model 64; the peers get the same size."
        added = commands.add_parser(name, help=about, description=f"{about}.", epilog=after, allow_abbrev=False)
        added.set_defaults(command=command)
        folder = os.environ.get("MULTI30K_DIR")
        added.add_argument("--multi30k_dir", default=folder, help="folder of Multi30k (default: $MULTI30K_DIR)")
        added.add_argument("--rounds", type=positive, default=5, help="turns of each contender (default: 5)")
        added.add_argument("--threads", type=positive, help="CPU threads (default: one for each core)")
        added.add_argument("--output", help="write everything measured here as JSON")
        return added

    train = add_command("train", "compares training with MarianMTModel and Marian C++", compare_training)
    train.add_argument("--cells", nargs="+", choices=list(CELLS), help="sizes (default: tiny base; on a GPU big too)")
    train.add_argument("--updates", type=positive, help="updates in a turn (default: tiny 10, base and big 2)")
    train.add_argument("--warmup", type=positive, help="updates before the first (default: tiny 5, base and big 1)")
    train.add_argument("--preload", help="LD_PRELOAD of ours: an allocator, e.g. libtcmalloc_minimal.so.4")
    train.add_argument(
        "--loss_tokens", type=positive, help="compare tiny's losses after so many target tokens instead of the speed"
    )
    decode = add_command("decode", "compares translating with transformers, Marian and CTranslate2", compare_decoding)
    decode.add_argument(
        "--cells", nargs="+", choices=list(SEARCHES), help="beams x sentences in a batch (default: all)"
    )
    decode.add_argument("--contenders", nargs="+", choices=list(DECODERS), help="who takes part (default: all)")
    decode.add_argument("--model", help="a trained model, which translates Multi30k's test set instead of random text")
    decode.add_argument(
        "--memory", action="store_true", help="compare the memory of ours and stock at other source lengths and beams"
    )
    return parser


def main(argv: list[str]) -> None:
    """Measures what the command line asks for."""
    options, fields = build_parser().parse_known_args(argv)
    options.fields = fields
    options.command(options)


def positive(text: str) -> int:
    """A whole number above 0."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def compare_training(options: argparse.Namespace) -> None:
    """`train`: measures every cell, prints a table of each, and writes the JSON."""
    import torch

    from vanilla_transformer.training.errors import UserError
    from vanilla_transformer.training.machine import machine

    # 1. what to do; what is wrong is said before anything is measured
    check_machine(options)
    everything = ["tiny"] if options.loss_tokens else ["tiny", "base"] + ["big"] * torch.cuda.is_available()
    cells = options.cells or everything
    if options.loss_tokens and cells != ["tiny"]:
        raise UserError("--loss_tokens compares the losses of tiny, which has real text: leave --cells out")
    if "tiny" in cells and not options.multi30k_dir:
        raise UserError(f"the cell tiny needs {MULTI30K}, or leave the cell out by --cells base")
    check_preload(options.preload)
    recipes = {name: recipe_of(name, options) for name in cells}

    # 2. measurements
    results = about_this_run(options, machine())
    found = leave_out(contenders(of_losses=bool(options.loss_tokens)), why_not_trained)
    measure, show = (compare_losses, loss_table) if options.loss_tokens else (compare_speed, speed_table)
    for name, recipe in recipes.items():
        with tempfile.TemporaryDirectory() as folder:
            prepare(recipe, Path(folder))
            results["cells"][name] = measure(name, recipe, Path(folder), options, found)
        tell(name, show(results["cells"][name]), results, options)


def check_machine(options: argparse.Namespace) -> None:
    """Raises UserError if nothing can be measured or written here, and sets the number of threads."""
    import torch

    from vanilla_transformer.training.errors import UserError
    from vanilla_transformer.training.report import make_sure_of_file

    if sys.platform != "linux":
        raise UserError(f"memory is read from /proc, which {sys.platform} has not: run this on Linux")
    if options.output:
        make_sure_of_file("output", options.output)
    cores = len(os.sched_getaffinity(0))
    options.threads = options.threads or cores
    if options.threads > cores:
        raise UserError(f"threads={options.threads} would wait for each other: this process has {cores} cores")
    torch.set_num_threads(options.threads)


def check_preload(library: str | None) -> None:
    """Raises UserError if the loader finds no such library: it only warns, and goes on without it."""
    from vanilla_transformer.training.errors import UserError

    environment = {**os.environ, "LD_PRELOAD": library or ""}
    loaded = subprocess.run([sys.executable, "-S", "-c", ""], env=environment, capture_output=True)
    if warning := loaded.stderr.decode(errors="replace").strip():
        raise UserError(f"preload={library}: {warning.splitlines()[0]}")


def tell(name: str, table: str, results: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints a cell's table and writes the JSON: a long run that is stopped keeps what it has measured."""
    from vanilla_transformer.training.report import write_beside

    print(f"\n{name}\n{table}", flush=True)
    if options.output:
        write_beside(options.output, json.dumps(results, indent=1) + "\n")


def recipe_of(name: str, options: argparse.Namespace) -> list[str]:
    """The cell's command line for `training.train`, with the user's fields last. Raises UserError if it is wrong."""
    import torch

    recipe = [*CELLS[name].recipe, *TRAINING_ALONE]
    if name == "tiny":
        recipe += ["--data_dir", options.multi30k_dir]
    elif torch.cuda.is_available():
        recipe += ["--per_device_train_batch_tokens", str(GPU_FACTOR * SENTENCES * LENGTH)]
    recipe += options.fields
    parse(recipe)
    return recipe


def parse(argv: list[str]) -> Any:
    """The recipe, without checkpoints and without what the peer's Trainer has not."""
    from transformers.trainer_utils import SaveStrategy

    from vanilla_transformer.training.arguments import parse_recipe

    recipe = parse_recipe(argv)
    # Not by --save_strategy: a recipe that averages checkpoints would be refused.
    recipe.training.save_strategy = SaveStrategy.NO
    recipe.training.ema_decay, recipe.training.r_drop_alpha, recipe.data.bpe_dropout = None, 0.0, 0.0
    return recipe


def about_this_run(options: argparse.Namespace, machine: str) -> dict[str, Any]:
    """What a reader needs in order to repeat it. The machine and torch's version are printed."""
    packages = ["vanilla-transformer", "torch", "transformers", "datasets", "accelerate"]
    packages += [name for name in ("ctranslate2", "pymarian") if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(f"{machine}; torch {versions['torch']}", flush=True)
    return {
        "machine": machine,
        "threads": options.threads,
        "versions": {"python": platform.python_version(), **versions},
        "command": shlex.join(["python", *sys.argv]),
        "cells": {},
    }


def leave_out(found: Sequence[Contender], why_not: Callable[[Contender], str | None]) -> list[Contender]:
    """
    Those that this machine can measure. The others are printed, each with the reason.

    Raises:
        UserError: none is left.
    """
    from vanilla_transformer.training.errors import UserError

    reasons = {contender: why_not(contender) for contender in found}
    for contender, reason in reasons.items():
        if reason:
            print(f"left out: {contender}: {reason}", flush=True)
    if all(reasons.values()):
        raise UserError("no contender is left")
    return [contender for contender, reason in reasons.items() if not reason]


def why_not_trained(contender: Contender) -> str | None:
    """Why this machine does not train like this, in words; None if it does."""
    import torch

    from vanilla_transformer.inference_vanilla_transformer import is_native

    if contender.side == "Marian C++":
        return "it would have the CPU where the others have the GPU" if torch.cuda.is_available() else why_no_marian()
    if torch.cuda.is_available() or is_native(contender.dtype, torch.device("cpu")):
        return None
    return f"this processor has no instructions for {contender.dtype}, and emulates them"


def why_not_translated(contender: Contender) -> str | None:
    """Why this machine does not translate like this, in words; None if it does."""
    import torch

    from vanilla_transformer.inference_vanilla_transformer import is_native

    if contender.side == "ctranslate2":
        return why_no_ctranslate2(contender.dtype)
    if contender.side == "Marian C++":
        avx2 = torch.cpu.get_capabilities().get("avx2")
        return "it needs AVX2" if contender.dtype == "packed8" and not avx2 else why_no_marian()
    if contender.compiled:
        return why_no_program()
    if not is_native(contender.dtype, torch.device("cpu")):
        return f"torch has no fast product for {contender.dtype} on this processor"
    return None


def why_no_marian() -> str | None:
    """None where Marian is installed."""
    return None if importlib.util.find_spec("pymarian") else "pip install pymarian (a download of 600 MB)"


def why_no_ctranslate2(compute_type: str) -> str | None:
    """None where CTranslate2 is installed and computes so."""
    if importlib.util.find_spec("ctranslate2") is None:
        return "pip install '.[bench]'"
    import ctranslate2

    found = ctranslate2.get_supported_compute_types("cpu")
    return None if compute_type in found else f"CTranslate2 has only {', '.join(sorted(found))} on this processor"


def why_no_program() -> str | None:
    """None where the compiled program can be had, which is compiled if need be."""
    from vanilla_transformer.program_vanilla_transformer import ProgramError, load

    try:
        load()
    except ProgramError as error:
        return str(error)
    return None


def prepare(argv: list[str], folder: Path) -> None:
    """Writes the tokenizer and rows of ids that every contender reads."""
    import datasets

    from vanilla_transformer.training.data import load_pairs, tokenize_pairs
    from vanilla_transformer.training.train import learn_tokenizer

    datasets.disable_progress_bars()
    recipe = parse(argv)
    if recipe.data.dataset:
        # The recipe's own data is too large to fetch for a measurement of speed.
        tokenizer, rows = random_text(recipe.tokenizer.vocab_size)
    else:
        recipe.data.test_file = None
        pairs = load_pairs(recipe.data)
        tokenizer = learn_tokenizer(recipe, pairs)
        rows = {split: tokenize_pairs(pairs[split], tokenizer, recipe.data, split) for split in pairs}
    tokenizer.save_pretrained(folder / "tokenizer")
    for split in rows:
        rows[split].save_to_disk(folder / split)


def random_text(vocab_size: int) -> tuple[Any, dict[str, Any]]:
    """A tokenizer of `vocab_size` words, and rows of `LENGTH` random tokens on both sides, the last of them eos."""
    from datasets import Dataset

    from vanilla_transformer.training.data import ENCODED

    tokenizer, rows = word_tokenizer(vocab_size), 8 * GPU_FACTOR * SENTENCES
    columns = {name: random_ids(tokenizer, rows, LENGTH) for name in ENCODED}
    return tokenizer, {"train": Dataset.from_dict(columns, features=ENCODED)}


def word_tokenizer(vocab_size: int) -> Any:
    """A tokenizer of `vocab_size` words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from vanilla_transformer.tokenization_vanilla_transformer import SPECIAL_TOKENS

    words = [*SPECIAL_TOKENS.values(), *(f"w{number}" for number in range(len(SPECIAL_TOKENS), vocab_size))]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **SPECIAL_TOKENS)


def random_ids(tokenizer: Any, rows: int, length: int) -> list[list[int]]:
    """Rows of random tokens, the last of them eos."""
    import torch

    ids = torch.randint(len(tokenizer.all_special_ids), len(tokenizer), (rows, length))
    ids[:, -1] = tokenizer.eos_token_id
    return ids.tolist()


class Worker:
    """A contender's process. It takes one step for each `go()`, and reports it in one line of JSON."""

    def __init__(self, job: dict[str, Any], threads: int, **environment: str):
        self.log = log = Path(job["folder"]) / f"{Contender(*job['contender'])}.log"
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
            )
        self.send(json.dumps(job))

    def send(self, line: str) -> None:
        """One line to the process. That it may have ended is found when its answer is read."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def go(self) -> dict[str, Any]:
        """Lets the process take its next step, and waits for the report."""
        self.send("")
        return self.report()

    def report(self) -> dict[str, Any]:
        """The next report. Raises UserError with the process's last words if it has ended."""
        from vanilla_transformer.training.errors import UserError

        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        last_words = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise UserError(f"a contender ended with status {self.process.wait()}:\n{last_words}")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def contenders(of_losses: bool) -> list[Contender]:
    """Who may be compared by speed, on a GPU compiled too; or by losses."""
    import torch

    both = "ours", "MarianMTModel"
    if of_losses:
        ours = [Contender("ours", dtype) for dtype in ("bfloat16", "float32")]
        return [*ours, *(Contender("MarianMTModel", "float32", same_batches=same) for same in (False, True))]
    found = [Contender(side, dtype) for dtype in ("bfloat16", "float32") for side in both]
    if torch.cuda.is_available():
        found += [Contender(side, "bfloat16", compiled=True) for side in both]
    return [*found, Contender("Marian C++", "float32")]


def start(
    contender: Contender, recipe: list[str], folder: Path, options: argparse.Namespace, max_steps: int, **orders: int
) -> Worker:
    """A worker that trains as `contender` does."""
    bf16 = contender.dtype == "bfloat16"
    told = {"output_dir": folder, "max_steps": max_steps, "bf16": bf16, "torch_compile": contender.compiled}
    argv = recipe + [word for name, value in told.items() for word in (f"--{name}", str(value))]
    job = {"recipe": argv, "folder": str(folder), "contender": contender, "orders": orders, "threads": options.threads}
    preloaded = contender.side == "ours" and options.preload
    return Worker(job, options.threads, **({"LD_PRELOAD": options.preload} if preloaded else {}))


def take_turns(
    cell: str, starts: Sequence[Callable[[], Worker]], rounds: int, before_round: Callable[[], None] = lambda: None
) -> list[list[dict[str, Any]]]:
    """The reports of each worker: one after it has warmed up, and one of each round, in which it takes its turn."""
    from tqdm.auto import tqdm

    turns = (rounds + 1) * len(starts)
    with ExitStack() as stack, tqdm(total=turns, desc=f"{cell}, warming up", unit="turns", disable=None) as progress:
        workers, reports = [], []
        for begin in starts:
            workers.append(stack.enter_context(begin()))
            # One after the other here too: two at a time would be slow, and short of memory.
            reports.append([workers[-1].report()])
            progress.update()
        for number in range(rounds):
            progress.set_description(f"{cell}, round {number + 1}")
            before_round()
            for worker, reported in zip(workers, reports, strict=True):
                reported.append(worker.go())
                progress.update()
    return reports


def why_not_held(argv: list[str], folder: Path, contender: Contender) -> str | None:
    """What of the recipe's network Marian C++ does not have, in words; None if it has all."""
    from transformers import AutoTokenizer

    from vanilla_transformer.conversion.marian_npz import marian_options
    from vanilla_transformer.training.train import build_model

    if contender.side != "Marian C++":
        return None
    try:
        marian_options(build_model(parse(argv), AutoTokenizer.from_pretrained(folder / "tokenizer")).config)
    except ValueError as error:
        return str(error)
    return None


def compare_speed(
    cell: str, recipe: list[str], folder: Path, options: argparse.Namespace, found: list[Contender]
) -> dict[str, Any]:
    """Rounds in which each contender takes its turn after the machine's ceilings are measured."""
    warmup, updates = options.warmup or CELLS[cell].warmup, options.updates or CELLS[cell].updates
    orders = {"max_steps": warmup + options.rounds * updates, "warmup": warmup, "updates": updates}
    found = leave_out(found, partial(why_not_held, recipe, folder))
    # Batches of many shapes would be compiled again and again.
    found = [contender for contender in found if not (contender.compiled and cell == "tiny")]
    ceilings: dict[str, list[float]] = {contender.dtype: [] for contender in found}

    def measure_ceilings() -> None:
        for dtype, rates in ceilings.items():
            rates.append(matmul_rate(dtype))

    starts = [partial(start, contender, recipe, folder, options, **orders) for contender in found]
    # In a last turn they tell what memory they took.
    reports = take_turns(cell, starts, options.rounds + 1, measure_ceilings)
    entries = [
        {**contender._asdict(), "rounds": reported[1:-1], **reported[-1]}
        for contender, reported in zip(found, reports, strict=True)
    ]
    return {"warmup": warmup, "updates": updates, "ceilings": ceilings, "contenders": summarise(entries, ceilings)}


def summarise(entries: list[dict[str, Any]], ceilings: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Adds medians over the rounds, their ratios to the peers', and shares of the limit."""
    for entry in entries:
        rounds = entry["rounds"]
        entry["tokens_per_second"] = statistics.median(turn["tokens"] / turn["seconds"] for turn in rounds)
        flops = statistics.median(turn["flops"] / turn["seconds"] for turn in rounds)
        entry["share_of_limit"] = flops / statistics.median(ceilings[entry["dtype"]])
    speeds = {contender_name(entry): entry["tokens_per_second"] for entry in entries}
    for entry in entries:
        peers = {
            "MarianMTModel, same dtype": Contender("MarianMTModel", entry["dtype"], entry["compiled"]),
            "MarianMTModel, float32": Contender("MarianMTModel", "float32"),
            "Marian C++": Contender("Marian C++", "float32"),
        }
        entry["ratios"] = {
            name: entry["tokens_per_second"] / speeds[str(peer)] for name, peer in peers.items() if str(peer) in speeds
        }
    return entries


def matmul_rate(dtype: str) -> float:
    """Floating-point operations a second of a large matrix product, as the machine gives them now."""
    import torch

    from vanilla_transformer.operations_vanilla_transformer import linear

    size, device = (8192, "cuda") if torch.cuda.is_available() else (2048, "cpu")
    a, b = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
    linear(a, b)
    count, started = 0, clock()
    while (seconds := clock() - started) < MATMUL_SECONDS or not count:
        linear(a, b)
        count += 1
    return count * 2 * size**3 / seconds


def compare_losses(
    cell: str, recipe: list[str], folder: Path, options: argparse.Namespace, found: list[Contender]
) -> dict[str, Any]:
    """Losses on the validation text after the same target tokens, from the same weights, by the recipe's schedule."""
    from tqdm.auto import tqdm

    entries = []
    for contender in tqdm(found, desc=f"{cell}, losses", disable=None):
        # Every update has at least one token, so the tokens end the run before its steps do.
        orders = {"max_steps": options.loss_tokens, "loss_tokens": options.loss_tokens}
        with start(contender, recipe, folder, options, **orders) as worker:
            entries.append({**contender._asdict(), **worker.report()})
    return {"loss_tokens": options.loss_tokens, "contenders": entries}


def contender_name(entry: dict[str, Any]) -> str:
    """As in the tables."""
    return str(Contender(*(entry[name] for name in Contender._fields)))


def table(rows: list[dict[str, str]]) -> str:
    """Rows under the heads that are their keys, in columns as wide as they need to be, the first one to the left."""
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[word.rjust(width) for word, width in zip(line, widths, strict=True)] for line in lines]
    for words, line in zip(padded, lines, strict=True):
        words[0] = line[0].ljust(widths[0])
    return "\n".join(map("  ".join, padded))


def speed_table(result: dict[str, Any]) -> str:
    """One line for each contender, and the ceilings."""
    rows = [
        {
            "": contender_name(entry),
            "target tokens/s": f"{entry['tokens_per_second']:,.0f}",
            **{f"x {peer}": f"{ratio:.2f}" for peer, ratio in entry["ratios"].items()},
            "MiB beyond state": in_mib(entry["memory_beyond_state"]),
            "of the limit": f"{entry['share_of_limit']:.1%}",
        }
        for entry in result["contenders"]
    ]
    ceilings = [
        f"limit: {statistics.median(rates) / 1e9:,.0f} GFLOP/s in matrix products of {dtype}"
        for dtype, rates in result["ceilings"].items()
    ]
    return "\n".join([table(rows), *ceilings])


def in_mib(size: int | None) -> str:
    """Bytes in MiB, or a dash for what is not known."""
    return "-" if size is None else f"{size / 2**20:,.0f}"


def loss_table(result: dict[str, Any]) -> str:
    """One line for each contender; losses in nats per target token of the validation text."""
    return table([
        {
            "": contender_name(entry),
            "tokens": f"{entry['tokens']:,}",
            "updates": f"{entry['updates']:,}",
            "NLL before": f"{entry['before']['nll']:.4f}",
            "NLL after": f"{entry['after']['nll']:.4f}",
            "smoothed after": f"{entry['after']['smoothed']:.4f}",
        }
        for entry in result["contenders"]
    ])  # fmt: skip


def compare_decoding(options: argparse.Namespace) -> None:
    """`decode`: measures every cell, prints a table of each, and writes the JSON."""
    from vanilla_transformer.training.errors import UserError
    from vanilla_transformer.training.machine import threads_of_processor

    # 1. what to do; what is wrong is said before anything is measured
    check_machine(options)
    if options.model and not options.multi30k_dir:
        raise UserError(f"--model translates the test set of {MULTI30K}")
    if options.memory and (options.model or options.cells):
        raise UserError("--memory has cells of its own, of random text: leave --model and --cells out")
    of_memory = ["ours float32", "ours float32, compiled", "stock float32"]
    names = options.contenders or (of_memory if options.memory else list(DECODERS))
    recipe = recipe_of("tiny" if options.model else "base", options)

    # 2. measurements
    results = about_this_run(options, threads_of_processor())
    found = leave_out([DECODERS[name] for name in names], why_not_translated)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, model_folder, tasks = prepare_translation(recipe, Path(folder), options)
        found = leave_out(found, partial(why_not_converted, model, tokenizer, Path(folder), bool(options.model)))
        job = {"folder": folder, "model": model_folder, "threads": options.threads}
        for cell, task in tasks.items():
            results["cells"][cell] = measure_translation(cell, job | {"task": task}, found, model, options.rounds)
            tell(cell, decoding_table(results["cells"][cell]), results, options)
    if options.memory:
        print(f"\n{memory_table(results['cells'])}")


def prepare_translation(
    argv: list[str], folder: Path, options: argparse.Namespace
) -> tuple[Any, Any, str, dict[str, dict[str, Any]]]:
    """The model, its tokenizer, their folder, which is written unless it is the user's, and the cells' tasks."""
    from transformers import set_seed

    from vanilla_transformer.training.data import load_pairs
    from vanilla_transformer.training.errors import UserError
    from vanilla_transformer.training.evaluate import load_model
    from vanilla_transformer.training.train import build_model

    recipe = parse(argv)
    if options.model:
        recipe.data.train_file = recipe.data.validation_file = None
        pairs = load_pairs(recipe.data)["test"]
        model, tokenizer = load_model(options.model)
        eos = model.generation_config.eos_token_id
        if not isinstance(eos, int):
            raise UserError(f"--model {options.model} has eos_token_id={eos}, and its peers end sentences by one token")
        tasks = tasks_of_text(tokenizer, pairs, recipe.decoding.bleu_tokenize, options.cells or list(SEARCHES))
        return model, tokenizer, options.model, tasks
    set_seed(recipe.training.seed)
    tokenizer = word_tokenizer(recipe.tokenizer.vocab_size)
    model = build_model(recipe, tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    return model, tokenizer, str(folder / "model"), random_tasks(tokenizer, options)


def why_not_converted(model: Any, tokenizer: Any, folder: Path, ends: bool, contender: Contender) -> str | None:
    """
    Converts the model for a peer that has a format of its own, unless it is there already.

    Args:
        model, tokenizer: ours.
        folder: where to.
        ends: whether Marian may end a sentence; else the outputs are as long as they may be.
        contender: the peer.

    Returns:
        What the peer has not, in words; None if it can be used.
    """
    try:
        if contender.side == "ctranslate2" and not (folder / "ctranslate2").exists():
            from vanilla_transformer.conversion.ctranslate2 import to_ctranslate2

            to_ctranslate2(model, tokenizer.convert_ids_to_tokens(range(len(tokenizer))), folder / "ctranslate2")
        if contender.side == "Marian C++":
            return convert_for_marian(model, tokenizer, folder / "marian", ends, contender.dtype)
    except ValueError as error:
        return str(error)
    return None


def convert_for_marian(model: Any, tokenizer: Any, folder: Path, ends: bool, dtype: str) -> str | None:
    """Writes weights and vocabulary, and the weights in `dtype`. Returns why Marian cannot compute so, in words."""
    import torch

    from vanilla_transformer.conversion.marian_npz import to_marian_npz, write_vocabulary

    config = model.config
    if not folder.exists():
        folder.mkdir()
        to_marian_npz(model, folder / "float32.npz", never_ends=not ends)
        write_vocabulary(len(tokenizer), config.eos_token_id, tokenizer.unk_token_id, folder / "vocabulary.txt")
    if dtype == "float32":
        return None
    # Its products in 8 bits take blocks of 64 inputs and of 8 outputs, and do not check it.
    if any(size % 64 for size in (config.d_model, config.encoder_ffn_dim, config.decoder_ffn_dim)) or (
        config.decoder_vocab_size % 8
    ):
        return "it needs widths that 64 divides, and a vocabulary that 8 divides"
    wide = torch.cpu.get_capabilities().get("avx512_bw")
    form = {"intgemm8": "intgemm8", "packed8": "packed8avx512" if wide else "packed8avx2"}[dtype]
    arguments = ["--from", folder / "float32.npz", "--to", folder / f"{dtype}.bin", "--gemm-type", form]
    done = subprocess.run(marian_command("convert", *arguments), capture_output=True, text=True)
    return f"it cannot convert to {form}: {done.stderr.splitlines()[-1]}" if done.returncode else None


def marian_command(*words: Any) -> list[str]:
    """The command line of Marian's program, which Python's package holds."""
    return [sys.executable, "-c", "import sys, _pymarian; sys.exit(_pymarian.main(sys.argv[1:]))", *map(str, words)]


def random_tasks(tokenizer: Any, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Cells of one batch of random text, which becomes an output of fixed length."""
    if options.memory:
        cells = {
            f"source {length}, beam {beams}": (beams, MEMORY_BATCH, length, MEMORY_NEW_TOKENS)
            for length in MEMORY_LENGTHS
            for beams in MEMORY_BEAMS
        }
    else:
        cells = {cell: (*SEARCHES[cell], LENGTH, LENGTH) for cell in options.cells or SEARCHES}
    return {
        cell: {"beams": beams, "batch": batch, "sources": random_ids(tokenizer, batch, length), "new_tokens": new}
        for cell, (beams, batch, length, new) in cells.items()
    }


def tasks_of_text(tokenizer: Any, pairs: Any, bleu_tokenize: str, cells: list[str]) -> dict[str, dict[str, Any]]:
    """Cells of a test set, the longest sentences first."""
    sources, references = tokenizer(list(pairs["source"]))["input_ids"], list(pairs["target"])
    tasks = {}
    for cell in cells:
        beams, batch = SEARCHES[cell]
        chosen = range(len(sources))[: SPEED_SENTENCES if batch == 1 else None]
        order = sorted(chosen, key=lambda i: -len(sources[i]))
        tasks[cell] = {"beams": beams, "batch": batch, "sources": [sources[i] for i in order], "new_tokens": None}
        if cell == BLEU_CELL:
            tasks[cell] |= {"references": [references[i] for i in order], "bleu_tokenize": bleu_tokenize}
    return tasks


def measure_translation(
    cell: str, job: dict[str, Any], found: list[Contender], model: Any, rounds: int
) -> dict[str, Any]:
    """Rounds in which each contender translates the same sentences, after a turn that is not timed."""
    task, entries = job["task"], []
    limits = measure_limits({TYPES[contender.dtype][1] for contender in found})
    jobs = [job | {"contender": contender} for contender in found]
    # Translating is measured on the CPU.
    starts = [partial(Worker, told, job["threads"], CUDA_VISIBLE_DEVICES="") for told in jobs]
    for contender, (first, *reported) in zip(found, take_turns(cell, starts, rounds), strict=True):
        least = least_seconds(model, task, first.pop("lengths"), contender.dtype, limits)
        entry = {**contender._asdict(), "rounds": reported, **first}
        entry["tokens_per_second"] = statistics.median(turn["tokens"] / turn["seconds"] for turn in reported)
        entry["seconds"] = statistics.median(turn["seconds"] for turn in reported)
        entry["share_of_limit"] = least / entry["seconds"]
        entries.append(entry)
    for peer, faster_of in PEERS.items():
        speeds = [entry["tokens_per_second"] for entry in entries if contender_name(entry) in faster_of]
        for entry in entries if speeds else []:
            entry.setdefault("ratios", {})[peer] = entry["tokens_per_second"] / max(speeds)
    sizes = {name: task[name] for name in ("beams", "batch", "new_tokens")}
    return {**sizes, "sentences": len(task["sources"]), "limits": limits, "contenders": entries}


def measure_limits(types: set[str]) -> dict[str, float]:
    """What all threads reach now: bytes a second of memory, and operations a second of products in each type."""
    import torch

    from vanilla_transformer.inference_vanilla_transformer import pack_linear
    from vanilla_transformer.training.machine import fastest, read_rate

    size = 2048
    states, weight, bias = torch.randn(size, size), torch.randn(size, size), torch.zeros(size)
    rates = {}
    for name in {*types, "float32"}:
        product = pack_linear(weight, bias, name)
        rates[name] = 2 * size**3 / fastest(partial(product, states), MATMUL_SECONDS)
    # Where torch has no fast product in few bits, float32's is what is known to be reached.
    return {"bytes": read_rate(), **{name: max(rate, rates["float32"]) for name, rate in rates.items()}}


def least_seconds(model: Any, task: dict[str, Any], lengths: list[int], dtype: str, limits: dict[str, float]) -> float:
    """
    Seconds that the task takes by the machine's limits alone: weights are read once for the sources of a batch and
    once for each of its steps, and multiplied by all rows of states; the slower of both counts.

    Args:
        model: ours. Attention and caches are left out.
        task: its sentences, in batches of its size.
        lengths: tokens of each output. Sentences that are finished need nothing.
        dtype: what products are computed in.
        limits: of `measure_limits`.
    """
    once, step = count_weights(model)
    size, rate = TYPES[dtype]

    def seconds(weights: int, rows: int) -> float:
        return max(weights * size / limits["bytes"], 2 * weights * rows / limits[rate])

    total = 0.0
    for first in range(0, len(lengths), task["batch"]):
        sources, outputs = (rows[first : first + task["batch"]] for rows in (task["sources"], lengths))
        total += seconds(once, sum(map(len, sources)))
        for done in range(max(outputs)):
            total += seconds(step, task["beams"] * sum(length > done for length in outputs))
    return total


def count_weights(model: Any) -> tuple[int, int]:
    """Weights that the sources of a batch are multiplied by, and those of a step."""
    sizes = [0, model.lm_head.weight.numel()]
    for name, weight in model.model.named_parameters():
        if ".layers." in name and weight.dim() == 2:
            of_sources = name.startswith("encoder.") or "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
            sizes[not of_sources] += weight.numel()
    return sizes[0], sizes[1]


def decoding_table(result: dict[str, Any]) -> str:
    """One line for each contender; memory is what was taken beyond what the process held before, and all."""
    step, parts = ("step", result["new_tokens"]) if result["new_tokens"] else ("sentence", result["sentences"])
    return table([
        {
            "": contender_name(entry),
            "tokens/s": f"{entry['tokens_per_second']:,.1f}",
            f"ms/{step}": f"{1000 * entry['seconds'] / parts:.2f}",
            **{f"x {peer}": f"{ratio:.2f}" for peer, ratio in entry.get("ratios", {}).items()},
            "of the limit": f"{entry['share_of_limit']:.0%}",
            "MiB decoding": f"{entry['memory'] / 2**20:,.1f}",
            "MiB in all": f"{(entry['held'] + entry['memory']) / 2**20:,.0f}",
            **({"BLEU": f"{entry['bleu']:.2f}"} if "bleu" in entry else {}),
        }
        for entry in result["contenders"]
    ])  # fmt: skip


def memory_table(cells: dict[str, dict[str, Any]]) -> str:
    """One line for each cell, one column for each contender."""
    return table([
        {"MiB decoding": cell, **{contender_name(e): f"{e['memory'] / 2**20:,.1f}" for e in result["contenders"]}}
        for cell, result in cells.items()
    ])  # fmt: skip


def work() -> None:
    """Trains or translates as the job on the standard input says, and reports on what was the standard output."""
    # The Trainer prints its log, which would be taken for reports.
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    contender, folder = Contender(*job["contender"]), Path(job["folder"])

    def report(figures: dict[str, Any]) -> None:
        print(json.dumps(figures), file=reports, flush=True)

    if "model" in job:
        translate_in_turns(*build_decoder(contender, job["model"], folder, job["threads"]), job["task"], report)
        return
    if contender.side == "Marian C++":
        train_marian(job["recipe"], folder, report, job["threads"], **job["orders"])
        return
    trainer = build_contender(job["recipe"], folder, contender)
    if "loss_tokens" in job["orders"]:
        report(measure_losses(trainer, folder, **job["orders"]))
    else:
        measure_speed(trainer, report, **job["orders"])


def build_contender(argv: list[str], folder: Path, contender: Contender) -> Any:
    """The Trainer of the contender, with a collator that notes the lengths of each batch."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer, set_seed

    from vanilla_transformer.training.memory import hold_memory
    from vanilla_transformer.training.train import build_model, build_trainer

    recipe = parse(argv)
    if contender.side == "ours" and recipe.training.use_cpu:
        hold_memory()  # as train.py does
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    set_seed(recipe.training.seed)
    model = build_model(recipe, tokenizer)
    trainer = build_trainer(recipe, model, tokenizer, {"train": load_from_disk(folder / "train")})
    if contender.side == "MarianMTModel":
        trainer = build_peer(trainer, contender.same_batches)
    trainer.data_collator = Noting(trainer.data_collator)
    return trainer


def build_peer(ours: Any, same_batches: bool) -> Any:
    """transformers' MarianMTModel with our weights in its stock Trainer, with as many rows an update as ours has."""
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    marian = build_marian(ours.model)
    rows, updates = len(ours.train_dataset), len(ours.get_train_dataloader())
    args = Seq2SeqTrainingArguments(
        **{name: getattr(ours.args, name) for name in SHARED_ARGUMENTS},
        label_smoothing_factor=ours.model.config.label_smoothing,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=round(rows / updates),
    )
    peer = Seq2SeqTrainer(
        model=marian,
        args=args,
        train_dataset=ours.train_dataset,
        processing_class=ours.processing_class,
        data_collator=DataCollatorForSeq2Seq(ours.processing_class, marian),
    )
    if same_batches:
        peer._get_train_sampler = ours._get_train_sampler
    return peer


def build_marian(ours: Any) -> Any:
    """A MarianMTModel that computes what `ours` does, with weights and positions copied by name."""
    import torch
    from transformers import MarianConfig, MarianMTModel

    sizes = {name: getattr(ours.config, name) for name in SHARED_SIZES}
    marian = MarianMTModel(MarianConfig(**sizes, bos_token_id=ours.config.bos_token_id, forced_eos_token_id=None))
    state = {name: value.cpu() for name, value in ours.state_dict().items()}
    # A buffer there, which is not trained.
    state["final_logits_bias"] = state.pop("lm_head.bias")[None]
    # Marian has all sines before all cosines, ours in turn: the same but for the order of the width's units.
    numbers = torch.arange(ours.config.max_position_embeddings)[None]
    for stack in ("encoder", "decoder"):
        positions = getattr(ours.model, stack).embed_positions(numbers, torch.float32)[0]
        state[f"model.{stack}.embed_positions.weight"] = positions
    marian.load_state_dict(state)
    return marian


class Noting:
    """A collator that notes the batches which pass through it: source and target length of each row."""

    def __init__(self, collator: Any):
        self.collator = collator
        self.batches: deque[list[tuple[int, int]]] = deque()

    def __call__(self, rows: list[dict[str, list[int]]]) -> Any:
        self.batches.append([(len(row["input_ids"]), len(row["labels"])) for row in rows])
        return self.collator(rows)


def measure_speed(trainer: Any, report: Any, warmup: int, updates: int) -> None:
    """Trains, stopping after the warm-up and every round for the parent's word; then reports the memory it took."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        """The loader is ahead of the updates, so each takes the oldest of the noted batches."""

        def on_step_end(self, args, state, control, **kwargs):
            lengths.extend(trainer.data_collator.batches.popleft())
            if state.global_step < warmup or (state.global_step - warmup) % updates:
                return
            seconds = clock() - self.started if state.global_step > warmup else 0.0
            flops = training_flops(trainer.model.config, lengths)
            report({"seconds": seconds, "tokens": sum(target for _, target in lengths), "flops": flops})
            lengths.clear()
            if not sys.stdin.readline():
                raise SystemExit("the parent is gone")
            self.started = clock()

    lengths: list[tuple[int, int]] = []
    trainer.add_callback(Turns())
    state = make_state(trainer)
    trainer.train()
    report({"state": state, "memory_beyond_state": memory("VmHWM") - state})


def train_marian(
    argv: list[str],
    folder: Path,
    report: Callable[[dict[str, Any]], None],
    threads: int,
    warmup: int,
    updates: int,
) -> None:
    """Marian's turns, each a run of its own of `warmup` and `updates` updates, with about as many words as ours."""
    trainer = build_contender(argv, folder, Contender("ours", "float32"))
    rows, eos = trainer.train_dataset, trainer.processing_class.eos_token_id
    lengths = [(len(row["input_ids"]), len(row["labels"])) for row in rows]
    tokens = sum(target for _, target in lengths)
    flops = training_flops(trainer.model.config, lengths) / tokens
    command = marian_training(trainer, folder, threads, round(tokens / len(trainer.get_train_dataloader())))
    for column in ("input_ids", "labels"):
        lines = (" ".join(str(token) for token in row if token != eos) for row in rows[column])
        (folder / f"{column}.txt").write_text("".join(f"{line}\n" for line in lines))
    report({})
    for _ in range((trainer.args.max_steps - warmup) // updates):
        sys.stdin.readline()
        seconds, done = time_marian(command, warmup, updates)
        report({"seconds": seconds, "tokens": done, "flops": flops * done})
    sys.stdin.readline()
    # Marian allocates all its memory at the start.
    report({"state": None, "memory_beyond_state": None})


def marian_training(trainer: Any, folder: Path, threads: int, words: int) -> list[str]:
    """The command line that trains what our Trainer trains, on texts that are ids."""
    from vanilla_transformer.conversion.marian_npz import marian_options, write_vocabulary

    args, config, tokenizer = trainer.args, trainer.model.config, trainer.processing_class
    write_vocabulary(len(tokenizer), tokenizer.eos_token_id, tokenizer.unk_token_id, folder / "vocabulary.txt")
    shared = config.share_encoder_decoder_embeddings and config.tie_word_embeddings
    options = {
        **marian_options(config),
        "tied-embeddings-all": str(shared).lower(),
        "tied-embeddings": str(config.tie_word_embeddings and not shared).lower(),
        "transformer-dropout": config.dropout,
        "transformer-dropout-attention": config.attention_dropout,
        "transformer-dropout-ffn": config.activation_dropout,
        "label-smoothing": config.label_smoothing,
        "train-sets": [folder / "input_ids.txt", folder / "labels.txt"],
        "vocabs": 2 * [folder / "vocabulary.txt"],
        "model": folder / "marian.npz",
        "tempdir": folder,
        "cpu-threads": threads,
        "mini-batch-words": words,
        "mini-batch-round-up": "false",
        "learn-rate": args.learning_rate,
        "optimizer-params": [args.adam_beta1, args.adam_beta2, args.adam_epsilon],
        "clip-norm": args.max_grad_norm,
        "seed": args.seed,
        # It grows as far as an update needs.
        "workspace": 512,
        "disp-freq": "1u",
    }
    words_of = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    # Both halves of a batch at once, one update by their sum.
    return marian_command(
        "train", "--sync-sgd", *(word for name, values in words_of.items() for word in (f"--{name}", *values))
    )


def time_marian(command: list[str], warmup: int, updates: int) -> tuple[float, int]:
    """Seconds of the updates after the warm-up, and their target words. What it says is logged in vain otherwise."""
    seconds, words, started = 0.0, 0, 0.0
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            if found := MARIAN_UPDATE.search(line):
                number, now = int(found[1]), time.perf_counter()
                words += int(found[2].replace(",", "")) if number > warmup else 0
                started = now if number == warmup else started
                if number == warmup + updates:
                    seconds = now - started
                    break
        # It would save its model.
        process.kill()
    if not seconds:
        raise SystemExit("Marian ended before its last update")
    return seconds, words


def make_state(trainer: Any) -> int:
    """
    Makes gradients and the optimizer's state, by an update on one sentence, which also loads the libraries' kernels.

    Returns:
        Bytes that the process then holds.
    """
    batch = trainer.data_collator([trainer.train_dataset[0]]).to(trainer.args.device)
    trainer.data_collator.batches.clear()
    optimizer = trainer.create_optimizer()
    trainer.model.train()(**batch).loss.backward()
    optimizer.step()
    del batch
    return reset_peak()


def reset_peak() -> int:
    """Bytes that the process holds now, after what was freed is given back. The peak is counted from here."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        # What was freed goes back to the system, and "5" resets the peak (man 5 proc).
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(which: str) -> int:
    """Bytes that the process holds ("VmRSS"), or the most it has held ("VmHWM"); on a GPU those of its tensors."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() if which == "VmRSS" else torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{which}:\s+(\d+) kB", status)[0]) * 1024


def clock() -> float:
    """Seconds, after everything that was asked of the GPU is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def training_flops(config: Any, lengths: list[tuple[int, int]]) -> float:
    """
    Floating-point operations of the matrix products that one update needs: two for each weight and token that meet,
    and those of the attention, once forward and twice backward. Padding needs none, so it counts as waste.

    Args:
        config: ours or Marian's.
        lengths: tokens of each row's source and target.
    """
    d, flops = config.d_model, 0
    for source, target in lengths:
        encoder = source * (8 * d**2 + 4 * d * config.encoder_ffn_dim) + 4 * d * source**2
        decoder = target * (12 * d**2 + 4 * d * config.decoder_ffn_dim) + 4 * d * target**2
        across = source * 4 * d**2 + 4 * d * source * target
        output = 2 * target * d * config.decoder_vocab_size
        flops += config.encoder_layers * encoder + config.decoder_layers * (decoder + across) + output
    return 3.0 * flops


def measure_losses(trainer: Any, folder: Path, loss_tokens: int) -> dict[str, Any]:
    """Trains for `loss_tokens` target tokens, to the end of the update that reaches them."""
    from datasets import load_from_disk
    from transformers import TrainerCallback

    class Limit(TrainerCallback):
        """Counts, and stops."""

        tokens = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.tokens += sum(target for _, target in trainer.data_collator.batches.popleft())
            control.should_training_stop = self.tokens >= loss_tokens

    limit = Limit()
    trainer.add_callback(limit)
    rows = load_from_disk(folder / "validation")
    before = validation_loss(trainer, rows)
    trainer.train()
    after = validation_loss(trainer, rows)
    return {"tokens": limit.tokens, "updates": trainer.state.global_step, "before": before, "after": after}


def validation_loss(trainer: Any, rows: Any) -> dict[str, float]:
    """
    Nats per target token of `rows`, plain and smoothed. One way for every contender: float32, without dropout,
    `torch.nn.functional.cross_entropy`.
    """
    import torch
    from torch.nn import functional as F
    from transformers import DataCollatorForSeq2Seq

    # Without the autocast that training has wrapped it in.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    collate = DataCollatorForSeq2Seq(trainer.processing_class)
    smoothings = {"nll": 0.0, "smoothed": trainer.args.label_smoothing_factor or model.config.label_smoothing}
    totals, count = dict.fromkeys(smoothings, 0.0), 0
    for start_row in range(0, len(rows), SENTENCES):
        batch = collate(list(rows.select(range(start_row, min(start_row + SENTENCES, len(rows))))))
        batch = batch.to(trainer.args.device)
        labels = batch.pop("labels")
        inputs = model.prepare_decoder_input_ids_from_labels(labels)
        with torch.no_grad():
            logits = model(**batch, decoder_input_ids=inputs).logits.flatten(0, 1)
        for name, smoothing in smoothings.items():
            losses = F.cross_entropy(logits, labels.flatten(), label_smoothing=smoothing, reduction="sum")
            totals[name] += losses.item()
        count += int(labels.ne(-100).sum())
    return {name: total / count for name, total in totals.items()}


def build_decoder(contender: Contender, model_folder: str, folder: Path, threads: int) -> tuple[Any, Any]:
    """The tokenizer, and a function that makes of a task a function which translates its sentences into rows of ids."""
    import torch
    from transformers import AutoTokenizer, GenerationMixin

    from vanilla_transformer.training.evaluate import load_model

    if contender.side == "ctranslate2":
        import ctranslate2

        # It turns the weights into the other type when it loads them.
        options = {"compute_type": contender.dtype, "inter_threads": 1, "intra_threads": threads}
        translator = ctranslate2.Translator(str(folder / "ctranslate2"), **options)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        return tokenizer, partial(by_ctranslate2, translator, tokenizer)
    if contender.side == "Marian C++":
        from pymarian import Translator

        form = "npz" if contender.dtype == "float32" else "bin"
        vocabulary = str(folder / "marian" / "vocabulary.txt")
        translator = Translator(
            models=str(folder / "marian" / f"{contender.dtype}.{form}"),
            vocabs=[vocabulary, vocabulary],
            cpu_threads=threads,
            quiet="true",
        )
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        return tokenizer, partial(by_marian, translator, tokenizer)
    model, tokenizer = load_model(model_folder)
    if contender.side == "MarianMTModel":
        model = build_marian(model).eval().to(getattr(torch, contender.dtype))
    generate = model.generate
    if contender.side == "stock":
        generate = partial(GenerationMixin.generate, model)
    elif contender.side == "ours":
        generate = partial(generate, compute_type=contender.dtype, compiled=contender.compiled)
    return tokenizer, partial(by_transformers, generate, tokenizer)


def by_transformers(generate: Any, tokenizer: Any, task: dict[str, Any]) -> Callable[[], list[list[int]]]:
    """Batches in the order of the sentences; the search that CTranslate2 does."""
    from vanilla_transformer.generation_vanilla_transformer import MAX_EXTRA_TOKENS

    options = {"num_beams": task["beams"], "min_new_tokens": task["new_tokens"]}
    if task["beams"] > 1:
        options |= {"length_penalty": 1.0, "early_stopping": True}
    batches = []
    for first in range(0, len(task["sources"]), task["batch"]):
        rows = task["sources"][first : first + task["batch"]]
        inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        limit = task["new_tokens"] or inputs["input_ids"].shape[1] + MAX_EXTRA_TOKENS
        batches.append({**inputs, **options, "max_new_tokens": limit})
    eos = tokenizer.eos_token_id

    def translate() -> list[list[int]]:
        rows = [row[1:] for inputs in batches for row in generate(**inputs).tolist()]
        return [row[: row.index(eos) + 1] if eos in row else row for row in rows]

    return translate


def by_ctranslate2(translator: Any, tokenizer: Any, task: dict[str, Any]) -> Callable[[], list[list[int]]]:
    """One call: CTranslate2 makes the batches, of sentences of similar length."""
    from vanilla_transformer.generation_vanilla_transformer import MAX_EXTRA_TOKENS

    sources = [tokenizer.convert_ids_to_tokens(row) for row in task["sources"]]
    options = {
        "beam_size": task["beams"],
        "max_batch_size": task["batch"],
        "length_penalty": 1,
        "return_end_token": True,
        "min_decoding_length": task["new_tokens"] or 0,
        "max_decoding_length": task["new_tokens"] or max(map(len, sources)) + MAX_EXTRA_TOKENS,
    }

    def translate() -> list[list[int]]:
        results = translator.translate_batch(sources, **options)
        return [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]

    return translate


def by_marian(translator: Any, tokenizer: Any, task: dict[str, Any]) -> Callable[[], list[list[int]]]:
    """One call for all batches, which are divided among the threads: a batch has one. Single sentences wait in turn."""
    from vanilla_transformer.generation_vanilla_transformer import MAX_EXTRA_TOKENS

    eos, unknown = tokenizer.eos_token_id, str(tokenizer.unk_token_id)
    # As `write_vocabulary` has it.
    texts = [" ".join("<unk>" if str(i) == unknown else str(i) for i in row[:-1]) for row in task["sources"]]
    longest = max(map(len, task["sources"]))
    limit = task["new_tokens"] or longest + MAX_EXTRA_TOKENS
    options = {
        "beam-size": task["beams"],
        "mini-batch": task["batch"],
        "normalize": 1.0,
        "allow-unk": "true",
        # The greatest length is a factor of the batch's longest source.
        "max-length-factor": (limit - 0.5) / longest,
    }
    calls = [[text] for text in texts] if task["batch"] == 1 else [texts]

    def translate() -> list[list[int]]:
        lines = [line for call in calls for line in translator.translate(call, **options)]
        rows = [[int(word.replace("<unk>", unknown)) for word in line.split()] for line in lines]
        return [row if len(row) == limit else [*row, eos] for row in rows]

    return translate


def translate_in_turns(tokenizer: Any, prepare: Any, task: dict[str, Any], report: Any) -> None:
    """Translates the task's sentences for what that takes and gives, then at every word of the parent for the time."""
    from vanilla_transformer.training.evaluate import score_texts

    # One sentence loads the kernels and packs the weights.
    prepare({**task, "sources": task["sources"][:1]})()
    translate, held = prepare(task), reset_peak()
    outputs = translate()
    figures = {"held": held, "memory": memory("VmHWM") - held, "lengths": [len(row) for row in outputs]}
    if "references" in task:
        texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
        figures["bleu"] = score_texts(texts, task["references"], task["bleu_tokenize"])["bleu"]
    report(figures)
    for _ in sys.stdin:
        started = clock()
        tokens = sum(map(len, translate()))
        report({"seconds": clock() - started, "tokens": tokens})


if __name__ == "__main__":
    work()

"""
Runs the compiled program without Python, as tests/native/driver.cpp.

    make sanitize    fuzzes it under GCC's sanitizers
    make arm         compares its outputs on AArch64 (emulated by qemu-user) and other instruction sets with those here
"""

import argparse
import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from transformers import AutoTokenizer

from vanilla_transformer import (
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
    decoding_call,
    engine_choice,
)
from vanilla_transformer import engine_compiled as native
from vanilla_transformer import engine_program as program


FOLDER = Path(__file__).parent
# Allocations and the start of threads, which the driver lets fail (std::thread::_M_start_thread).
WRAPPED = ("aligned_alloc", "_ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE")
EMULATED = ["-isystem", str(FOLDER / "emulated"), "-Wno-psabi", "-D__AVX2__"]
ARM_COMPILER = "aarch64-linux-gnu-g++"
QEMU = ["qemu-aarch64", "-cpu", "max"]
INSTALL_ARM = "on Debian: apt-get install g++-aarch64-linux-gnu qemu-user"

SANITIZERS = {
    "AddressSanitizer and UndefinedBehaviorSanitizer": [
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize-recover=all",
    ],
    "ThreadSanitizer": ["-fsanitize=thread"],
}

# Of the random networks: more than one panel of columns on every instruction set, and no multiples of it.
SIZES = {
    "vocab_size": 300,
    "d_model": 72,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 150,
    "decoder_ffn_dim": 130,
}
SHAPES: dict[str, dict[str, Any]] = {
    "post-norm, ReLU": {},
    "pre-norm, GELU": {"normalize_before": True, "activation_function": "gelu"},
    "SiLU, free heads": {"activation_function": "silu", "d_kv": 20, "d_v": 37},
}
# How far scores of the same output may lie apart in float32: the order of additions is not the same.
SCORES_AGREE = 1e-4
SEARCHES: list[dict[str, Any]] = [{"num_beams": 1}, {"num_beams": 4}, {"num_beams": 7, "num_return_sequences": 3}]


class Target(NamedTuple):
    """An instruction set: the flags and compiler that make a program for it, and the command that runs it."""

    flags: list[str]
    compiler: str = "g++"
    emulator: list[str] = []


# Those that an x86-64 machine can run, or that are emulated: AVX-512 by tests/native/emulated, ARM by qemu.
TARGETS = {
    "x86-64": Target(["-march=x86-64"]),
    "AVX2": Target(["-march=x86-64-v3"]),
    "AVX-VNNI": Target([*EMULATED, "-D__AVXVNNI__"]),
    "AVX-512": Target([*EMULATED, "-D__AVX512BW__"]),
    "AVX-512 VNNI": Target([*EMULATED, "-D__AVX512BW__", "-D__AVX512VNNI__"]),
    "NEON": Target(["-march=armv8-a", "-static"], ARM_COMPILER, QEMU),
    "NEON with dot products": Target(["-march=armv8.2-a+dotprod", "-static"], ARM_COMPILER, QEMU),
}


def why_not_run(target: Target) -> str | None:
    """What this machine lacks for a target, in words."""
    missing = [name for name in (target.compiler, *target.emulator[:1]) if not shutil.which(name)]
    if missing:
        return f"{' and '.join(missing)} not found" + (f" ({INSTALL_ARM})" if target.emulator else "")
    if target is TARGETS["AVX2"] and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "this processor does not have AVX2"
    return None


def build(file: Path, target: Target, *flags: str, source: str = "driver.cpp") -> list[str]:
    """Compiles a source of this folder with the program's own flags and these; returns the command that runs it."""
    wrapped = [f"-Wl,--wrap={name}" for name in WRAPPED] if source == "driver.cpp" else []
    command = [target.compiler, *program.FLAGS, *target.flags, *flags, "-I", str(program.SOURCE.parent), *wrapped]
    subprocess.run([*command, str(FOLDER / source), "-o", str(file)], check=True)
    return [*target.emulator, str(file)]


class Recorded(Exception):  # noqa: N818
    """Ends a search that has been written down."""


class Recorder:
    """Stands where the program's library is expected; writes what it is given to a file and computes nothing."""

    def __init__(self, path: Path):
        self.file = path.open("wb")

    def _put(self, numbers: bytes) -> None:
        self.file.write(len(numbers).to_bytes(8, "little") + numbers)

    def vt_create(self, sizes: Any, weights: Any, count: int, _network: Any) -> int:
        self.d_model = sizes._obj.d_model
        self._put(bytes(sizes._obj))
        self._put(bytes(ctypes.c_int64(count)))
        for weight in weights:
            self._put(ctypes.string_at(weight.numbers, weight.count * 4) if weight.count else b"")
        return 0

    def vt_search(self, _network: Any, reference: Any) -> int:
        job = reference._obj
        tokens = ctypes.c_int64.from_address(job.source_starts + job.sentences * 8).value
        bytes_of = {
            "source": tokens * 8,
            "source_starts": (job.sentences + 1) * 8,
            "prefix": job.sentences * job.prefix_length * 8,
            "eos": job.eos_count * 8,
            "encoder_positions": job.encoder_position_count * self.d_model * 4,
            "decoder_positions": job.decoder_position_count * self.d_model * 4,
            "length_penalties": (job.max_length - job.prefix_length + 1) * 4,
        }
        self._put(bytes(job))
        for name, size in bytes_of.items():
            self._put(ctypes.string_at(getattr(job, name), size) if size else b"")
        raise Recorded

    def vt_destroy(self, _network: Any) -> None:
        """Nothing was made."""


def record(model: Any, compute_type: str, calls: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes a network and the searches that these calls of `generate()` are to a file for the driver."""
    recorder = Recorder(path)

    @functools.cache
    def made(make: Any, *arguments: Any) -> Any:
        return make(model, *arguments)

    with (
        recorder.file,
        mock.patch.object(native, "load", return_value=recorder),
        mock.patch.object(engine_choice, "load", return_value=recorder),
        mock.patch.object(decoding_call, "copy_of", lambda _model, _parameters, *kind: made(*kind)),
    ):
        for call in calls:
            with contextlib.suppress(Recorded):
                model.generate(**call, compiled=True, compute_type=compute_type)


class Output(NamedTuple):
    """A hypothesis. Greedy search gives it the score 0."""

    tokens: list[int]
    score: float


def search(command: list[str], path: Path) -> list[list[Output]]:
    """What a driver finds in each of the searches of a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found"
        subprocess.run([*command, "search", str(path), str(file)], check=True)
        blocks, numbers = [], file.read_bytes()
    while numbers:
        end = 8 + int.from_bytes(numbers[:8], "little")
        blocks.append(numbers[8:end])
        numbers = numbers[end:]
    found = []
    for sequences, scores in zip(blocks[::2], blocks[1::2], strict=True):
        values = np.frombuffer(scores, np.float32)
        rows = np.frombuffer(sequences, np.int64).reshape(len(values), -1)
        found.append([Output(row[row >= 0].tolist(), float(score)) for row, score in zip(rows, values, strict=True)])
    return found


class Comparison(NamedTuple):
    """Of what two programs find in the same searches."""

    outputs: int
    score_difference: float  # the largest of outputs that are equal
    gaps: list[float]  # of each output that differs: how far apart the two choices are, in log-probability


class Case(NamedTuple):
    """A network and searches with it."""

    model: Any
    compute_type: str
    calls: list[dict[str, Any]]

    def search(self, command: list[str]) -> list[list[Output]]:
        with tempfile.TemporaryDirectory() as folder:
            record(*self, Path(folder) / "searches")
            return search(command, Path(folder) / "searches")

    def compare(self, expected: list[list[Output]], found: list[list[Output]], command: list[str]) -> Comparison:
        """`command` runs the driver that has found what is expected."""
        difference, gaps = 0.0, []
        for call, ours, theirs in zip(self.calls, expected, found, strict=True):
            for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                if a.tokens == b.tokens:
                    difference = max(difference, abs(a.score - b.score))
                elif call["num_beams"] > 1:
                    gaps.append(abs(a.score - b.score))
                else:
                    same = next(i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y)
                    gaps.append(self._greedy_gap(call, number, a.tokens[:same], command))
        return Comparison(sum(map(len, expected)), difference, gaps)

    def _greedy_gap(self, call: dict[str, Any], row: int, prefix: list[int], command: list[str]) -> float:
        """Between the two likeliest tokens after a prefix, in log-probability."""
        source = {name: call[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 1, "min_length": 0}
        ((best, second),) = self._replace(
            calls=[{**source, **options, "decoder_input_ids": torch.tensor([prefix])}]
        ).search(command)
        return best.score - second.score


def error_of_int8(exact: list[list[Output]], rounded: list[list[Output]]) -> float:
    """How far int8 moves scores, at most: the largest of outputs that are the same in float32."""
    pairs = [pair for both in zip(exact, rounded, strict=True) for pair in zip(*both, strict=True)]
    return max((abs(a.score - b.score) for a, b in pairs if a.tokens == b.tokens), default=0.0)


def lively_model(seed: int, **fields: Any) -> Any:
    """
    A small network with random weights whose outputs are worth comparing: a token depends on the source and on those
    before it, seldom follows itself, and about one in eight ends the sentence.
    """
    torch.manual_seed(seed)
    config = VanillaTransformerConfig(**SIZES, **fields, tie_word_embeddings=False)
    model = VanillaTransformerForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        tokens = torch.randperm(config.decoder_vocab_size)
        model.lm_head.weight.copy_(model.model.decoder.embed_tokens.weight[tokens])
        targets = torch.randint(3, config.decoder_vocab_size, (8, 12))
        logits = model(targets % config.vocab_size, decoder_input_ids=targets).logits
        behind = logits.amax(dim=-1) - logits[..., config.eos_token_id]
        model.lm_head.bias[config.eos_token_id] += behind.quantile(1 / 8)
    return model


def random_calls(model: Any, sentences: int) -> list[dict[str, Any]]:
    """Calls of `generate()` for random sentences, with and without beams."""
    lengths = torch.randint(1, 40, (sentences,))
    mask = (torch.arange(40) < lengths[:, None]).long()
    source = {"input_ids": torch.randint(3, model.config.vocab_size, mask.shape) * mask, "attention_mask": mask}
    return [{**source, **options, "max_new_tokens": 24} for options in SEARCHES]


def calls_for_text(folder: str, path: str, sentences: int) -> tuple[Any, list[dict[str, Any]]]:
    """A trained model, and calls of `generate()` for the first lines of a text."""
    model = VanillaTransformerForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = Path(path).read_text(encoding="utf-8").splitlines()[:sentences]
    calls: list[dict[str, Any]] = []
    for start in range(0, len(lines), 50):
        batch = tokenizer(lines[start : start + 50], return_tensors="pt", padding=True)
        calls += [{**batch, "num_beams": beams, "max_new_tokens": 60} for beams in (1, 4)]
    return model, calls


def sanitize(seconds: float) -> None:
    """Fuzzes under each sanitizer, from a seed that is another each time."""
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in SANITIZERS.items():
            command = build(Path(folder) / "driver", Target(["-O1", "-g", *program.compiler_flags(), *flags]))
            print(f"{name}: ", end="", flush=True)
            fuzz(command, seconds, int(time.time()))


def fuzz(command: list[str], seconds: float, seed: int) -> None:
    """
    Raises:
        CalledProcessError: something was found. The driver has printed the seed that shows it again.
    """
    options = {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    subprocess.run([*command, "fuzz", str(seconds), str(seed)], check=True, env={**os.environ, **options})


def arm(arguments: argparse.Namespace) -> bool:
    """Compares every instruction set with this processor's; whether all outputs agree, but for ties in int8."""
    torch.set_num_threads(1)
    commands: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        here = build(Path(folder) / "here", Target(program.compiler_flags()))
        for name, target in TARGETS.items():
            if missing := why_not_run(target):
                print(f"{name}: {missing}")
            else:
                commands[name] = build(Path(folder) / name.replace(" ", "-"), target)
        right = [name in commands for name in TARGETS if "NEON" in name]
        for title, model, calls in _networks(arguments):
            exact = None
            for compute_type in ("float32", "int8"):
                case = Case(model, compute_type, calls)
                expected = case.search(here)
                exact = exact or expected
                bound = SCORES_AGREE if compute_type == "float32" else error_of_int8(exact, expected)
                for name, command in commands.items():
                    compared = case.compare(expected, case.search(command), here)
                    right.append(agrees(compared, compute_type, bound))
                    print(f"{title}, {compute_type}, {name}: {_report(compared, compute_type, bound)}", flush=True)
    return all(right)


def agrees(compared: Comparison, compute_type: str, bound: float) -> bool:
    """Whether two programs agree: in float32 on all outputs, in int8 but for ties; scores to the bound."""
    if compared.gaps and compute_type == "float32":
        return False
    return max([compared.score_difference, *compared.gaps]) <= bound


def _report(compared: Comparison, compute_type: str, bound: float) -> str:
    same = compared.outputs - len(compared.gaps)
    text = f"{same} of {compared.outputs} outputs the same, scores to {compared.score_difference:.1g}"
    if compared.gaps:
        gaps = ", ".join(f"{gap:.1g}" for gap in sorted(compared.gaps))
        text += f"; the others lie {gaps} apart" + (f" (int8 moves scores by up to {bound:.1g})" if bound else "")
    return text if agrees(compared, compute_type, bound) else f"{text}: THEY DISAGREE"


def _networks(arguments: argparse.Namespace) -> Iterator[tuple[str, Any, list[dict[str, Any]]]]:
    for number, (name, fields) in enumerate(SHAPES.items()):
        model = lively_model(number, **fields)
        yield f"random ({name})", model, random_calls(model, 20)
    if arguments.model:
        yield arguments.model, *calls_for_text(arguments.model, arguments.input, arguments.sentences)


def main(argv: list[str]) -> int:
    """The exit status: 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sanitize").add_argument("seconds", type=float, help="of each sanitizer")
    compared = commands.add_parser("arm")
    compared.add_argument("--model", help="a trained model's folder, besides the random networks")
    compared.add_argument("--input", help="a text file for it, a sentence a line")
    compared.add_argument("--sentences", type=int, default=500, help="of that text (default: 500)")
    arguments = parser.parse_args(argv)
    if arguments.command == "arm":
        return 0 if arm(arguments) else 1
    sanitize(arguments.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

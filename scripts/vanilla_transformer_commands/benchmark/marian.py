"""Runs Marian, the C++ program, and converts models to its format."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vanilla_transformer.conversion.marian_npz import marian_options, to_marian_npz, write_vocabulary

from .contenders import Contender
from .limits import training_flops
from .trainers import build_contender


# A line of Marian's log; it has no other way to report its progress.
MARIAN_UPDATE = re.compile(r"Up\. (\d+) : Sen\. [\d,]+ : Cost \S+ \* ([\d,]+) @")


def marian_command(*words: Any) -> list[str]:
    """A command line of Marian's program, which the package pymarian contains."""
    return [sys.executable, "-c", "import sys, _pymarian; sys.exit(_pymarian.main(sys.argv[1:]))", *map(str, words)]


def convert_for_marian(model: Any, tokenizer: Any, folder: Path, ends: bool, dtype: str) -> str | None:
    """Writes vocabulary and weights, also in `dtype`. Returns the reason if Marian cannot compute in `dtype`."""
    config = model.config
    if not folder.exists():
        folder.mkdir()
        to_marian_npz(model, folder / "float32.npz", never_ends=not ends)
        write_vocabulary(len(tokenizer), config.eos_token_id, tokenizer.unk_token_id, folder / "vocabulary.txt")
    if dtype == "float32":
        return None
    # Its 8-bit products need multiples of 64 inputs and 8 outputs, and do not check this.
    if any(size % 64 for size in (config.d_model, config.encoder_ffn_dim, config.decoder_ffn_dim)) or (
        config.decoder_vocab_size % 8
    ):
        return "it needs widths that are multiples of 64, and a vocabulary that is a multiple of 8"
    wide = torch.cpu.get_capabilities().get("avx512_bw")
    form = {"intgemm8": "intgemm8", "packed8": "packed8avx512" if wide else "packed8avx2"}[dtype]
    arguments = ["--from", folder / "float32.npz", "--to", folder / f"{dtype}.bin", "--gemm-type", form]
    done = subprocess.run(marian_command("convert", *arguments), capture_output=True, text=True)
    return f"it cannot convert to {form}: {done.stderr.splitlines()[-1]}" if done.returncode else None


def train_marian(
    argv: list[str],
    folder: Path,
    report: Callable[[dict[str, Any]], None],
    threads: int,
    warmup: int,
    updates: int,
) -> None:
    """Runs Marian's turns: each is a new run of `warmup` + `updates` updates, of about as many words as ours."""
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
    """The command line for training the same network as our Trainer, on texts whose words are ids."""
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
        # In MiB; it grows if an update needs more.
        "workspace": 512,
        "disp-freq": "1u",
    }
    words_of = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    # --sync-sgd: the threads share a batch, and their gradients are summed.
    return marian_command(
        "train", "--sync-sgd", *(word for name, values in words_of.items() for word in (f"--{name}", *values))
    )


def time_marian(command: list[str], warmup: int, updates: int) -> tuple[float, int]:
    """Seconds of the updates after the warm-up, and their target words. Marian's log goes to standard error."""
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
        # It would otherwise save its model.
        process.kill()
    if not seconds:
        raise SystemExit("Marian ended before its last update")
    return seconds, words

"""Builds the Trainers of the contenders, and measures their speed."""

import sys
from collections import deque
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)

from vanilla_transformer.conversion.marian import to_marian
from vanilla_transformer.training.loop.memory import hold_memory
from vanilla_transformer.training.loop.network import build_model
from vanilla_transformer.training.train import build_trainer

from .contenders import Contender
from .limits import training_flops
from .meters import clock, memory, reset_peak
from .recipes import parse


# Arguments that the peer's Trainer shares with ours. All others have their defaults.
SHARED_ARGUMENTS = (
    "output_dir", "max_steps", "seed", "bf16", "torch_compile", "use_cpu", "dataloader_pin_memory", "optim",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay",
    "max_grad_norm", "logging_steps", "save_strategy", "report_to", "disable_tqdm",
)  # fmt: skip


def build_contender(argv: list[str], folder: Path, contender: Contender) -> Any:
    """The Trainer of the contender, with a collator that records the lengths of each batch."""
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
    """transformers' MarianMTModel with our weights in the stock Trainer, with as many rows per update as ours."""
    marian = to_marian(ours.model)
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


class Noting:
    """A collator that records the source and target length of each row in each batch."""

    def __init__(self, collator: Any):
        self.collator = collator
        self.batches: deque[list[tuple[int, int]]] = deque()

    def __call__(self, rows: list[dict[str, list[int]]]) -> Any:
        self.batches.append([(len(row["input_ids"]), len(row["labels"])) for row in rows])
        return self.collator(rows)


def measure_speed(trainer: Any, report: Any, warmup: int, updates: int) -> None:
    """Trains. Waits for the parent after the warm-up and after each round; at the end reports the memory used."""

    class Turns(TrainerCallback):
        """Reports each round. The loader is ahead of the updates, so each update takes the oldest recorded batch."""

        def on_step_end(self, args, state, control, **kwargs):
            lengths.extend(trainer.data_collator.batches.popleft())
            if state.global_step < warmup or (state.global_step - warmup) % updates:
                return
            seconds = clock() - self.started if state.global_step > warmup else 0.0
            flops = training_flops(trainer.model.config, lengths)
            report({"seconds": seconds, "tokens": sum(target for _, target in lengths), "flops": flops})
            lengths.clear()
            if not sys.stdin.readline():
                raise SystemExit("the parent process has ended")
            self.started = clock()

    lengths: list[tuple[int, int]] = []
    trainer.add_callback(Turns())
    state = make_state(trainer)
    trainer.train()
    report({"state": state, "memory_beyond_state": memory("VmHWM") - state})


def make_state(trainer: Any) -> int:
    """
    Creates gradients and optimizer state with an update on one sentence, which also loads the libraries' kernels.

    Returns:
        The bytes that the process holds after that.
    """
    batch = trainer.data_collator([trainer.train_dataset[0]]).to(trainer.args.device)
    trainer.data_collator.batches.clear()
    optimizer = trainer.create_optimizer()
    trainer.model.train()(**batch).loss.backward()
    optimizer.step()
    del batch
    return reset_peak()

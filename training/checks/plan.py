"""Computes a run's batches, updates and checkpoints, and the disk space and memory that it needs."""

import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import convert_bytes
from transformers import PreTrainedModel

from vanilla_transformer.network_operations import linear

from ..data.batching import TokenBudgetBatches
from ..data.epochs import EpochRows
from ..findings import Finding, error, ok, warning
from ..loop.stages import MixtureTrainer
from ..loop.trainer import TranslationTrainer
from ..machine import machine, memory_of
from ..settings.arguments import TrainingArguments
from ..words import counted
from .prepared import COLUMNS, Lengths, Run


logger = logging.getLogger(__name__)

# A share above one of these deserves a warning.
MUCH_PADDING = 0.2
NEARLY_FULL = 0.9
# Maximum rows for timing bfloat16: where it is emulated, more would take long.
MOST_TIMED = 256
MUCH_SLOWER = 1.3


class Plan(NamedTuple):
    """What the run will do. Tokens are counted per update, over all processes, without padding."""

    source_tokens: float
    target_tokens: float
    padding: float
    updates_per_epoch: int | None
    updates: int

    def epochs(self) -> float:
        """The number of passes over the data; 0 for a stream."""
        return self.updates / self.updates_per_epoch if self.updates_per_epoch else 0.0

    def __str__(self) -> str:
        tokens = self.source_tokens + self.target_tokens
        epoch = (
            f"{counted(self.updates_per_epoch, 'update')} an epoch"
            if self.updates_per_epoch
            else "estimated from a sample"
        )
        return (
            f"{self.source_tokens:,.0f} source + {self.target_tokens:,.0f} target tokens an update "
            f"({tokens / (1 - self.padding):,.0f} with padding, {self.padding:.1%} of it padding); {epoch}"
        )


def check_plan(run: Run, trainer: TranslationTrainer) -> list[Finding]:
    """Checks batches, schedule, disk and memory. Logs the sizes of an update and of an epoch."""
    plan = make_plan(run, trainer)
    logger.info("%s", plan)
    findings = [*check_corpora(trainer), *check_batches(run, plan), *check_schedule(run, plan), *check_disk(run, plan)]
    findings += check_precision(run, trainer.args.device)
    # For a sharded model, only real updates show the memory.
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        findings += check_memory(run.model, trainer.args.device)
    return findings


def make_plan(run: Run, trainer: TranslationTrainer) -> Plan:
    """Counts the updates as the Trainer does, and the tokens of its batches."""
    args, lengths, rows = trainer.args, run.lengths["train"], trainer.train_dataset
    loader = trainer.get_train_dataloader()
    per_epoch, updates = (trainer.set_initial_training_values(args, loader)[place] for place in (1, 6))
    growth = 1.0
    if isinstance(rows, EpochRows):
        growth, lengths = rows.growth(), dict(zip(COLUMNS, rows.lengths, strict=True))
    tokens = [growth * lengths[side].sum() for side in COLUMNS]
    if run.recipe.data.streaming:
        sources, targets = (lengths[side].tolist() for side in COLUMNS)
        sample = TokenBudgetBatches(sources, targets, args.per_device_train_batch_tokens)
        share = args.gradient_accumulation_steps * args.world_size / len(sample)
        return Plan(tokens[0] * share, tokens[1] * share, sample.padding, None, updates)
    if args.train_sampling_strategy == "token_budget":
        padding = trainer._batches.padding
    else:
        padding = padding_of(loader.batch_sampler, lengths)
    return Plan(tokens[0] / per_epoch, tokens[1] / per_epoch, padding, per_epoch, updates)


def padding_of(batches: Iterable[list[int]], lengths: Lengths) -> float:
    """The share of padding in these batches, over both sides."""
    tokens = places = 0
    # Iterating must not change the shuffling of the run itself.
    with torch.random.fork_rng(devices=[]):
        for batch in batches:
            for side in lengths.values():
                tokens += side[batch].sum()
                places += side[batch].max() * len(batch)
    return 1 - float(tokens) / float(places)


def check_corpora(trainer: TranslationTrainer) -> Iterator[Finding]:
    """How many rows of each corpus an epoch has, in each stage."""
    if not isinstance(trainer, MixtureTrainer):
        return
    for number, (stage, rows) in enumerate(zip(trainer.stages, trainer.stage_rows, strict=True), 1):
        end = f" until {stage.until}={stage.number}" if stage.until else ""
        name = f"stage {number}{end}: " if trainer.staged else ""
        yield ok("corpora", f"{name}{' '.join(str(rows).split())}")


def check_batches(run: Run, plan: Plan) -> Iterator[Finding]:
    """Reports the size of an update, and checks its padding."""
    yield ok("batches", str(plan))
    strategy = run.recipe.training.train_sampling_strategy
    if strategy != "token_budget" and plan.padding > MUCH_PADDING:
        yield warning(
            "batches",
            f"train_sampling_strategy={strategy}: {plan.padding:.0%} of the work is padding: set it to token_budget",
        )


def check_schedule(run: Run, plan: Plan) -> Iterator[Finding]:
    """Reports the numbers of updates, evaluations and checkpoints, and checks that they are large enough."""
    args = run.recipe.training
    evaluations, saves = occasions(args, "eval", plan), occasions(args, "save", plan)
    epochs = f" ({plan.epochs():.1f} epochs)" if plan.updates_per_epoch else ""
    happens = [
        f"{counted(plan.updates, 'update')}{epochs}",
        counted(evaluations, "evaluation"),
        counted(saves, "checkpoint"),
    ]
    yield ok("schedule", f"{', '.join(happens)} written")
    warmup = args.get_warmup_steps(plan.updates)
    if warmup >= plan.updates:
        yield warning(
            "schedule",
            f"warmup_steps={warmup} covers the whole run of {counted(plan.updates, 'update')}, so the learning "
            "rate never reaches its peak: lower it, or raise max_steps or num_train_epochs",
        )
    if args.average_checkpoints and args.average_checkpoints > saves > 0:
        yield warning(
            "schedule",
            f"average_checkpoints={args.average_checkpoints}, but only {saves} checkpoints are saved: lower save_steps",
        )


def occasions(args: TrainingArguments, kind: str, plan: Plan) -> int:
    """How often the run evaluates ("eval") or saves ("save"), including the end."""
    strategy = getattr(args, f"{kind}_strategy")
    if strategy == "no":
        return 0
    if strategy == "best":
        return occasions(args, "eval", plan)
    if strategy == "epoch":
        return math.ceil(plan.epochs())
    every = getattr(args, f"{kind}_steps")
    # A value below 1 is a share of the run.
    return math.ceil(plan.updates / (every if every >= 1 else math.ceil(every * plan.updates)))


def check_disk(run: Run, plan: Plan) -> Iterator[Finding]:
    """Checks that the kept checkpoints, the one being written, and the model fit on the disk."""
    args = run.recipe.training
    weights = run.model.get_memory_footprint(return_buffers=False)
    # Only the trained weights: with LoRA, the adapters.
    checkpoint = optimizer_bytes(run.model) // 2 * (1 + (args.ema_decay is not None))
    if not args.save_only_model:
        checkpoint += optimizer_bytes(run.model)
    limit = args.save_total_limit + 1 if args.save_total_limit else math.inf
    kept = int(min(occasions(args, "save", plan), limit))
    folder = Path(args.output_dir).absolute()
    there = sum(path.stat().st_size for path in folder.glob("checkpoint-*/*"))
    needed = max(kept * checkpoint - there, 0) + weights
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    limits = f"save_total_limit={args.save_total_limit}, one being written"
    said = (
        f"{convert_bytes(needed)} of {convert_bytes(free)} free at output_dir={args.output_dir}: "
        f"{counted(kept, 'checkpoint')} of {convert_bytes(checkpoint)} ({limits}) and the model"
    )
    yield (
        ok("disk", said)
        if needed <= NEARLY_FULL * free
        else (warning if needed <= free else error)(
            "disk", f"{said}: lower save_total_limit, make room, or choose another output_dir"
        )
    )


def optimizer_bytes(model: PreTrainedModel) -> int:
    """The size in bytes of Adam's two moments of every trained weight."""
    return 2 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def check_precision(run: Run, device: torch.device) -> Iterator[Finding]:
    """Checks whether bfloat16 is slower than float32 here: without hardware support it is many times slower."""
    args, config = run.recipe.training, run.model.config
    if not args.bf16:
        return
    rows = min(MOST_TIMED, args.per_device_train_batch_tokens)
    seconds = [time_product(rows, config.d_model, config.encoder_ffn_dim, device, bf16=bf16) for bf16 in (False, True)]
    factor = seconds[1] / seconds[0]
    said = (
        f"a feed-forward product of {counted(rows, 'row')} takes {factor:.2g} times as long in bfloat16 as in float32"
    )
    yield (
        ok("precision", said)
        if factor < MUCH_SLOWER
        else warning("precision", f"bf16=true is slow on {machine()}: {said}: set it to false, or to auto")
    )


def time_product(rows: int, inputs: int, outputs: int, device: torch.device, bf16: bool) -> float:
    """Seconds of a linear layer's forward and backward pass, the best of three."""
    # Not random, because that would change the random numbers of the run.
    states, weight, bias = (
        torch.ones(shape, device=device, requires_grad=True) for shape in ((rows, inputs), (outputs, inputs), outputs)
    )
    seconds = []
    for _ in range(3):
        start = now()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            linear(states, weight, bias).sum().backward()
        seconds.append(now() - start)
    return min(seconds)


def now() -> float:
    """The time in seconds, after the device has finished its queued work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def check_memory(model: PreTrainedModel, device: torch.device) -> Iterator[Finding]:
    """Checks that weights, gradients and optimizer state fit into memory."""
    weights, state = model.get_memory_footprint(return_buffers=False), optimizer_bytes(model)
    needed, total = weights + state // 2 + state, memory_of(device)
    said = (
        f"{model.num_parameters():,} parameters: weights {convert_bytes(weights)}, gradients "
        f"{convert_bytes(state // 2)}, optimizer {convert_bytes(state)}, on {machine()} with {convert_bytes(total)}"
    )
    yield (
        ok("memory", said)
        if needed <= total
        else error(
            "memory", f"{said}, which is not enough even without activations: lower d_model or the number of layers"
        )
    )

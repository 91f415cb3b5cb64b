"""`vanilla-transformer train RECIPE.yaml --check`: what only real updates tell.

It makes a few of them besides the checks that every run makes, prints everything as a table, and leaves nothing behind.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import numpy as np
import psutil
import torch
from accelerate.utils import convert_bytes
from accelerate.utils.memory import should_reduce_batch_size
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback

from ..data.batching import batch_sizes, token_budget
from ..findings import Finding, error, errors, ok, render, warning
from ..loop.trainer import TranslationTrainer
from ..machine import memory_counts, memory_of, peak_resident
from ..settings.arguments import TrainingArguments
from .inputs import check_inputs
from .plan import NEARLY_FULL, Plan, check_plan, make_plan, now, occasions
from .prepared import Run, longest_rows


# Updates that are timed, after one on the longest batch.
TIMED = 5


def rehearse(run: Run, build_trainer: Callable[..., TranslationTrainer]) -> None:
    """
    `--check`: all checks and a few real updates, in a folder that is thrown away; prints what was found.

    Args:
        run: what would be trained. Its model is used up.
        build_trainer: makes the run's Trainer of a recipe, a model, a tokenizer and rows.

    Raises:
        SystemExit: with status 2, if the run cannot start.
    """
    findings = check_inputs(run)
    if not errors(findings):
        with tempfile.TemporaryDirectory() as folder:
            recipe = run.recipe._replace(training=throwaway(run.recipe.training, folder))
            trainer = build_trainer(recipe, run.model, run.tokenizer, run.rows)
            findings += check_plan(run, trainer)
            if not errors(findings):
                findings += measure(run, trainer)
    if run.recipe.training.process_index == 0:
        print(render(findings))
    if errors(findings):
        raise SystemExit(2)


class Stopwatch(TrainerCallback):
    """Notes when each update ended, and the process's memory before the first."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts."""
        self.resident = psutil.Process().memory_info().rss
        self.ends = [now()]

    def on_step_end(self, args, state, control, **kwargs):
        """Notes one."""
        self.ends.append(now())

    def seconds(self) -> list[float]:
        """How long each update took, its batch's making included."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


class FewBatches:
    """A loader of so many of a loader's batches, after some others."""

    def __init__(self, first: list, loader: Iterable, count: int):
        self.first, self.loader, self.count = first, loader, count

    def __len__(self) -> int:
        return len(self.first) + self.count

    def __iter__(self) -> Iterator:
        return chain(self.first, islice(self.loader, self.count))


def throwaway(args: TrainingArguments, folder: str) -> TrainingArguments:
    """The arguments of the run, for updates that are neither logged nor saved."""
    args = copy.copy(args)
    args.output_dir = folder
    args.eval_strategy = args.logging_strategy = args.save_strategy = "no"
    args.load_best_model_at_end = args.push_to_hub = args.eval_on_start = False
    args.early_stopping_patience = None
    args.report_to = []
    args.disable_tqdm = True
    return args


def measure(run: Run, trainer: TranslationTrainer) -> list[Finding]:
    """Makes one update on the longest batch and some on the run's own first ones, and evaluates one batch."""
    plan, args = make_plan(run, trainer), trainer.args
    accumulation = args.gradient_accumulation_steps
    first = longest_batch(run, trainer)
    longest = [dict(first) for _ in range(accumulation)]
    batches = FewBatches(longest, trainer.get_train_dataloader(), TIMED * accumulation)
    trainer.get_train_dataloader = lambda: batches  # type: ignore[method-assign]
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(stopwatch := Stopwatch())
    args.max_steps = 1 + TIMED
    if counts := memory_counts(args.device):
        counts.reset_peak_memory_stats()
    try:
        trainer.train()
        evaluation = time_evaluation(trainer) if occasions(run.recipe.training, "eval", plan) else 0.0
    except Exception as problem:
        if not should_reduce_batch_size(problem):
            raise
        return [out_of_memory(first, trainer)]
    return [*tell_memory(run, trainer, stopwatch), *tell_time(run, plan, stopwatch.seconds(), evaluation)]


def longest_batch(run: Run, trainer: TranslationTrainer) -> dict[str, torch.Tensor]:
    """The longest rows, as many as train together."""
    args, longest = trainer.args, longest_rows(run.lengths["train"])
    order = np.argsort(-longest, kind="stable")
    size = args.train_batch_size
    if args.train_sampling_strategy == "token_budget":
        size = batch_sizes(longest[order].tolist(), args.per_device_train_batch_tokens)[0]
    return dict(trainer.data_collator(run.tables["train"].take(order[:size]).to_pylist()))


def out_of_memory(batch: dict[str, torch.Tensor], trainer: TranslationTrainer) -> Finding:
    """What to do about a batch that does not fit."""
    args = trainer.args
    name = "tokens" if args.train_sampling_strategy == "token_budget" else "size"
    field = f"per_device_train_batch_{name}"
    rows, width = batch["labels"].shape
    return error(
        "memory",
        f"out of memory with {field}={getattr(args, field)} (the longest batch: {rows} targets of {width} tokens) or "
        f"per_device_eval_batch_tokens={args.per_device_eval_batch_tokens}: lower them, and raise "
        "gradient_accumulation_steps by as much",
    )


def time_evaluation(trainer: TranslationTrainer) -> float:
    """
    Seconds of one evaluation, from a middling batch of it.

    A model that has learned nothing does not end its sentences, so they end where the longest reference does.
    """
    args, rows = trainer.args, trainer.eval_dataset
    batches = list(token_budget(rows, args.per_device_eval_batch_tokens * args.world_size, shuffle=False))
    middle = rows.select(batches[len(batches) // 2])
    start = time.perf_counter()
    trainer.evaluate(middle, max_new_tokens=max(map(len, middle["labels"])))
    return (time.perf_counter() - start) * len(batches)


def tell_memory(run: Run, trainer: TranslationTrainer, stopwatch: Stopwatch) -> Iterator[Finding]:
    """The most memory that was taken, and how much of it the activations were."""
    device = trainer.args.device
    state = sum(
        value.nbytes
        for entry in trainer.optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    )
    gradients = sum(parameter.nbytes for parameter in run.model.parameters() if parameter.requires_grad)
    if counts := memory_counts(device):
        peak, before = counts.max_memory_allocated(device), run.model.get_memory_footprint()
    else:
        peak, before = peak_resident(), stopwatch.resident
    activations = max(peak - before - state - gradients, 0)
    share = peak / memory_of(device)
    said = (
        f"peak {convert_bytes(peak)}, {share:.0%} of {convert_bytes(memory_of(device))}, at most "
        f"{convert_bytes(activations)} of it for activations"
    )
    yield (
        ok("memory", said)
        if share <= NEARLY_FULL
        else warning(
            "memory", f"{said}: lower per_device_train_batch_tokens, and raise gradient_accumulation_steps by as much"
        )
    )


def tell_time(run: Run, plan: Plan, seconds: list[float], evaluation: float) -> Iterator[Finding]:
    """How long the run will take, its last scoring aside."""
    update = statistics.median(seconds[1:])
    evaluations = occasions(run.recipe.training, "eval", plan)
    total = plan.updates * update + evaluations * evaluation
    rate = plan.target_tokens / update
    yield ok(
        "time",
        f"{update:.3g} s an update (median of {TIMED}; the longest batch {seconds[0]:.3g} s), {rate:,.0f} target "
        f"tokens a second; {evaluation:.3g} s an evaluation; about {tqdm.format_interval(total)} (h:m:s) in all",
    )

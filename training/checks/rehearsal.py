"""`vanilla-transformer train RECIPE.yaml --check`: measures time and memory with a few real updates.

It runs all checks of a normal run, makes the updates, and prints the findings as a table. It leaves no files behind.
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
from ..data.corpora import open_corpus
from ..data.transforms import examples
from ..findings import Finding, error, errors, ok, render, warning
from ..loop.checkpoints import CheckpointError
from ..loop.trainer import TranslationTrainer
from ..machine import memory_counts, memory_of, peak_resident
from ..settings.arguments import TrainingArguments
from ..words import counted
from .inputs import check_inputs
from .plan import NEARLY_FULL, Plan, check_plan, make_plan, now, occasions
from .prepared import Run, longest_rows


# Number of timed updates. The first update, on the longest batch, is not one of them.
TIMED = 5
# Examples of each transform, and the number of rows in which they are looked for.
SHOWN, SAMPLE = 5, 2000


def rehearse(run: Run, build_trainer: Callable[..., TranslationTrainer]) -> None:
    """
    `--check`: runs all checks and a few real updates in a temporary folder, and prints the findings.

    Args:
        run: the prepared run. The updates change its model.
        build_trainer: makes the run's Trainer from a recipe, a model, a tokenizer and rows.

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
        print(*transform_examples(run), sep="\n")
    if errors(findings):
        raise SystemExit(2)


def transform_examples(run: Run) -> Iterator[str]:
    """Lines that show what each transform of each corpus does to some of its rows."""
    for number, corpus in enumerate(run.recipe.corpora):
        if not corpus.transforms:
            continue
        rows = islice(rows_of_text(run, number), SAMPLE)
        for transform, lines in examples(corpus, list(rows), run.recipe.training.seed_of_data, SHOWN).items():
            yield f"\n{corpus.name}: {transform.name}, {transform.rate:.0%} of the rows, for example"
            yield from (f"  {line}" for line in lines or ["no row that it changes"])


def rows_of_text(run: Run, number: int) -> Iterator[dict]:
    """The rows of a corpus, as text."""
    if run.recipe.data.streaming:
        return iter(open_corpus(run.recipe.corpora[number]))
    return (row for row in run.rows["train"] if row["corpus"] == number)


class Stopwatch(TrainerCallback):
    """Records the end of each update, and the process's memory before the first one."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the clock."""
        self.resident = psutil.Process().memory_info().rss
        self.ends = [now()]

    def on_step_end(self, args, state, control, **kwargs):
        """Records the end of an update."""
        self.ends.append(now())

    def seconds(self) -> list[float]:
        """The duration of each update, including the time to make its batch."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


class FewBatches:
    """A loader that yields the batches `first`, then `count` batches of another loader."""

    def __init__(self, first: list, loader: Iterable, count: int):
        self.first, self.loader, self.count = first, loader, count

    def __len__(self) -> int:
        return len(self.first) + self.count

    def __iter__(self) -> Iterator:
        return chain(self.first, islice(self.loader, self.count))


def throwaway(args: TrainingArguments, folder: str) -> TrainingArguments:
    """A copy of the run's arguments that neither logs, evaluates nor saves."""
    args = copy.copy(args)
    args.output_dir = folder
    args.eval_strategy = args.logging_strategy = args.save_strategy = "no"
    args.load_best_model_at_end = args.push_to_hub = args.eval_on_start = False
    args.early_stopping_patience = None
    args.report_to = []
    args.disable_tqdm = True
    return args


def measure(run: Run, trainer: TranslationTrainer) -> list[Finding]:
    """
    Makes one update on the longest batch and TIMED updates on the run's first batches, evaluates one batch, and writes
    a checkpoint.
    """
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
        checkpoint = time_checkpoint(trainer) if occasions(run.recipe.training, "save", plan) else 0.0
    except Exception as problem:
        if not should_reduce_batch_size(problem):
            raise
        return [out_of_memory(first, trainer)]
    times = time_findings(run, plan, stopwatch.seconds(), evaluation, checkpoint)
    return [*memory_findings(run, trainer, stopwatch), *times]


def longest_batch(run: Run, trainer: TranslationTrainer) -> dict[str, torch.Tensor]:
    """A batch of the longest rows."""
    args, longest = trainer.args, longest_rows(run.lengths["train"])
    order = np.argsort(-longest, kind="stable")
    size = args.train_batch_size
    if args.train_sampling_strategy == "token_budget":
        size = batch_sizes(longest[order].tolist(), args.per_device_train_batch_tokens)[0]
    return dict(trainer.data_collator(run.tables["train"].take(order[:size]).to_pylist()))


def out_of_memory(batch: dict[str, torch.Tensor], trainer: TranslationTrainer) -> Finding:
    """The error for a batch that does not fit into memory."""
    args = trainer.args
    name = "tokens" if args.train_sampling_strategy == "token_budget" else "size"
    field = f"per_device_train_batch_{name}"
    rows, width = batch["labels"].shape
    return error(
        "memory",
        f"out of memory with {field}={getattr(args, field)} (the longest batch: {counted(rows, 'target')} of "
        f"{counted(width, 'token')}) or per_device_eval_batch_tokens={args.per_device_eval_batch_tokens}: lower them, "
        "and raise gradient_accumulation_steps by the same factor",
    )


def time_evaluation(trainer: TranslationTrainer) -> float:
    """
    Estimates the seconds of one evaluation from its batch of median length.

    An untrained model does not end its sentences, so they are cut at the length of the longest reference.
    """
    args, rows = trainer.args, trainer.eval_dataset
    batches = list(token_budget(rows, args.per_device_eval_batch_tokens * args.world_size, shuffle=False))
    middle = rows.select(batches[len(batches) // 2])
    start = time.perf_counter()
    trainer.evaluate(middle, max_new_tokens=max(map(len, middle["labels"])))
    return (time.perf_counter() - start) * len(batches)


def time_checkpoint(trainer: TranslationTrainer) -> float | None:
    """The seconds of writing a checkpoint into the temporary folder; None if there is no room for it."""
    start = time.perf_counter()
    try:
        trainer._save_checkpoint(trainer.model, trial=None)
    except CheckpointError:
        return None
    return time.perf_counter() - start


def memory_findings(run: Run, trainer: TranslationTrainer, stopwatch: Stopwatch) -> Iterator[Finding]:
    """Reports the peak memory and the activations' part of it."""
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
            "memory",
            f"{said}: lower per_device_train_batch_tokens, and raise gradient_accumulation_steps by the same factor",
        )
    )


def time_findings(
    run: Run, plan: Plan, seconds: list[float], evaluation: float, checkpoint: float | None
) -> Iterator[Finding]:
    """Estimates the time of the run, without the final scoring."""
    update = statistics.median(seconds[1:])
    evaluations, saves = (occasions(run.recipe.training, kind, plan) for kind in ("eval", "save"))
    total = plan.updates * update + evaluations * evaluation + saves * (checkpoint or 0)
    without = "" if checkpoint is not None else "writing checkpoints and "
    saving = "" if checkpoint is None else f", {checkpoint:.3g} s a checkpoint"
    rate = plan.target_tokens / update
    yield ok(
        "time",
        f"{update:.3g} s an update (median of {TIMED}; the longest batch {seconds[0]:.3g} s), {rate:,.0f} target "
        f"tokens a second; {evaluation:.3g} s an evaluation{saving}; "
        f"about {tqdm.format_interval(total)} (h:m:s) in total, without {without}the final scoring",
    )

"""Says before the first update what would end a run later, and what the run will take.

Every run takes the checks that cost next to nothing. `vanilla-transformer train RECIPE.yaml --check`
makes a few real updates besides, prints everything as a table, and leaves nothing behind.
"""

import copy
import json
import logging
import math
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.utils import convert_bytes
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from vanilla_transformer.generation_vanilla_transformer import MAX_EXTRA_TOKENS
from vanilla_transformer.operations_vanilla_transformer import linear

from .arguments import Recipe, TrainingArguments
from .batching import TokenBudgetBatches, batch_sizes, token_budget
from .bpe_dropout import BpeDropoutRows
from .checkpointing import DATA_NAME
from .data import tokenize_pairs
from .errors import UserError
from .machine import machine
from .resuming import fingerprint
from .trainer import TranslationTrainer


logger = logging.getLogger(__name__)

# Updates that are timed, after one on the longest batch.
TIMED = 5
# Rows that stand for a streamed data set, whose length nobody knows.
SAMPLE = 10_000
COLUMNS = {"source": "input_ids", "target": "labels"}

# More than this share of a thing deserves a warning.
MANY_UNKNOWN, TOO_MANY_UNKNOWN = 0.01, 0.2
MANY_LEFT_OUT = 0.05
MUCH_PADDING = 0.2
NEARLY_FULL = 0.9
# bfloat16 is timed on no more rows than tell: where it is emulated, they take long.
MOST_TIMED = 256
MUCH_SLOWER = 1.3

Lengths = dict[str, np.ndarray]


class PreflightError(UserError):
    """A run that would fail later: which fields, what was found, and what would be right."""


class Finding(NamedTuple):
    """One line of the report."""

    verdict: str
    topic: str
    text: str


ok, warning, error = (partial(Finding, verdict) for verdict in ("ok", "warning", "error"))


@dataclass
class Run:
    """What a run has made before it trains: its text, the ids of it, and a model; and from where it goes on."""

    recipe: Recipe
    pairs: Any
    rows: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    checkpoint: str | None = None

    @cached_property
    def data(self) -> dict[str, str]:
        """What is read, by split, in words."""
        return fingerprint(self.recipe.data, self.tables)

    @cached_property
    def tables(self) -> dict[str, pa.Table]:
        """The ids of each split; of a streamed one, those of its first SAMPLE rows."""
        rows = {split: found for split, found in self.rows.items() if isinstance(found, Dataset)}
        if self.recipe.data.streaming:
            pairs = Dataset.from_list(list(self.pairs["train"].take(SAMPLE)))
            rows["train"] = tokenize_pairs(pairs, self.tokenizer, self.recipe.data, "train")
        columns = list(COLUMNS.values())
        return {split: found.with_format("arrow")[:].select(columns) for split, found in rows.items()}

    @cached_property
    def lengths(self) -> dict[str, Lengths]:
        """Tokens of each row's source and target."""
        return {
            split: {side: pc.list_value_length(table[column]).to_numpy() for side, column in COLUMNS.items()}
            for split, table in self.tables.items()
        }


class Plan(NamedTuple):
    """What the run will do. Tokens are those of one update in all processes, without padding."""

    source_tokens: float
    target_tokens: float
    padding: float
    updates_per_epoch: int | None
    updates: int

    def epochs(self) -> float:
        """How often the data is seen; 0 where it is streamed."""
        return self.updates / self.updates_per_epoch if self.updates_per_epoch else 0.0

    def __str__(self) -> str:
        tokens = self.source_tokens + self.target_tokens
        epoch = f"{self.updates_per_epoch:,} updates an epoch" if self.updates_per_epoch else "estimated from a sample"
        return (
            f"{self.source_tokens:,.0f} source + {self.target_tokens:,.0f} target tokens an update "
            f"({tokens / (1 - self.padding):,.0f} with padding, {self.padding:.1%} of it padding); {epoch}"
        )


def require(findings: list[Finding]) -> None:
    """
    Logs the warnings.

    Raises:
        PreflightError: there are errors; it tells all of them.
    """
    for finding in findings:
        if finding.verdict == "warning":
            logger.warning("%s: %s", finding.topic, finding.text)
    if found := errors(findings):
        raise PreflightError("\n".join(found))


def errors(findings: list[Finding]) -> list[str]:
    """What the findings have against the run."""
    return [finding.text for finding in findings if finding.verdict == "error"]


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


def render(findings: list[Finding]) -> str:
    """The findings as a table of lines to print."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for verdict, topic, text in findings:
        start = f"{verdict:<8} {topic:<{width}}  "
        lines.append(textwrap.fill(text, 120, initial_indent=start, subsequent_indent=" " * len(start)))
    found = len(errors(findings))
    end = f"{found} error{'s' if found > 1 else ''}: the run cannot start." if found else "The run can start."
    return "\n".join([*lines, end])


# What can be known from the text, the ids and the fields alone.


def check_inputs(run: Run) -> list[Finding]:
    """Findings on data, vocabulary, lengths, decoding and fields, before there is a Trainer."""
    checks = (check_rows, check_resumption, check_vocabulary, check_lengths, check_decoding, check_fields)
    return [finding for check in checks for finding in check(run)]


def check_rows(run: Run) -> Iterator[Finding]:
    """How many rows there are for each split, and how many the limits on length leave out."""
    data, args = run.recipe.data, run.recipe.training
    counts = {split: len(rows) for split, rows in run.pairs.items() if isinstance(rows, Dataset)}
    kept = {split: len(rows) for split, rows in run.rows.items() if isinstance(rows, Dataset)}
    told = ", ".join(f"{count:,} {split}" for split, count in (counts | kept).items())
    streamed = f"; train is streamed, and told from its first {SAMPLE:,}" if data.streaming else ""
    yield ok("data", f"rows: {told}{streamed}")
    for split, count in kept.items():
        if count < args.world_size:
            yield error(
                "data",
                f"{split}_file: {count} rows cannot be dealt to {args.world_size} processes: add data, or take fewer",
            )
    left_out = 1 - kept["train"] / counts["train"] if "train" in kept and "train" in counts else 0
    if left_out > MANY_LEFT_OUT:
        yield warning(
            "data",
            f"{left_out:.1%} of the training rows are longer than max_source_length={data.max_source_length} or "
            f"max_target_length={data.max_target_length}, and left out: raise them, or learn more subwords",
        )


def check_resumption(run: Run) -> Iterator[Finding]:
    """Whether a run that is resumed reads what it has read before."""
    path = Path(run.checkpoint or "", DATA_NAME)
    if run.checkpoint is None or not path.exists():
        return
    for split, before in json.loads(path.read_text(encoding="utf-8")).items():
        if (now := run.data.get(split, before)) != before:
            yield error(
                "data",
                f"{split}: {now}, but {run.checkpoint} is of a run with {before}: give the same data, or begin a new "
                "run in another output_dir",
            )


def check_vocabulary(run: Run) -> Iterator[Finding]:
    """Whether every id has its row in the embeddings and means one thing, and how much of the text is unknown."""
    tokenizer, config = run.tokenizer, run.model.config
    name = f"tokenizer={run.recipe.tokenizer.tokenizer}"
    special = {part: getattr(tokenizer, f"{part}_token_id") for part in ("pad", "bos", "eos", "unk")}
    numbers = ", ".join(f"{part} {number}" for part, number in special.items())
    asked = run.recipe.tokenizer.vocab_size
    few = "" if run.recipe.tokenizer.tokenizer or len(tokenizer) == asked else f" (the text holds no {asked:,})"
    yield ok("vocabulary", f"{len(tokenizer):,} subwords{few}; {numbers}")

    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        yield error(
            "vocabulary",
            f"{name} has {len(tokenizer)} subwords but numbers them up to {highest}, and the network has vocab_size="
            f"{config.vocab_size}: number them without gaps",
        )
    for part in ("bos", "eos", "unk"):
        if special[part] == special["pad"]:
            yield error(
                "vocabulary",
                f"{name}: pad_token and {part}_token share the id {special['pad']}, and padding is never learned: "
                "give the tokenizer a pad_token of its own",
            )
    if special["bos"] == special["eos"]:
        yield warning("vocabulary", f"{name}: bos_token and eos_token share the id {special['eos']}")
    for split, table in run.tables.items():
        for side, column in COLUMNS.items():
            yield from check_ids(f"{split} {side}", pc.list_flatten(table[column]), special["unk"], config.vocab_size)


def check_ids(where: str, ids: pa.ChunkedArray, unknown: int | None, vocab_size: int) -> Iterator[Finding]:
    """Whether all ids of a side have a row in the embeddings, and how many are the unknown token."""
    lowest, highest = pc.min_max(ids).as_py().values()
    if lowest < 0 or highest >= vocab_size:
        yield error(
            "vocabulary",
            f"{where}: ids from {lowest} to {highest}, and vocab_size={vocab_size} has 0 to {vocab_size - 1}: take the "
            "tokenizer that the network was made for",
        )
    share = 0.0 if unknown is None else pc.sum(pc.equal(ids, unknown)).as_py() / len(ids)
    if share > MANY_UNKNOWN:
        verdict = error if share > TOO_MANY_UNKNOWN else warning
        yield verdict(
            "vocabulary",
            f"{where}: {share:.1%} of the tokens are unknown to the tokenizer: take one made for this language, or "
            "leave tokenizer out to learn one",
        )


def check_lengths(run: Run) -> Iterator[Finding]:
    """Whether the longest row fits into a batch, and its last token onto a learned position."""
    args, lengths = run.recipe.training, run.lengths
    sides = [
        f"{side} {found.min()} to {found.max()} (mean {found.mean():.1f})" for side, found in lengths["train"].items()
    ]
    yield ok("lengths", f"tokens: {', '.join(sides)}")
    budgets = {"train": "per_device_train_batch_tokens", "validation": "per_device_eval_batch_tokens"}
    if args.train_sampling_strategy != "token_budget":
        del budgets["train"]
    for split, field in budgets.items():
        if split in lengths and (found := longest_rows(lengths[split])).max() > getattr(args, field):
            remedy = ", or leave longer rows out by max_source_length and max_target_length" if split == "train" else ""
            yield error(
                "lengths",
                f"{split}, row {found.argmax() + 1}: {found.max()} tokens are more than a batch may hold, "
                f"{field}={getattr(args, field)}: raise it{remedy}",
            )
    if run.model.config.position_embedding_type == "learned":
        yield from check_positions(run)


def longest_rows(lengths: Lengths) -> np.ndarray:
    """Tokens of each row's longer side."""
    return np.maximum(lengths["source"], lengths["target"])


def check_positions(run: Run) -> Iterator[Finding]:
    """Whether learned positions reach the end of every row, also of those that are translated after the training."""
    limit = run.model.config.max_position_embeddings
    longest = {split: longest_rows(found) for split, found in run.lengths.items()}
    if "test" in run.pairs:
        ids = run.tokenizer(list(run.pairs["test"]["source"]), return_attention_mask=False)["input_ids"]
        longest["test"] = np.array([len(row) for row in ids])
    for split, found in longest.items():
        if found.max() > limit:
            yield error(
                "lengths",
                f"{split}, row {found.argmax() + 1}: {found.max()} tokens, but learned positions reach "
                f"max_position_embeddings={limit}: raise it, or set position_embedding_type=sinusoidal",
            )


def check_decoding(run: Run) -> Iterator[Finding]:
    """Whether the generation config can be saved and used, and lets translations be as long as the references."""
    generation, config, args = run.model.generation_config, run.model.config, run.recipe.training
    limit = generation.max_new_tokens
    told = f"{limit} tokens" if limit else f"the source's length + {MAX_EXTRA_TOKENS}"
    yield ok(
        "decoding",
        f"num_beams={generation.num_beams} ({args.generation_num_beams} while training), at most {told}",
    )
    try:
        # As strictly as when it is saved.
        generation.validate(strict=True)
    except ValueError as problem:
        yield error("decoding", f"the generation config cannot be saved: {problem}")
    if limit and config.position_embedding_type == "learned" and limit > config.max_position_embeddings:
        yield error(
            "decoding",
            f"max_new_tokens={limit} goes beyond the learned positions, max_position_embeddings="
            f"{config.max_position_embeddings}: lower the one or raise the other",
        )
    if "validation" in run.lengths:
        yield from check_cuts(limit, args.generation_max_length, run.lengths["validation"])


def check_cuts(max_new_tokens: int | None, max_length: int | None, lengths: Lengths) -> Iterator[Finding]:
    """Whether a limit on the length of translations cuts what should be as long as the references."""
    most: Any = max_new_tokens or lengths["source"] + MAX_EXTRA_TOKENS
    # transformers counts the decoder's start in max_length.
    limits = {"max_new_tokens": most, "generation_max_length": max_length and max_length - 1}
    for name, limit in limits.items():
        if limit is not None and (cut := (lengths["target"] > limit).sum()):
            yield warning(
                "decoding",
                f"{name}={max_new_tokens if name == 'max_new_tokens' else max_length} cuts {cut:,} of "
                f"{len(lengths['target']):,} validation translations, the longest of {lengths['target'].max()} tokens: "
                "raise it",
            )


def check_fields(run: Run) -> Iterator[Finding]:
    """Whether what was asked of evaluation, checkpoints and averages goes together."""
    args = run.recipe.training
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    chooses = args.load_best_model_at_end or args.early_stopping_patience or args.save_strategy == "best"
    if args.eval_strategy != "no" and "validation" not in run.rows:
        yield error(
            "fields",
            f"eval_strategy={IntervalStrategy(args.eval_strategy).value}, without a validation split: name one by "
            "validation_file, or set eval_strategy=no and load_best_model_at_end=false",
        )
    if args.eval_on_start and "validation" not in run.rows:
        yield error("fields", "eval_on_start=true, without a validation split: name validation_file, or leave it out")
    if args.save_only_model and args.save_strategy != "no":
        yield warning(
            "fields",
            "save_only_model=true leaves the states of the optimizer and the schedule out of checkpoints: this run "
            "cannot be resumed",
        )
    if args.learning_rate is None and args.warmup_steps < 1:
        yield error(
            "fields",
            f"learning_rate is left out, and the paper's peak is (d_model * warmup_steps)**-0.5, which warmup_steps="
            f"{args.warmup_steps:g} makes no sense of: set learning_rate, or warmup_steps of at least 1",
        )
    if chooses and metric not in ("loss", "perplexity") and not args.predict_with_generate:
        yield error(
            "fields",
            f"metric_for_best_model={metric} scores translations, and predict_with_generate=false makes none: set it "
            "to true, or choose by loss",
        )
    if args.early_stopping_patience and not (args.load_best_model_at_end or args.average_checkpoints):
        yield warning(
            "fields",
            "early_stopping_patience ends the run after its best checkpoint, and load_best_model_at_end=false keeps "
            "the last: set it to true",
        )


# What the Trainer's own batches and the machine add to it.


def check_plan(run: Run, trainer: TranslationTrainer) -> list[Finding]:
    """Findings on batches, schedule, disk and memory; logs what an update and an epoch are."""
    plan = make_plan(run, trainer)
    logger.info("%s", plan)
    findings = [*check_batches(run, plan), *check_schedule(run, plan), *check_disk(run, plan)]
    findings += check_precision(run, trainer.args.device)
    # A sharded model takes its share of every process's memory: only the updates can tell.
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        findings += check_memory(run.model, trainer.args.device)
    return findings


def make_plan(run: Run, trainer: TranslationTrainer) -> Plan:
    """Counts the updates as the Trainer does, and the tokens of its batches."""
    args, lengths = trainer.args, run.lengths["train"]
    loader = trainer.get_train_dataloader()
    per_epoch, updates = (trainer.set_initial_training_values(args, loader)[place] for place in (1, 6))
    growth = trainer.train_dataset.growth() if isinstance(trainer.train_dataset, BpeDropoutRows) else 1
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
    """Share of the places in these batches that hold padding, both sides together."""
    tokens = places = 0
    # The run must shuffle as if nobody had looked.
    with torch.random.fork_rng(devices=[]):
        for batch in batches:
            for side in lengths.values():
                tokens += side[batch].sum()
                places += side[batch].max() * len(batch)
    return 1 - float(tokens) / float(places)


def check_batches(run: Run, plan: Plan) -> Iterator[Finding]:
    """What an update is."""
    yield ok("batches", str(plan))
    strategy = run.recipe.training.train_sampling_strategy
    if strategy != "token_budget" and plan.padding > MUCH_PADDING:
        yield warning(
            "batches",
            f"train_sampling_strategy={strategy}: {plan.padding:.0%} of the work is padding: set it to token_budget",
        )


def check_schedule(run: Run, plan: Plan) -> Iterator[Finding]:
    """How many updates, evaluations and checkpoints there will be, and whether they are enough."""
    args = run.recipe.training
    evaluations, saves = occasions(args, "eval", plan), occasions(args, "save", plan)
    epochs = f" ({plan.epochs():.1f} epochs)" if plan.updates_per_epoch else ""
    yield ok("schedule", f"{plan.updates:,} updates{epochs}, {evaluations} evaluations, {saves} checkpoints written")
    warmup = args.get_warmup_steps(plan.updates)
    if warmup >= plan.updates:
        yield warning(
            "schedule",
            f"warmup_steps={warmup} lasts for all of the {plan.updates} updates, and the learning rate never reaches "
            "its peak: lower it, or raise max_steps or num_train_epochs",
        )
    if args.average_checkpoints and args.average_checkpoints > saves > 0:
        yield warning(
            "schedule",
            f"average_checkpoints={args.average_checkpoints}, but only {saves} will be written: lower save_steps",
        )


def occasions(args: TrainingArguments, kind: str, plan: Plan) -> int:
    """How often the run evaluates ("eval") or saves ("save"), the end included."""
    strategy = getattr(args, f"{kind}_strategy")
    if strategy == "no":
        return 0
    if strategy == "best":
        return occasions(args, "eval", plan)
    if strategy == "epoch":
        return math.ceil(plan.epochs())
    every = getattr(args, f"{kind}_steps")
    # Below 1 it is a share of the run.
    return math.ceil(plan.updates / (every if every >= 1 else math.ceil(every * plan.updates)))


def check_disk(run: Run, plan: Plan) -> Iterator[Finding]:
    """Whether the checkpoints that are kept, the one being written, and the model itself find room."""
    args = run.recipe.training
    weights = run.model.get_memory_footprint(return_buffers=False)
    # Of what is trained: with adapters, these.
    checkpoint = optimizer_bytes(run.model) // 2 * (1 + (args.ema_decay is not None))
    if not args.save_only_model:
        checkpoint += optimizer_bytes(run.model)
    limit = args.save_total_limit + 1 if args.save_total_limit else math.inf
    count = int(min(occasions(args, "save", plan), limit))
    folder = Path(args.output_dir).absolute()
    there = sum(path.stat().st_size for path in folder.glob("checkpoint-*/*"))
    needed = max(count * checkpoint - there, 0) + weights
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    said = (
        f"{convert_bytes(needed)} of {convert_bytes(free)} free at output_dir={args.output_dir}: {count} checkpoints "
        f"of {convert_bytes(checkpoint)} (save_total_limit={args.save_total_limit}, one being written) and the model"
    )
    yield (
        ok("disk", said)
        if needed <= NEARLY_FULL * free
        else (warning if needed <= free else error)(
            "disk", f"{said}: lower save_total_limit, make room, or choose another output_dir"
        )
    )


def optimizer_bytes(model: PreTrainedModel) -> int:
    """Adam's two moments of every weight that is trained."""
    return 2 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def check_precision(run: Run, device: torch.device) -> Iterator[Finding]:
    """Whether bfloat16 is slower than float32 here: without instructions for it, it is many times slower."""
    args, config = run.recipe.training, run.model.config
    if not args.bf16:
        return
    rows = min(MOST_TIMED, args.per_device_train_batch_tokens)
    seconds = [time_product(rows, config.d_model, config.encoder_ffn_dim, device, bf16=bf16) for bf16 in (False, True)]
    factor = seconds[1] / seconds[0]
    said = f"a feed-forward product of {rows} rows takes {factor:.2g} times as long in bfloat16 as in float32"
    yield (
        ok("precision", said)
        if factor < MUCH_SLOWER
        else warning("precision", f"bf16=true is slow on {machine()}: {said}: set it to false, or to auto")
    )


def time_product(rows: int, inputs: int, outputs: int, device: torch.device, bf16: bool) -> float:
    """Seconds that a product of the network takes with its gradients, at best of three."""
    # No random numbers: the run must draw as if nobody had looked.
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
    """The time once the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def check_memory(model: PreTrainedModel, device: torch.device) -> Iterator[Finding]:
    """Whether weights, gradients and the optimizer's state fit at all."""
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


def memory_of(device: torch.device) -> int:
    """Bytes of memory of an accelerator that has its own, or of the machine."""
    counts = memory_counts(device)
    return counts.mem_get_info(device)[1] if counts else psutil.virtual_memory().total


def memory_counts(device: torch.device) -> Any:
    """torch's module for a device that counts memory of its own (CUDA, XPU); None where it is the machine's."""
    module = torch.get_device_module(device)
    return module if hasattr(module, "mem_get_info") else None


# What only real updates tell.


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
    # A batch of a stream tells where it ends; this one is of no place.
    place = {"position": None} if run.recipe.data.streaming else {}
    longest = [first | place for _ in range(accumulation)]
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


def peak_resident() -> int:
    """The most bytes of memory that this process has held."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


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

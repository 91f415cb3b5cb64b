"""Checks text, ids and fields before the first update, for errors that would end the run later."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from vanilla_transformer.generation_vanilla_transformer import MAX_EXTRA_TOKENS
from vanilla_transformer.tokenization_units import kind_of_tokens

from ..data.languages import target_languages
from ..findings import Finding, error, ok, warning
from ..loop.checkpoints import DATA_NAME
from ..settings.rules import check_fields
from ..words import counted
from .prepared import COLUMNS, SAMPLE, Lengths, Run, longest_rows


# A share above one of these deserves a warning (for TOO_MANY_UNKNOWN, an error).
MANY_UNKNOWN, TOO_MANY_UNKNOWN = 0.01, 0.2
MANY_LEFT_OUT = 0.05


def check_inputs(run: Run) -> list[Finding]:
    """Checks data, vocabulary, lengths, decoding and fields. This does not need a Trainer."""
    checks = (check_rows, check_resumption, check_vocabulary, check_lengths, check_decoding)
    found = [finding for check in checks for finding in check(run)]
    return [*found, *check_fields(run.recipe.training, has_validation="validation" in run.rows)]


def check_rows(run: Run) -> Iterator[Finding]:
    """Reports the number of rows in each split, and checks how many training rows the length limits skip."""
    data, args = run.recipe.data, run.recipe.training
    counts = {split: len(rows) for split, rows in run.pairs.items() if isinstance(rows, Dataset)}
    kept = {split: len(rows) for split, rows in run.rows.items() if isinstance(rows, Dataset)}
    listed = ", ".join(f"{count:,} {split}" for split, count in (counts | kept).items())
    streamed = f"; train is streamed, and its first {SAMPLE:,} rows are checked" if data.streaming else ""
    yield ok("data", f"rows: {listed}{streamed}")
    for split, rows in kept.items():
        if rows < args.world_size:
            yield error(
                "data",
                f"{split}_file: {counted(rows, 'row')} for {args.world_size} processes: add data, or use fewer",
            )
    left_out = 1 - kept["train"] / counts["train"] if "train" in kept and "train" in counts else 0
    if left_out > MANY_LEFT_OUT:
        yield warning(
            "data",
            f"{left_out:.1%} of the training rows are longer than max_source_length={data.max_source_length} or "
            f"max_target_length={data.max_target_length} and are skipped: raise them, or learn more subwords",
        )


def check_resumption(run: Run) -> Iterator[Finding]:
    """Checks that a resumed run reads the same data as before."""
    path = Path(run.checkpoint or "", DATA_NAME)
    if run.checkpoint is None or not path.exists():
        return
    for split, before in json.loads(path.read_text(encoding="utf-8")).items():
        if (now := run.data.get(split, before)) != before:
            yield error(
                "data",
                f"{split}: {now}, but {run.checkpoint} is from a run with {before}: give the same data, or start a new "
                "run in another output_dir",
            )


def check_vocabulary(run: Run) -> Iterator[Finding]:
    """Checks that every id has an embedding and only one meaning, and how much of the text is unknown."""
    tokenizer, config = run.tokenizer, run.model.config
    name = f"tokenizer={run.recipe.tokenizer.tokenizer}"
    special = {part: getattr(tokenizer, f"{part}_token_id") for part in ("pad", "bos", "eos", "unk")}
    numbers = ", ".join(f"{part} {number}" for part, number in special.items())
    asked = run.recipe.tokenizer.vocab_size
    exact = run.recipe.tokenizer.tokenizer or run.recipe.tokenizer.units or tokenizer.vocab_size >= asked
    few = "" if exact else f" (the text has fewer than {asked:,})"
    yield ok("vocabulary", f"{len(tokenizer):,} {kind_of_tokens(tokenizer)}{few}; {numbers}")

    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        yield error(
            "vocabulary",
            f"{name} has {len(tokenizer)} subwords but ids up to {highest}, and the network has vocab_size="
            f"{config.vocab_size}: number the ids without gaps",
        )
    for part in ("bos", "eos", "unk"):
        if special[part] == special["pad"]:
            yield error(
                "vocabulary",
                f"{name}: pad_token and {part}_token share the id {special['pad']}, but padding is never learned: "
                "give the tokenizer a pad_token of its own",
            )
    if special["bos"] == special["eos"]:
        yield warning("vocabulary", f"{name}: bos_token and eos_token share the id {special['eos']}")
    for split, table in run.tables.items():
        for side, column in COLUMNS.items():
            yield from check_ids(f"{split} {side}", pc.list_flatten(table[column]), special["unk"], config.vocab_size)


def check_ids(where: str, ids: pa.ChunkedArray, unknown: int | None, vocab_size: int) -> Iterator[Finding]:
    """Checks that all ids of a side have an embedding, and how many are the unknown token."""
    lowest, highest = pc.min_max(ids).as_py().values()
    if lowest < 0 or highest >= vocab_size:
        yield error(
            "vocabulary",
            f"{where}: ids from {lowest} to {highest}, but vocab_size={vocab_size} allows 0 to {vocab_size - 1}: use "
            "the network's own tokenizer",
        )
    share = 0.0 if unknown is None else pc.sum(pc.equal(ids, unknown)).as_py() / len(ids)
    if share > MANY_UNKNOWN:
        verdict = error if share > TOO_MANY_UNKNOWN else warning
        yield verdict(
            "vocabulary",
            f"{where}: {share:.1%} of the tokens are unknown to the tokenizer: use a tokenizer for this language, or "
            "leave tokenizer out to learn one",
        )


def check_lengths(run: Run) -> Iterator[Finding]:
    """Checks that the longest row fits into a batch and into the learned positions."""
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
            remedy = ", or skip longer rows with max_source_length and max_target_length" if split == "train" else ""
            yield error(
                "lengths",
                f"{split}, row {found.argmax() + 1}: {found.max()} tokens are more than a batch may hold, "
                f"{field}={getattr(args, field)}: raise it{remedy}",
            )
    if run.model.config.position_embedding_type == "learned":
        yield from check_positions(run)


def check_positions(run: Run) -> Iterator[Finding]:
    """Checks that there are learned positions for every row, including the test rows translated after training."""
    limit = run.model.config.max_position_embeddings
    longest = {split: longest_rows(found) for split, found in run.lengths.items()}
    if "test" in run.pairs:
        test = run.pairs["test"]
        options = {"return_attention_mask": False, **target_languages(test)}
        ids = run.tokenizer(list(test["source"]), **options)["input_ids"]
        longest["test"] = np.array([len(row) for row in ids])
    for split, found in longest.items():
        if found.max() > limit:
            yield error(
                "lengths",
                f"{split}, row {found.argmax() + 1}: {found.max()} tokens, but there are only "
                f"max_position_embeddings={limit} positions: raise it, or set position_embedding_type=sinusoidal",
            )


def check_decoding(run: Run) -> Iterator[Finding]:
    """Checks that the generation config is valid, and allows translations as long as the references."""
    generation, config, args = run.model.generation_config, run.model.config, run.recipe.training
    limit = generation.max_new_tokens
    longest = f"{limit} tokens" if limit else f"the source's length + {MAX_EXTRA_TOKENS}"
    yield ok(
        "decoding",
        f"num_beams={generation.num_beams} ({args.generation_num_beams} while training), at most {longest}",
    )
    try:
        # As strict as the check when it is saved.
        generation.validate(strict=True)
    except ValueError as problem:
        yield error("decoding", f"the generation config cannot be saved: {problem}")
    if limit and config.position_embedding_type == "learned" and limit > config.max_position_embeddings:
        yield error(
            "decoding",
            f"max_new_tokens={limit} exceeds the learned positions, max_position_embeddings="
            f"{config.max_position_embeddings}: lower the first or raise the second",
        )
    if "validation" in run.lengths:
        yield from check_cuts(limit, args.generation_max_length, run.lengths["validation"])


def check_cuts(max_new_tokens: int | None, max_length: int | None, lengths: Lengths) -> Iterator[Finding]:
    """Checks whether the limits on the length of translations are shorter than some references."""
    most: Any = max_new_tokens or lengths["source"] + MAX_EXTRA_TOKENS
    # transformers counts the decoder's start token in max_length.
    limits = {"max_new_tokens": most, "generation_max_length": max_length and max_length - 1}
    for name, limit in limits.items():
        if limit is not None and (cut := (lengths["target"] > limit).sum()):
            yield warning(
                "decoding",
                f"{name}={max_new_tokens if name == 'max_new_tokens' else max_length} cuts {cut:,} of "
                f"{counted(len(lengths['target']), 'validation translation')}, the longest of "
                f"{lengths['target'].max()} tokens: raise it",
            )

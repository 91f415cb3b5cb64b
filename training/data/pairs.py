"""Loads parallel text from files, a Hub dataset or the phrasebook, checks it, and turns it into rows of token ids.

Faults in the data raise a DataError that names the place, before anything is learned from it.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from vanilla_transformer.loading import text_fault

from ..errors import DataError
from ..files import missing
from ..model_names import is_path
from ..settings.arguments import PHRASEBOOK, DataArguments
from ..settings.corpora import Corpus
from ..settings.rules import check_data
from ..words import counted
from .encoding import WORDS, encode_pairs
from .filters import (
    FilterReport,
    Tests,
    filter_rows,
    is_empty,
    language_tests,
    length_limits,
    ratio_limit,
    text_tests,
)
from .languages import LANGUAGES, language_fault, with_languages
from .reading.formats import DOCUMENTS, read_rows, suffix_of
from .reading.lines import read_parallel_lines
from .transforms import PLANNED, transform_batch


logger = logging.getLogger(__name__)

# The columns of a file or dataset by name: lists, or columns that `datasets` reads lazily.
Columns = dict[str, Sequence[Any]]

SPLITS = ("train", "validation", "test")
SIDES = ("source", "target")
# The column with the group of each row, of those that are scored.
GROUP = "group"
# Without a validation split, at most every 20th training row and at most 1,000 rows are held out.
LEAST_STEP, MOST_HELD_OUT = 20, 1000
# A column of a `translation`, which may lie in another column.
IN_TRANSLATION = re.compile(r"(?:.*\.)?translation\.[^.]+$")
# Maximum characters of the names that a message lists.
LISTED = 300
# Compact: 32 bits per token; the default of `datasets` is 64.
ENCODED = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


def expand_path(path: str, folder: str | None = None) -> Path:
    """`path` with its environment variables and ~ filled in, relative to `folder` if that is given."""
    for name in re.findall(r"\$\{?(\w+)", path):
        if name not in os.environ:
            raise DataError(f"${name} is not set: {path!r} needs this environment variable")
    expanded = Path(os.path.expanduser(os.path.expandvars(path)))
    return expand_path(folder) / expanded if folder else expanded


def load_pairs(
    data: DataArguments,
    report: FilterReport | None = None,
    splits: Sequence[str] | None = None,
    columns: Sequence[str] = (),
) -> DatasetDict:
    """
    Loads the parallel text that `data` names.

    Training rows with an empty side, and those that a filter of `data` finds, are skipped. The other splits keep all
    rows, since scores are comparable only over the same rows; a warning counts their empty sides.

    Args:
        data: locates and filters the text.
        report: counts the skipped training rows, to be logged later. Without it they are logged now.
        splits: the splits to load. Default: all, but train only if it is not streamed.
        columns: other columns of text to keep in the training split.

    Returns:
        The existing splits among train (unless it is streamed), validation and test, with the string columns `source`
        and `target`.

    Raises:
        DataError: see the message.
    """
    check_data(data)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    splits = splits or _in_memory(data)
    loaded = _load_dataset(data, splits) if data.dataset else _load_files(data, splits)
    if data.streaming and not loaded:
        raise DataError("with streaming there is no data to score the model on: give validation or test data")
    filters = report or FilterReport()
    pairs = DatasetDict({split: _clean(found, split, data, filters, columns) for split, found in loaded.items()})
    if report is None and "train" in pairs:
        _log(filters)
    return pairs


def training_texts(pairs: Dataset | datasets.IterableDataset) -> Iterator[str]:
    """Every source and every target, for train_tokenizer."""
    for batch in pairs.iter(batch_size=1000):
        yield from chain(batch["source"], batch["target"])


def training_pairs(pairs: Dataset | datasets.IterableDataset) -> Iterator[tuple[str, str]]:
    """Every source with its target, for train_unit_tokenizer."""
    for batch in pairs.iter(batch_size=1000):
        yield from zip(batch["source"], batch["target"], strict=True)


def _in_memory(data: DataArguments) -> tuple[str, ...]:
    """The splits that are loaded into memory."""
    return SPLITS[1:] if data.streaming else SPLITS


def _load_dataset(data: DataArguments, splits: Sequence[str]) -> dict[str, Columns]:
    assert data.dataset is not None
    if data.dataset.startswith(PHRASEBOOK):
        from .phrasebook import load_phrasebook

        pair = data.dataset.removeprefix(PHRASEBOOK)
        loaded = read(data.dataset, load_phrasebook, pair, train_size=data.phrasebook_size)
    else:
        path = expand_path(data.dataset)
        if (data.dataset.startswith("$") or is_path(data.dataset)) and not path.exists():
            raise DataError(f"dataset={missing(path)}")
        # Streaming loads the other splits without downloading the whole dataset.
        loaded = read(data.dataset, datasets.load_dataset, str(path), data.dataset_config, streaming=data.streaming)
    found = [split for split in SPLITS if split in loaded]
    if not found:
        raise DataError(f"{data.dataset}: no split is named {_listed(SPLITS)}: there are {_listed(loaded)}")
    return {split: _columns(loaded[split]) for split in found if split in splits}


def _load_files(data: DataArguments, splits: Sequence[str]) -> dict[str, Columns]:
    files = {split: getattr(data, f"{split}_file") for split in SPLITS}
    paths = {split: [expand_path(name, data.data_dir) for name in names] for split, names in files.items() if names}
    # All of them before the first is read.
    for path in chain(*paths.values()):
        if not path.exists():
            raise DataError(missing(path, "file"))
    return {split: _load_split(split, found, data) for split, found in paths.items() if split in splits}


def _load_split(split: str, paths: list[Path], data: DataArguments) -> Columns:
    if len(paths) == 1:
        return _load_table(paths[0], data.has_header)
    if len(paths) == 2 or split == "test":
        return _load_parallel_text(*paths)
    raise DataError(f"{split}_file names {len(paths)} files: give one data file, or two of parallel text")


def _load_parallel_text(source: Path, *targets: Path) -> Columns:
    columns: Columns = {}
    for number, path in enumerate(targets, 1):
        pairs = list(read_parallel_lines(source, path))
        columns["source"] = [text for text, _ in pairs]
        columns["target" if number == 1 else f"reference_{number}"] = [translation for _, translation in pairs]
    return columns


def further_references(columns: Collection[str]) -> list[str]:
    """The columns of the second reference, the third and so on. The first is the target."""
    return list(takewhile(columns.__contains__, map("reference_{}".format, range(2, len(columns) + 2))))


def _load_table(path: Path, has_header: bool) -> Columns:
    if path.suffix == ".parquet":
        return _columns(read(path, datasets.load_dataset, "parquet", data_files=str(path), split="train"))
    first, rows = 0, []
    for number, row in read_rows(path, has_header):
        first = first or number
        rows.append(row)
    if rows and suffix_of(path) in DOCUMENTS and not any(row.get("target", True) for row in rows):
        raise DataError(f"{path}, line {first}: not translated, as all {len(rows)} units of the file")
    names = dict.fromkeys(chain.from_iterable(rows))
    return {name: [row.get(name) for row in rows] for name in names}


def read(name: str | Path, load: Callable, *args: Any, **options: Any) -> Any:
    """Calls a function of `datasets`, whose errors seldom name the dataset or file."""
    try:
        return load(*args, **options)
    except (DatasetsError, OSError, ValueError, TypeError) as error:
        raise DataError(f"{name}: cannot be read ({error.__cause__ or error})") from error


def _columns(rows: Dataset | datasets.IterableDataset) -> Columns:
    if isinstance(rows, datasets.IterableDataset):
        rows = Dataset.from_list(list(rows), features=rows.features)
    rows = rows.flatten()  # a `translation` becomes translation.en, translation.de
    return {name: rows[name] for name in rows.column_names}


def _clean(
    columns: Columns, split: str, data: DataArguments, report: FilterReport, others: Sequence[str] = ()
) -> Dataset:
    """The two columns, with every value checked, without the rows that training should not use; in training, others."""
    if not any(map(len, columns.values())):
        raise DataError(f"{split}: the data is empty, it has no rows")
    limit = data.max_train_samples if split == "train" else data.max_eval_samples
    names = dict(zip(SIDES, choose_columns(list(columns), split, data), strict=True))
    names |= choose_language_columns(list(columns), split, data)
    texts: Columns = {part: _rows(columns[name], limit, part, split) for part, name in names.items()}
    for index, values in enumerate(zip(*texts.values(), strict=True)):
        refuse_faults(dict(zip(texts, values, strict=True)), f"{split}, row {index + 1}")
    if split != "train":
        texts |= _scoring(columns, limit, split, data)
    for name in others if split == "train" else ():
        refuse_missing(name, columns, split)
        texts[name] = ["" if value is None else str(value) for value in columns[name][:limit]]
    features = Features({name: Value("string") for name in texts})
    pairs = read(split, Dataset.from_dict, texts, features=features)
    if len(names) > len(SIDES):
        pairs = with_languages(pairs, data)
    tests: Tests = text_tests(data) if split == "train" else {"an empty side": is_empty} | language_tests(data)
    return _filter(pairs, tests, zip(texts["source"], texts["target"], strict=True), split, report)


def refuse_faults(row: dict[str, Any], place: str) -> None:
    """
    Raises:
        DataError: a side of a row is not text, or a language is not a code.
    """
    for part, value in row.items():
        if fault := language_fault(value) if part in LANGUAGES else text_fault(value):
            raise DataError(f"{place}: the {part} {fault}")


def _scoring(columns: Columns, limit: int | None, split: str, data: DataArguments) -> Columns:
    """What scoring needs besides source and target: a row's further references, and the group that it belongs to."""
    found: Columns = {}
    for name in further_references(columns):
        found[name] = [text if text and str(text).strip() else None for text in columns[name][:limit]]
        for index, text in enumerate(found[name]):
            if text is not None and (fault := text_fault(text)):
                raise DataError(f"{split}, row {index + 1}: {name} {fault}")
    wanted = data.group_column or []
    missing = [name for name in wanted if name not in columns]
    # Validation rows need groups only where they are what is scored in the end.
    if missing and (split == "test" or not (data.test_file or data.dataset)):
        raise DataError(f"group_column={missing[0]}: the {split} table has no such column, only {_listed(columns)}")
    if wanted and not missing:
        rows = list(zip(*(columns[name][:limit] for name in wanted), strict=True))
        if empty := next((number for number, values in enumerate(rows, 1) if None in values or "" in values), None):
            raise DataError(f"{split}, row {empty}: {', '.join(wanted)} has no value, so the row belongs to no group")
        found[GROUP] = ["-".join(map(str, values)) for values in rows]
    return found


def references_of(pairs: Dataset) -> list[str] | list[list[str | None]]:
    """The reference of each row; where rows have several, a list of them, in which None stands for a missing one."""
    names = ["target", *further_references(pairs.column_names)]
    if len(names) == 1:
        return list(pairs["target"])
    return [list(texts) for texts in zip(*(pairs[name] for name in names), strict=True)]


def groups_of(pairs: Dataset) -> list[str] | None:
    """The group of each row, by `group_column`; None where rows have none."""
    return list(pairs[GROUP]) if GROUP in pairs.column_names else None


def _rows(column: Sequence[Any], limit: int | None, side: str, split: str) -> Sequence[Any]:
    """The values of a column. A parquet column may hold bytes that are not UTF-8."""
    try:
        return column[:limit]
    except UnicodeDecodeError:
        for index in range(len(column)):
            try:
                column[index]
            except UnicodeDecodeError as error:
                raise DataError(f"{split}, row {index + 1}: the {side} is not UTF-8 ({error})") from error
        raise


def choose_columns(columns: list[str], split: str, data: DataArguments) -> tuple[str, ...]:
    """The columns of source and target: those that `data` names, or those found by their names."""
    names: tuple[str | None, ...] = (data.source_lang, data.target_lang)
    if data.source_column or data.target_column:
        names = (data.source_column, data.target_column)
    elif column := next(filter(IN_TRANSLATION.match, columns), None):
        names = tuple(language and f"{column.rpartition('.')[0]}.{language}" for language in names)
    elif set(SIDES) <= set(columns):
        names = SIDES
    for side, name in zip(SIDES, names, strict=True):
        if name not in columns:
            found = f"there is no column {name!r}" if name else f"the column of the {side} is not given"
            raise DataError(
                f"{split}: {found}: name one of {_listed(columns)} by {side}_column (or its language by {side}_lang)"
            )
    return tuple(map(str, names))


def choose_language_columns(columns: list[str], split: str, data: DataArguments) -> dict[str, str]:
    """The columns of the languages that `data` names, by LANGUAGES."""
    named = {language: getattr(data, f"{language}_column") for language in LANGUAGES}
    found = {language: name for language, name in named.items() if name}
    for language, name in found.items():
        if name not in columns:
            raise DataError(
                f"{split}: there is no column {name!r}: name one of {_listed(columns)} by {language}_column"
            )
    return found


def refuse_missing(name: str, columns: Iterable[str], place: str) -> None:
    """
    Raises:
        DataError: there is no column of this name, which a prefix needs.
    """
    if name not in columns:
        raise DataError(f"{place}: there is no column {name!r} to put before the source: there are {_listed(columns)}")


def _filter(rows: Dataset, tests: Tests, values: Iterable[tuple], split: str, report: FilterReport) -> Dataset:
    """For training, `rows` without those that fail a test; otherwise all rows, with a warning."""
    if split == "train":
        kept = filter_rows(rows, tests, values, report)
        if not len(kept):
            reasons = (f"{count} for {reason}" for reason, (count, _) in report.left_out.items())
            raise DataError(f"train: every row was left out, {_listed(reasons)}")
        return kept
    found = FilterReport()
    filter_rows(rows, tests, values, found)
    for reason, (count, first) in found.left_out.items():
        logger.warning(
            "%s: %d of %s with %s, kept (first: row %d)", split, count, counted(len(rows), "row"), reason, first
        )
    return rows


def hold_out(pairs: DatasetDict, rows: dict[str, Any], numbers: np.ndarray) -> None:
    """
    Makes a validation split from training rows: every 20th, or fewer, so that there are at most 1,000. The choice is
    deterministic, so that resumed runs and all processes hold out the same rows. The vocabulary may have been learned
    from them, but no update sees them.

    Args:
        pairs: the text, with a training split; changed in place.
        rows: the ids of its splits; changed in place.
        numbers: for each training row of ids, the index of its training pair.
    """
    count = len(numbers)
    step = max(LEAST_STEP, -(-count // MOST_HELD_OUT))
    held_out = np.arange(0, count, step)
    if len(held_out) == count:
        return
    logger.info(
        "no validation data: every %dth training row, %d of %d, is held out to choose the best checkpoint "
        "(validation_file names others; eval_strategy=no and load_best_model_at_end=false train on all)",
        step, len(held_out), count,
    )  # fmt: skip
    train, ids, places = pairs["train"], rows["train"], numbers[held_out]
    pairs["validation"], rows["validation"] = train.select(places), ids.select(held_out).select_columns(list(ENCODED))
    pairs["train"] = train.select(np.delete(np.arange(len(train)), places))
    rows["train"] = ids.select(np.delete(np.arange(count), held_out))


def _log(report: FilterReport) -> None:
    logger.log(logging.WARNING if report.left_out else logging.INFO, "%s: %s", report.name, report)


def _listed(names: Any) -> str:
    listed = ", ".join(map(str, names))
    # Without a header, the first row's texts are the column names.
    return listed if len(listed) <= LISTED else f"{listed[:LISTED]}..."


def require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that does not append eos."""
    if tokenizer(text_target="")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        raise DataError(f"the tokenizer must append its eos token {tokenizer.eos_token!r} to every text, but does not")


def tokenize_pairs(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    split: str,
    report: FilterReport | None = None,
    corpus: Corpus | None = None,
    keep_text: bool = False,
) -> Dataset:
    """
    Turns text into ids.

    Training rows over `max_source_length` or `max_target_length` tokens, or over `max_length_ratio`, are skipped.
    Rows of the other splits are never skipped or cut.

    Args:
        pairs: the text, as load_pairs gives it.
        tokenizer: must append eos to every text.
        data: the maximum lengths, the ratio, and whether BPE-dropout needs the words.
        split: the split's name.
        report: the rows that load_pairs skipped; logged together with those skipped here.
        corpus: transforms the text before it is turned into ids, by one draw that serves to plan batches.
        keep_text: whether the columns of text remain.

    Returns:
        `input_ids` and `labels`, both ending in eos; for BPE-dropout also the lengths of their words.

    Raises:
        DataError: no row is left, or the tokenizer does not append its eos.
    """
    require_eos(tokenizer)
    with_words = split == "train" and data.bpe_dropout > 0

    def encode(batch: dict[str, list[str]], numbers: list[int]) -> dict[str, list]:
        texts = batch["source"], batch["target"]
        if corpus and corpus.transforms:
            texts = transform_batch(corpus, batch, numbers, 0, PLANNED)
        return encode_pairs(tokenizer, *texts, data, with_words, batch.get(LANGUAGES[1]))

    features = dict(ENCODED) | dict.fromkeys(WORDS.values() if with_words else (), List(Value("int32")))
    encoded = pairs.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=None if keep_text else pairs.column_names,
        features=Features((pairs.features if keep_text else {}) | features),
        keep_in_memory=True,
        desc=f"tokenizing {split}",
    )
    table = encoded.with_format("arrow")[:]
    lengths = (pc.list_value_length(table[name]).to_pylist() for name in ENCODED)
    tests = length_limits(data) | (ratio_limit(data) if split == "train" else {})
    report = report or FilterReport()
    rows = _filter(encoded, tests, zip(*lengths, strict=True), split, report)
    if split == "train":
        _log(report)
    return rows

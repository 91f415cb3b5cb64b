"""Loads parallel text from files, a Hub dataset or the phrasebook, checks it, and turns it into rows of token ids.

Faults in the data raise a DataError that names the place, before anything is learned from it.
"""

import csv
import gzip
import json
import logging
import os
import re
import reprlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
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
from .filters import FilterReport, Tests, filter_rows, is_empty, length_limits, ratio_limit, text_tests
from .languages import LANGUAGES, language_fault, with_languages
from .transforms import PLANNED, transform_batch


logger = logging.getLogger(__name__)

# The columns of a file or dataset by name: lists, or columns that `datasets` reads lazily.
Columns = dict[str, Sequence[Any]]

SPLITS = ("train", "validation", "test")
SIDES = ("source", "target")
# Without a validation split, at most every 20th training row and at most 1,000 rows are held out.
LEAST_STEP, MOST_HELD_OUT = 20, 1000
# Maximum characters of the names that a message lists.
LISTED = 300
# Compact: 32 bits per token; the default of `datasets` is 64.
ENCODED = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


def read_lines(path: str | Path) -> Iterator[str]:
    """
    Yields the lines of a UTF-8 text file, plain or .gz, without their ends. `-` is the standard input.

    Only a line feed ends a line (`str.splitlines` would also break at U+2028 and others, and misalign parallel files).

    Raises:
        DataError: the file cannot be read, or holds bytes that are not UTF-8 (names the line).
    """
    try:
        with _open_binary(path) as file:
            for number, line in enumerate(file, 1):
                # A byte order mark is no part of the text.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise DataError(f"{path}, line {number}: byte 0x{found:02x} is not UTF-8 ({error.reason})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut off ({error})") from error
    except FileNotFoundError:
        raise DataError(missing(path, "file")) from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _open_binary(path: str | Path) -> Any:
    if str(path) == "-":
        return open(sys.stdin.fileno(), "rb", closefd=False)
    return gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb")


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
    return {split: _load_split(split, found) for split, found in paths.items() if split in splits}


def _load_split(split: str, paths: list[Path]) -> Columns:
    if len(paths) == 1:
        return _load_table(paths[0])
    if len(paths) == 2:
        return _load_parallel_text(*paths)
    raise DataError(f"{split}_file names {len(paths)} files: give one data file, or two of parallel text")


def _load_parallel_text(source: Path, target: Path) -> Columns:
    sources, targets = list(read_lines(source)), list(read_lines(target))
    if len(sources) != len(targets):
        raise DataError(
            f"{source} has {counted(len(sources), 'line')} and {target} has {len(targets)}: "
            "line N of one must be the translation of line N of the other"
        )
    return {"source": sources, "target": targets}


def _load_table(path: Path) -> Columns:
    if path.suffix == ".parquet":
        return _columns(read(path, datasets.load_dataset, "parquet", data_files=str(path), split="train"))
    rows = [row for _, row in table_rows(path)]
    names = dict.fromkeys(chain.from_iterable(rows))
    return {name: [row.get(name) for row in rows] for name in names}


def table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Yields the rows of a .jsonl, .json, .csv or .tsv file, plain or .gz, one by one, each with the number of its line.

    Raises:
        DataError: another kind of file, or a row that cannot be read (names the line).
    """
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if suffix in ("jsonl", "json"):
        return _json_rows(path)
    if suffix == "csv":
        return _csv_rows(path, delimiter=",")
    if suffix == "tsv":
        # Here a quotation mark is text, as the media type has it (text/tab-separated-values, IANA).
        return _csv_rows(path, delimiter="\t", quoting=csv.QUOTE_NONE)
    raise DataError(
        f"{path}: the suffix of a data file must be .jsonl, .json, .csv, .tsv or .parquet "
        "(parallel text takes two files: source, then target)"
    )


def _csv_rows(path: Path, **form: Any) -> Iterator[tuple[int, dict[str, str]]]:
    """
    A first line of names, then rows. Every value is text.

    `datasets` would convert numbers and read "NA" as missing, and its errors name no line.
    """
    reader = csv.reader((line + "\n" for line in read_lines(path)), strict=True, **form)
    try:
        header = next(reader, [])
        for row in filter(None, reader):
            if len(row) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {counted(len(row), 'value')}, under "
                    f"{counted(len(header), 'column name')}"
                )
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def is_json_list(path: Path) -> bool:
    """Whether a JSON file is one list, which may begin after blank lines, rather than a row on each line."""
    return next((line for line in read_lines(path) if line.strip()), "").lstrip().startswith("[")


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    One object per line, or one list of objects (which is read whole, and its objects numbered).

    `datasets` would convert text that looks like a date, and its errors name no line.
    """
    rows: Iterable[tuple[int, Any]]
    if is_json_list(path):
        unit, rows = "row", enumerate(_parse_json("\n".join(read_lines(path)), path), 1)
    else:
        lines = enumerate(read_lines(path), 1)
        unit, rows = "line", ((number, _parse_json(line, path, number)) for number, line in lines if line.strip())
    for number, row in rows:
        if not isinstance(row, dict):
            found = reprlib.repr(row)
            raise DataError(f"{path}, {unit} {number}: must be an object with a source and a target, not {found}")
        if isinstance(row.get("translation"), dict):
            row.update({f"translation.{language}": text for language, text in row.pop("translation").items()})
        yield number, row


def _parse_json(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {first_line + error.lineno - 1}: this is not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of lists in each other
        raise DataError(f"{path}, line {first_line}: this cannot be read ({error})") from error


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
    texts = {part: _rows(columns[name], limit, part, split) for part, name in names.items()}
    for index, values in enumerate(zip(*texts.values(), strict=True)):
        refuse_faults(dict(zip(texts, values, strict=True)), f"{split}, row {index + 1}")
    for name in others if split == "train" else ():
        refuse_missing(name, columns, split)
        texts[name] = ["" if value is None else str(value) for value in columns[name][:limit]]
    features = Features({name: Value("string") for name in texts})
    pairs = read(split, Dataset.from_dict, texts, features=features)
    if len(names) > len(SIDES):
        pairs = with_languages(pairs, data)
    tests: Tests = text_tests(data) if split == "train" else {"an empty side": is_empty}
    return _filter(pairs, tests, zip(texts["source"], texts["target"], strict=True), split, report)


def refuse_faults(row: dict[str, Any], place: str) -> None:
    """
    Raises:
        DataError: a side of a row is not text, or a language is not a code.
    """
    for part, value in row.items():
        if fault := language_fault(value) if part in LANGUAGES else text_fault(value):
            raise DataError(f"{place}: the {part} {fault}")


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
    elif any(column.startswith("translation.") for column in columns):
        names = tuple(language and f"translation.{language}" for language in names)
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

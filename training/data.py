"""Parallel text in: from files, a Hub dataset or the phrasebook, through checks, to rows of token ids.

What is wrong with the data is said before anything is learned from it, by a DataError that names the place.
"""

import csv
import gzip
import json
import logging
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from .arguments import DataArguments, UserError


logger = logging.getLogger(__name__)

# What a file or dataset holds, by name: lists, or columns that `datasets` reads when they are asked for.
Columns = dict[str, Sequence[Any]]

SPLITS = ("train", "validation", "test")
SIDES = ("source", "target")
PHRASEBOOK = "phrasebook:"
# Compact: 32 bits for a token, where the default of `datasets` takes 64.
ENCODED = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


class DataError(UserError):
    """Data that cannot be used: where it is (file, row, column), what was found, and what would be right."""


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
    expanded = Path(os.path.expandvars(path)).expanduser()
    return expand_path(folder) / expanded if folder else expanded


def load_pairs(data: DataArguments) -> DatasetDict:
    """
    Loads the parallel text that `data` names.

    Rows of the training split in which a side is empty are left out, and counted in a warning. In the other splits
    they stay, since scores compare only over the same rows.

    Returns:
        Those of the splits train, validation and test that are there, with the string columns `source` and `target`.

    Raises:
        DataError: see the message.
    """
    _check_arguments(data)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    splits = _load_dataset(data) if data.dataset else _load_files(data)
    return DatasetDict({split: _clean(columns, split, data) for split, columns in splits.items()})


def language_pair(data: DataArguments) -> tuple[str | None, str | None]:
    """Codes of the source's and the target's language, as far as `data` tells them."""
    if data.dataset and data.dataset.startswith(PHRASEBOOK):
        source, _, target = data.dataset.removeprefix(PHRASEBOOK).partition("-")
        return data.source_lang or source, data.target_lang or target
    return data.source_lang, data.target_lang


def training_texts(pairs: Dataset) -> Iterator[str]:
    """Every source and every target, for train_tokenizer."""
    for batch in pairs.iter(batch_size=1000):
        yield from chain(batch["source"], batch["target"])


def _check_arguments(data: DataArguments) -> None:
    named = [name for name in ("train_file", "validation_file", "test_file") if getattr(data, name)]
    if data.dataset and named:
        raise DataError(f"dataset={data.dataset!r} and {named[0]} are both given: choose one source of data")
    if not data.dataset and not named:
        raise DataError("no data: give a dataset, or train_file, validation_file or test_file")
    for name in ("max_train_samples", "max_eval_samples", "max_source_length", "max_target_length"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise DataError(f"{name}={value} must be at least 1")


def _load_dataset(data: DataArguments) -> dict[str, Columns]:
    assert data.dataset is not None
    if data.dataset.startswith(PHRASEBOOK):
        from .phrasebook import load_phrasebook

        pair = data.dataset.removeprefix(PHRASEBOOK)
        loaded = _read(data.dataset, load_phrasebook, pair, train_size=data.phrasebook_size)
    else:
        path = expand_path(data.dataset)
        if data.dataset.startswith((".", "/", "~", "$")) and not path.exists():
            raise DataError(f"{path}: no such folder")
        loaded = _read(data.dataset, datasets.load_dataset, str(path), data.dataset_config)
    splits = {split: _columns(loaded[split]) for split in SPLITS if split in loaded}
    if not splits:
        raise DataError(f"{data.dataset}: no split is named {_listed(SPLITS)}: there are {_listed(loaded)}")
    return splits


def _load_files(data: DataArguments) -> dict[str, Columns]:
    files = {split: getattr(data, f"{split}_file") for split in SPLITS}
    paths = {split: [expand_path(name, data.data_dir) for name in names] for split, names in files.items() if names}
    # All of them before the first is read.
    for path in chain(*paths.values()):
        if not path.exists():
            raise DataError(f"{path}: no such file")
    return {split: _load_split(split, found) for split, found in paths.items()}


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
            f"{source} has {len(sources)} lines and {target} has {len(targets)}: "
            "line N of one must be the translation of line N of the other"
        )
    return {"source": sources, "target": targets}


def _load_table(path: Path) -> Columns:
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if suffix in ("jsonl", "json"):
        return _load_json(path)
    if suffix == "csv":
        return _load_csv(path, delimiter=",")
    if suffix == "tsv":
        # Here a quotation mark is text, as the media type has it (text/tab-separated-values, IANA).
        return _load_csv(path, delimiter="\t", quoting=csv.QUOTE_NONE)
    if suffix == "parquet":
        return _columns(_read(path, datasets.load_dataset, "parquet", data_files=str(path), split="train"))
    raise DataError(
        f"{path}: the suffix of a data file must be .jsonl, .json, .csv, .tsv or .parquet "
        "(parallel text takes two files: source, then target)"
    )


def _load_csv(path: Path, **form: Any) -> Columns:
    """
    A first line of names, then rows. Every value is text.

    `datasets` would read numbers as numbers and "NA" as missing, and its errors tell no line.
    """
    reader = csv.reader((line + "\n" for line in read_lines(path)), strict=True, **form)
    try:
        header = next(reader, [])
        rows = []
        for row in filter(None, reader):
            if len(row) != len(header):
                raise DataError(f"{path}, line {reader.line_num}: {len(row)} values, under {len(header)} column names")
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    return {name: [row[column] for row in rows] for column, name in enumerate(header)}


def _load_json(path: Path) -> Columns:
    """
    One object per line, or one list of objects.

    `datasets` would read text that looks like a date as a time, and its errors tell no line.
    """
    lines = list(read_lines(path))
    if lines and lines[0].startswith("["):
        rows = _parse_json("\n".join(lines), path)
    else:
        rows = [_parse_json(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: must be an object with a source and a target, not {row!r}")
        if isinstance(row.get("translation"), dict):
            row.update({f"translation.{language}": text for language, text in row.pop("translation").items()})
    names = dict.fromkeys(chain.from_iterable(rows))
    return {name: [row.get(name) for row in rows] for name in names}


def _parse_json(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {first_line + error.lineno - 1}: this is not JSON ({error.msg})") from error


def _read(name: str | Path, load: Callable, *args: Any, **options: Any) -> Any:
    """Calls a function of `datasets`, whose errors seldom name the dataset or file."""
    try:
        return load(*args, **options)
    except (DatasetsError, OSError, ValueError, TypeError) as error:
        raise DataError(f"{name}: cannot be read ({error.__cause__ or error})") from error


def _columns(rows: Dataset) -> Columns:
    rows = rows.flatten()  # a `translation` becomes translation.en, translation.de
    return {name: rows[name] for name in rows.column_names}


def _clean(columns: Columns, split: str, data: DataArguments) -> Dataset:
    """The two columns, every value of which is checked, without the rows that training cannot use."""
    if not any(map(len, columns.values())):
        raise DataError(f"{split}: the data is empty, it has no rows")
    limit = data.max_train_samples if split == "train" else data.max_eval_samples
    sources, targets = (columns[name][:limit] for name in _choose_columns(list(columns), split, data))
    empty = []
    for index, pair in enumerate(zip(sources, targets, strict=True)):
        for side, text in zip(SIDES, pair, strict=True):
            if not isinstance(text, str):
                raise DataError(f"{split}, row {index + 1}: the {side} is {text!r}, and must be text")
        if not all(text.strip() for text in pair):
            empty.append(index)
    features = Features({side: Value("string") for side in SIDES})
    pairs = _read(split, Dataset.from_dict, {"source": sources, "target": targets}, features=features)
    return _leave_out(pairs, empty, "an empty side", split)


def _choose_columns(columns: list[str], split: str, data: DataArguments) -> tuple[str, ...]:
    """The columns that `data` names, or those that name themselves."""
    names: tuple[str | None, ...] = (data.source_lang, data.target_lang)
    if data.source_column or data.target_column:
        names = (data.source_column, data.target_column)
    elif any(column.startswith("translation.") for column in columns):
        names = tuple(language and f"translation.{language}" for language in names)
    elif set(SIDES) <= set(columns):
        names = SIDES
    for side, name in zip(SIDES, names, strict=True):
        if name not in columns:
            found = f"there is no column {name!r}" if name else f"it is not said which column is the {side}"
            raise DataError(
                f"{split}: {found}: name one of {_listed(columns)} by {side}_column (or its language by {side}_lang)"
            )
    return tuple(map(str, names))


def _leave_out(pairs: Dataset, numbers: list[int], what: str, split: str) -> Dataset:
    """`pairs` without the rows `numbers` if it is for training, else whole; either way it is reported."""
    if not numbers:
        return pairs
    first = f"first: row {numbers[0] + 1}"
    if split != "train":
        logger.warning("%s: %d of %d rows with %s, kept (%s)", split, len(numbers), len(pairs), what, first)
        return pairs
    logger.warning("train: left out %d of %d rows with %s (%s)", len(numbers), len(pairs), what, first)
    left = sorted(set(range(len(pairs))).difference(numbers))
    if not left:
        raise DataError(f"train: every row was left out, for {what}")
    return pairs.select(left)


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))


def tokenize_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataArguments, split: str) -> Dataset:
    """
    Turns text into ids.

    Training rows longer than `max_source_length` or `max_target_length` tokens are left out, and counted in a
    warning. Rows of the other splits are never left out or cut.

    Returns:
        `input_ids` and `labels`, both ended by eos.

    Raises:
        DataError: no row is left, or the tokenizer does not append its eos.
    """
    if tokenizer("")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        raise DataError(f"the tokenizer must end every text by its eos token {tokenizer.eos_token!r}, and does not")

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        return tokenizer(batch["source"], text_target=batch["target"], return_attention_mask=False).data

    encoded = pairs.map(
        encode,
        batched=True,
        remove_columns=pairs.column_names,
        features=ENCODED,
        keep_in_memory=True,
        desc=f"tokenizing {split}",
    )
    table = encoded.with_format("arrow")[:]
    too_long = pc.or_(
        pc.greater(pc.list_value_length(table["input_ids"]), data.max_source_length),
        pc.greater(pc.list_value_length(table["labels"]), data.max_target_length),
    )
    what = f"more than max_source_length={data.max_source_length} or max_target_length={data.max_target_length} tokens"
    return _leave_out(encoded, pc.indices_nonzero(too_long).to_pylist(), what, split)

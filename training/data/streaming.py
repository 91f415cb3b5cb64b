"""Trains on data that is larger than memory: each process reads its share during training, and can resume at any batch.

    rows of text -> the process's share -> a pool of `shuffle_buffer` rows of ids -> the pool's token-budget batches

`datasets` reads the rows, divides them among the processes and knows where to resume (IterableDataset,
split_dataset_by_node, state_dict); batching.py makes the batches of a pool. Memory holds two pools: the one in use, and
the next one, which a thread reads meanwhile. At 25 tokens a side, 100,000 rows take some 50 MB.

Rows are shuffled only within their pool. If a corpus is sorted by topic, shuffle it before you stream it.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from ..errors import DataError, UserError
from ..settings.arguments import DataArguments
from ..settings.corpora import Corpus, naming
from .batching import TokenBudgetBatches
from .encoding import encode_pairs
from .epochs import SIDES_OF_IDS
from .filters import Tests, find_fault, length_limits, ratio_limit, text_tests
from .languages import LANGUAGES, refuse_unknown
from .pairs import (
    SIDES,
    choose_columns,
    choose_language_columns,
    expand_path,
    read,
    refuse_faults,
    refuse_missing,
    require_eos,
)
from .reading.formats import read_rows
from .reading.lines import read_parallel_lines
from .reading.tables import flat, is_json_list
from .transforms import transform_batch


logger = logging.getLogger(__name__)

# The maximum number of rows, the first ones, from which a vocabulary is learned: more would hardly change it.
VOCABULARY_ROWS = 1_000_000
# The maximum number of rows that are tokenised together: enough for the tokenizer's threads.
BLOCK = 1000

# A row's source and target ids.
Row = tuple[np.ndarray, np.ndarray]
# Where a stream stands: see CorpusStream.
Place = dict[str, Any]


def open_stream(data: DataArguments, others: tuple[str, ...] = ()) -> IterableDataset:
    """
    The training split as rows of text, `source` and `target`, which are read when they are needed. If `data` names
    columns of languages, the rows have `source_lang` and `target_lang` too.

    Args:
        data: locates the text.
        others: other columns of text to keep.

    Raises:
        DataError: there is no such data. Faults of a row are raised when the row is reached.
    """
    rows = _open_dataset(data, others) if data.dataset else _open_files(data, others)
    return rows if data.max_train_samples is None else rows.take(data.max_train_samples)


def _open_dataset(data: DataArguments, others: tuple[str, ...]) -> IterableDataset:
    assert data.dataset is not None
    splits = read(data.dataset, load_dataset, str(expand_path(data.dataset)), data.dataset_config, streaming=True)
    if "train" not in splits:
        raise DataError(f"{data.dataset}: no split is named train: there are {', '.join(splits)}")
    return _pairs_of(splits["train"], data.dataset, data, others)


def _open_files(data: DataArguments, others: tuple[str, ...]) -> IterableDataset:
    if not data.train_file:
        raise DataError("no training data to stream: name it by train_file, or choose a dataset")
    paths = [expand_path(name, data.data_dir) for name in data.train_file]
    if len(paths) > 2:
        raise DataError(f"train_file names {len(paths)} files: give one data file, or two of parallel text")
    if len(paths) == 2:
        choose_language_columns(list(SIDES), "train", data)
        for name in others:
            refuse_missing(name, SIDES, str(paths[0]))
        return IterableDataset.from_generator(parallel_pairs, gen_kwargs={"source": paths[0], "target": paths[1]})
    if paths[0].suffix == ".parquet":
        rows = read(paths[0], load_dataset, "parquet", data_files=str(paths[0]), split="train", streaming=True)
        return _pairs_of(rows, str(paths[0]), data, others)
    if is_json_list(paths[0]):
        raise DataError(f"{paths[0]}: a list cannot be streamed, since JSON has it end before it is read: give .jsonl")
    return IterableDataset.from_generator(table_pairs, gen_kwargs={"path": paths[0], "data": data, "others": others})


def parallel_pairs(source: Path, target: Path) -> Iterator[dict[str, str]]:
    """
    Yields the lines of two files side by side.

    Raises:
        DataError: one file has more lines than the other.
    """
    for pair in read_parallel_lines(source, target):
        yield dict(zip(SIDES, pair, strict=True))


def table_pairs(path: Path, data: DataArguments, others: tuple[str, ...] = ()) -> Iterator[dict[str, str]]:
    """
    Yields the pairs of a file that read_rows reads.

    Raises:
        DataError: a source, target or other column is missing, or a source or target is not text.
    """
    names: dict[str, str] = {}
    for number, row in read_rows(path, data.has_header):
        place = f"{path}, line {number}"
        names = names or _columns_of(list(row), place, data)
        yield _pair(row, names, place, data, others)


def _pairs_of(rows: IterableDataset, place: str, data: DataArguments, others: tuple[str, ...]) -> IterableDataset:
    def pair(row: dict[str, Any]) -> dict[str, str]:
        row = flat(row)
        return _pair(row, _columns_of(list(row), place, data), place, data, others)

    languages = LANGUAGES if data.names_languages else ()
    return rows.map(pair).select_columns([*SIDES, *languages, *others])


def _columns_of(columns: list[str], place: str, data: DataArguments) -> dict[str, str]:
    """The columns of the sides, and of the languages that are named."""
    sides = dict(zip(SIDES, choose_columns(columns, place, data), strict=True))
    return sides | choose_language_columns(columns, place, data)


def _pair(
    row: dict[str, Any], names: dict[str, str], place: str, data: DataArguments, others: tuple[str, ...]
) -> dict[str, str]:
    pair: dict[str, Any] = {part: row.get(name) for part, name in names.items()}
    refuse_faults(pair, place)
    if data.names_languages:
        # Only one of the languages may be a column.
        pair = dict(zip(LANGUAGES, data.direction, strict=True)) | pair
    for name in others:
        refuse_missing(name, row, place)
        pair[name] = "" if row[name] is None else str(row[name])
    return pair


class Block(NamedTuple):
    """Consecutive rows of one corpus that training can use, as ids, and the place where the next block begins."""

    rows: list[Row]
    end: Place


class CorpusStream:
    """
    One corpus, read by this process pass after pass: filtered, transformed and turned into ids.

    A place in it is a dict: `epoch` is the number of the pass over the data, from 0; `state` is where in the data the
    reading stands (`IterableDataset.state_dict`; None: at the beginning); `read` is the number of rows that this
    process has read before it in this pass.

    Args:
        rows: what open_stream returns.
        tokenizer: it must append its eos to every text.
        corpus: its filters and transforms.
        size: rows of a block.
        sharing: the number of processes that share the rows, and the index of this one.
        seed: decides, with the pass and the row, what the transforms draw.
    """

    def __init__(
        self,
        rows: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Corpus,
        size: int,
        sharing: tuple[int, int],
        seed: int,
    ):
        require_eos(tokenizer)
        self.num_processes, self.process_index = sharing
        self.rows = split_dataset_by_node(rows, self.process_index, self.num_processes)
        self.tokenizer, self.corpus, self.size, self.seed = tokenizer, corpus, size, seed
        data = corpus.data
        self.text_tests, self.length_tests = text_tests(data), length_limits(data) | ratio_limit(data)
        self.read, self.left_out = 0, Counter[str]()

    def rest_of_pass(self, place: Place) -> Iterator[Block]:
        """
        Yields the blocks from a place to the end of the pass.

        Raises:
            DataError: a row cannot be used, or no row of a whole pass can.
        """
        epoch, found = place["epoch"], place["state"] is not None
        read = place["read"]
        self.rows.load_state_dict(place["state"])
        with naming(self.corpus):
            for texts in self._texts():
                rows = self._encode(texts, epoch, read)
                found, read = found or bool(rows), read + len(texts["source"])
                yield Block(rows, {"epoch": epoch, "state": self.rows.state_dict(), "read": read})
            self._report(epoch, found)

    def blocks(self, place: Place) -> Iterator[Block]:
        """Yields the blocks from a place on, without end."""
        while True:
            yield from self.rest_of_pass(place)
            place = {"epoch": place["epoch"] + 1, "state": None, "read": 0}

    def _texts(self) -> Iterator[dict[str, list[str]]]:
        try:
            yield from self.rows.iter(self.size)
        except UserError:
            raise
        # What pyarrow and `datasets` raise where a file is damaged or a server fails.
        except (DatasetsError, OSError, ValueError) as error:
            raise DataError(f"train: the data cannot be read on ({error})") from error

    def _encode(self, texts: dict[str, list[str]], epoch: int, read: int) -> list[Row]:
        """The rows of a block that training can use, as ids."""
        self.read += len(texts["source"])
        numbers = range(len(texts["source"]))
        kept = self._passing(self.text_tests, zip(texts["source"], texts["target"], numbers, strict=True), str)
        if not kept:
            return []
        columns = {name: [values[row] for _, _, row in kept] for name, values in texts.items()}
        sides = columns["source"], columns["target"]
        if self.corpus.transforms:
            # A number that no other row of the pass has, in any process.
            drawn = [(read + row) * self.num_processes + self.process_index for _, _, row in kept]
            sides = transform_batch(self.corpus, columns, drawn, self.seed, epoch)
        languages = columns.get(LANGUAGES[1])
        refuse_unknown(self.tokenizer, languages or (), "train: ".format)
        encoded = encode_pairs(self.tokenizer, *sides, self.corpus.data, languages=languages)
        # 32 bits a token, where a list takes 64 for each and more for the numbers.
        ids = ([np.array(row, dtype=np.int32) for row in encoded[name]] for name in SIDES_OF_IDS)
        return self._passing(self.length_tests, zip(*ids, strict=True), len)

    def _passing(self, tests: Tests, rows: Iterable[tuple], value: Callable[[Any], Any]) -> list[tuple]:
        """The rows whose source and target pass the tests; the others are counted."""
        faults = [(row, find_fault(tests, value(row[0]), value(row[1]))) for row in rows]
        self.left_out.update(fault for _, fault in faults if fault)
        return [row for row, fault in faults if not fault]

    def _report(self, epoch: int, found: bool) -> None:
        """Logs what the pass that ends here left out."""
        reasons = [f"{count} for {reason}" for reason, count in self.left_out.items()]
        left_out = f"of {self.read} rows left out: {', '.join(reasons) or 'none'}"
        self.read, self.left_out = 0, Counter()
        if not found:
            raise DataError(f"train: a process has no row to train on ({left_out}; {self.num_processes} processes)")
        logger.info("%s: pass %d over the data has ended; %s", self.corpus.name, epoch + 1, left_out)


class Pool(NamedTuple):
    """
    Rows that are shuffled together.

    Args:
        epoch: decides, with the number and the seed, their order.
        number: of the pool.
        position: where the pool begins: what a checkpoint needs in order to resume there.
        rows: the ids.
        corpus: the number of each row's corpus; None if there is one corpus.
    """

    epoch: int
    number: int
    position: dict[str, Any]
    rows: list[Row]
    corpus: list[int] | None = None


class StreamedBatches(torch.utils.data.IterableDataset):
    """
    Yields this process's batches of a stream, pass after pass over the data, until the run's last batch.

    A batch is a dict: `rows`, each with `input_ids` and `labels`, and `position`, where a resumed run continues after
    that batch. In each pass a process sees every row of its share once, except those that the filters leave out. A pool
    and a pass end with batches of their own.

    The processes do not wait for one another: each has endless batches, and one may begin a new pass some batches
    before another. Every process reads the whole file, but checks and tokenises only its own rows. If the data are many
    files (shards), and their number is a multiple of the number of processes, each process reads only its own files.

    Args:
        rows: what open_stream returns.
        tokenizer: it must append its eos to every text.
        corpus: its filters and transforms, and its `shuffle_buffer` (rounded up to whole blocks of 1,000 rows).
        max_tokens: maximum tokens of a batch on each side, padding included.
        length: the number of batches that the run takes from each process.
        seed: with the pass and the pool, it alone decides the order.
        num_processes: the number of processes that share the rows.
        process_index: the process whose batches are yielded.

    Raises:
        DataError: a row cannot be used, its language is unknown to the tokenizer, or no row can be used.
    """

    def __init__(
        self,
        rows: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Corpus,
        max_tokens: int,
        length: int,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        self.shuffle_buffer = corpus.data.shuffle_buffer
        sharing = num_processes, process_index
        self.streams = [CorpusStream(rows, tokenizer, corpus, min(BLOCK, self.shuffle_buffer), sharing, seed)]
        self.max_tokens, self.length, self.seed = max_tokens, length, seed
        self.resume({"epoch": 0, "pool": 0, "state": None, "read": 0, "batches": 0}, 0)

    def resume(self, position: dict[str, Any], skipped: int) -> None:
        """
        Continues after the batch that had this position.

        Nothing before its pool is tokenised again. The file up to there is read again (some million lines a second; of
        many files, only the current one), and then the pool. This takes seconds.

        Args:
            position: `epoch` and `pool`, both from 0; `state` and `read`, where the pool begins (see CorpusStream); and
                `batches`, how many of the pool's batches were taken.
            skipped: how many times None is yielded first, for a loop that discards the batches before `position`.
        """
        self.position = position
        self.skipped = skipped

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        yield from repeat(None, self.skipped)
        yield from islice(self._batches(), self.length - self.skipped)

    def _batches(self) -> Iterator[dict[str, Any]]:
        taken = self.position["batches"]
        for pool in read_ahead(self._pools()):
            sources, targets = ([len(row[side]) for row in pool.rows] for side in range(2))
            batches = TokenBudgetBatches(sources, targets, self.max_tokens, seed=self.seed + pool.number)
            batches.set_epoch(pool.epoch)
            for done, batch in enumerate(islice(batches, taken, None), taken + 1):
                rows: list[dict[str, Any]] = [
                    {"input_ids": pool.rows[i][0].tolist(), "labels": pool.rows[i][1].tolist()} for i in batch
                ]
                for row, i in zip(rows, batch if pool.corpus else (), strict=False):
                    row["corpus"] = pool.corpus[i]
                yield {"rows": rows, "position": pool.position | {"batches": done}}
            taken = 0

    def _pools(self) -> Iterator[Pool]:
        """Pool after pool from the position on, without end."""
        (stream,) = self.streams
        epoch, number = self.position["epoch"], self.position["pool"]
        # Positions of older checkpoints have no `read`.
        place = {"epoch": epoch, "state": self.position["state"], "read": self.position.get("read", 0)}
        while True:
            blocks = stream.rest_of_pass(place)
            for rows, end in blocks:
                for more, following in islice(blocks, -(-self.shuffle_buffer // stream.size) - 1):
                    rows += more
                    end = following
                if rows:
                    yield Pool(epoch, number, {**place, "pool": number}, rows)
                number, place = number + 1, end
            epoch, number = epoch + 1, 0
            place = {"epoch": epoch, "state": None, "read": 0}


def read_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yields endless `items`. While one is used, a thread makes the next."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(next, items)
        while True:
            item = following.result()
            following = thread.submit(next, items)
            yield item
            # Frees its memory: the next one holds a pool already.
            del item

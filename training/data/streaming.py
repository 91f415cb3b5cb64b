"""Training data larger than memory: read while it is trained on, by every process its share, resumable at any batch.

    rows of text -> the process's share -> a pool of `shuffle_buffer` rows of ids -> the pool's token-budget batches

The reading, the shares and the place to resume at are those of `datasets` (its IterableDataset, split_dataset_by_node
and state_dict); the batches of a pool are those of batching.py. In memory are two pools: the one that is trained on,
and the next, which a thread reads meanwhile. At 25 tokens a side, 100,000 rows take some 50 MB.

A row travels no further than its pool. Shuffle a corpus that is sorted by topic before it is streamed.
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

from vanilla_transformer.loading import text_fault

from ..errors import DataError, UserError
from ..settings.arguments import DataArguments
from .batching import TokenBudgetBatches
from .filters import Tests, find_fault, length_limits, ratio_limit, text_tests
from .pairs import SIDES, choose_columns, expand_path, read, require_eos
from .reading.formats import read_rows
from .reading.lines import read_parallel_lines
from .reading.tables import flat, is_json_list


logger = logging.getLogger(__name__)

# A vocabulary is learned from so many of the first rows: more would hardly change it, and take long to read.
VOCABULARY_ROWS = 1_000_000
# Rows that are tokenised together, at most: enough for the tokenizer's threads.
BLOCK = 1000

# A row's source and target ids.
Row = tuple[np.ndarray, np.ndarray]
# Where a stream stands: see StreamedBatches.resume.
START = {"epoch": 0, "pool": 0, "state": None, "batches": 0}


def open_stream(data: DataArguments) -> IterableDataset:
    """
    The training split as rows of text, `source` and `target`, that are read when they are asked for.

    Raises:
        DataError: there is no such data. What is wrong with a row is raised when the row is reached.
    """
    rows = _open_dataset(data) if data.dataset else _open_files(data)
    return rows if data.max_train_samples is None else rows.take(data.max_train_samples)


def _open_dataset(data: DataArguments) -> IterableDataset:
    assert data.dataset is not None
    splits = read(data.dataset, load_dataset, str(expand_path(data.dataset)), data.dataset_config, streaming=True)
    if "train" not in splits:
        raise DataError(f"{data.dataset}: no split is named train: there are {', '.join(splits)}")
    return _pairs_of(splits["train"], data.dataset, data)


def _open_files(data: DataArguments) -> IterableDataset:
    if not data.train_file:
        raise DataError("no training data to stream: name it by train_file, or choose a dataset")
    paths = [expand_path(name, data.data_dir) for name in data.train_file]
    if len(paths) > 2:
        raise DataError(f"train_file names {len(paths)} files: give one data file, or two of parallel text")
    if len(paths) == 2:
        return IterableDataset.from_generator(parallel_pairs, gen_kwargs={"source": paths[0], "target": paths[1]})
    if paths[0].suffix == ".parquet":
        rows = read(paths[0], load_dataset, "parquet", data_files=str(paths[0]), split="train", streaming=True)
        return _pairs_of(rows, str(paths[0]), data)
    if is_json_list(paths[0]):
        raise DataError(f"{paths[0]}: a list cannot be streamed, since JSON has it end before it is read: give .jsonl")
    return IterableDataset.from_generator(table_pairs, gen_kwargs={"path": paths[0], "data": data})


def parallel_pairs(source: Path, target: Path) -> Iterator[dict[str, str]]:
    """
    Yields the lines of two files side by side.

    Raises:
        DataError: one file has more lines than the other.
    """
    for pair in read_parallel_lines(source, target):
        yield dict(zip(SIDES, pair, strict=True))


def table_pairs(path: Path, data: DataArguments) -> Iterator[dict[str, str]]:
    """
    Yields the pairs of a file that read_rows reads.

    Raises:
        DataError: a source or target is not there, or is not text.
    """
    names: tuple[str, ...] = ()
    for number, row in read_rows(path, data.has_header):
        place = f"{path}, line {number}"
        names = names or choose_columns(list(row), place, data)
        yield _pair(row, names, place)


def _pairs_of(rows: IterableDataset, place: str, data: DataArguments) -> IterableDataset:
    def pair(row: dict[str, Any]) -> dict[str, str]:
        row = flat(row)
        return _pair(row, choose_columns(list(row), place, data), place)

    return rows.map(pair).select_columns(list(SIDES))


def _pair(row: dict[str, Any], names: tuple[str, ...], place: str) -> dict[str, str]:
    pair: dict[str, Any] = {side: row.get(name) for side, name in zip(SIDES, names, strict=True)}
    for side, text in pair.items():
        if fault := text_fault(text):
            raise DataError(f"{place}: the {side} {fault}")
    return pair


class Pool(NamedTuple):
    """Rows that are shuffled together, and where they begin: their epoch, number in it, and state of the stream."""

    epoch: int
    number: int
    state: dict[str, Any] | None
    rows: list[Row]


class StreamedBatches(torch.utils.data.IterableDataset):
    """
    Yields this process's batches of a stream, pass after pass over the data, until the run's last.

    A batch is a dict: `rows`, each with `input_ids` and `labels`, and `position`, from which a run that resumes goes on
    after that batch. In each pass over its share a process sees every row once, but for those that the filters of
    `data` leave out, and count. A pool and a pass end with batches of their own.

    The processes do not wait for each other's pools: none ever runs out of batches, so each has as many as the others,
    and they may begin a new pass some batches apart. Every process reads the whole file, but checks and tokenises its
    own rows only; of a dataset of many files (shards) whose number is a multiple of the processes', it reads its own.

    Args:
        rows: what open_stream gives.
        tokenizer: it must end each text by its eos.
        data: for its `shuffle_buffer` (rounded up to whole blocks of 1,000 rows) and its filters.
        max_tokens: most tokens of a batch on either side, padding included.
        length: how many batches the run takes of each process.
        seed: with the pass and the pool, it alone decides the order.
        num_processes: among which the rows are dealt.
        process_index: the one whose batches are yielded.

    Raises:
        DataError: a row cannot be used, or no row can.
    """

    def __init__(
        self,
        rows: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        data: DataArguments,
        max_tokens: int,
        length: int,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        require_eos(tokenizer)
        self.rows = split_dataset_by_node(rows, process_index, num_processes)
        self.tokenizer = tokenizer
        self.shuffle_buffer = data.shuffle_buffer
        self.text_tests, self.length_tests = text_tests(data), length_limits(data) | ratio_limit(data)
        self.max_tokens = max_tokens
        self.length = length
        self.seed = seed
        self.num_processes = num_processes
        self.read, self.left_out = 0, Counter[str]()
        self.resume(START, 0)

    def resume(self, position: dict[str, Any], skipped: int) -> None:
        """
        Goes on after the batch that had this position.

        Nothing before its pool is tokenised again. What is read again is the file up to there (some million lines a
        second; of a dataset of many files, the one file), and then the pool: seconds, where training takes hours.

        Args:
            position: `epoch` and `pool`, both from 0, the `state` of the stream where that pool begins (None: at the
                data's beginning), and how many of the pool's `batches` were taken.
            skipped: so many times is None yielded first, for a loop that throws the batches before `position` away.
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
        for epoch, number, state, rows in read_ahead(self._pools()):
            sources, targets = ([len(row[side]) for row in rows] for side in range(2))
            batches = TokenBudgetBatches(sources, targets, self.max_tokens, seed=self.seed + number)
            batches.set_epoch(epoch)
            for done, batch in enumerate(islice(batches, taken, None), taken + 1):
                yield {
                    "rows": [{"input_ids": rows[i][0].tolist(), "labels": rows[i][1].tolist()} for i in batch],
                    "position": {"epoch": epoch, "pool": number, "state": state, "batches": done},
                }
            taken = 0

    def _pools(self) -> Iterator[Pool]:
        """Pool after pool, from that of the position on, without an end."""
        epoch, number, state = (self.position[name] for name in ("epoch", "pool", "state"))
        size = min(BLOCK, self.shuffle_buffer)
        while True:
            self.rows.load_state_dict(state)
            blocks = self._blocks(size)
            found = False
            for block in blocks:
                rows = self._encode(block)
                for more in islice(blocks, -(-self.shuffle_buffer // size) - 1):
                    rows += self._encode(more)
                if rows:
                    found = True
                    yield Pool(epoch, number, state, rows)
                number, state = number + 1, self.rows.state_dict()
            self._report(epoch, found)
            epoch, number, state = epoch + 1, 0, None

    def _blocks(self, size: int) -> Iterator[dict[str, list[str]]]:
        try:
            yield from self.rows.iter(size)
        except UserError:
            raise
        # What pyarrow and `datasets` raise where a file is damaged or a server fails.
        except (DatasetsError, OSError, ValueError) as error:
            raise DataError(f"train: the data cannot be read on ({error})") from error

    def _encode(self, block: dict[str, list[str]]) -> list[Row]:
        """Those rows of a block that training can use, as ids."""
        self.read += len(block["source"])
        pairs = self._passing(self.text_tests, zip(block["source"], block["target"], strict=True), lambda text: text)
        if not pairs:
            return []
        sources, targets = map(list, zip(*pairs, strict=True))
        encoded = self.tokenizer(sources, text_target=targets, return_attention_mask=False)
        # 32 bits a token, where a list takes 64 for each and more for the numbers.
        sides = ([np.array(ids, dtype=np.int32) for ids in encoded[name]] for name in ("input_ids", "labels"))
        return self._passing(self.length_tests, zip(*sides, strict=True), len)

    def _passing(self, tests: Tests, rows: Iterable[tuple], value: Callable[[Any], Any]) -> list[tuple]:
        """The rows of which the values of both sides pass the tests; the others are counted."""
        faults = [(row, find_fault(tests, *map(value, row))) for row in rows]
        self.left_out.update(fault for _, fault in faults if fault)
        return [row for row, fault in faults if not fault]

    def _report(self, epoch: int, found: bool) -> None:
        """Tells what the pass that ends here left out."""
        reasons = [f"{count} for {reason}" for reason, count in self.left_out.items()]
        left_out = f"of {self.read} rows left out: {', '.join(reasons) or 'none'}"
        self.read, self.left_out = 0, Counter()
        if not found:
            raise DataError(f"train: a process has no row to train on ({left_out}; {self.num_processes} processes)")
        logger.info("train: pass %d over the data has ended; %s", epoch + 1, left_out)


def read_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yields endless `items`; while one is used, a thread makes the next."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(next, items)
        while True:
            item = following.result()
            following = thread.submit(next, items)
            yield item
            # Not two: the next one holds a pool already.
            del item

"""Batches of several streamed corpora, mixed by weight.

A pool takes from each corpus as many rows as its weight says; what it does not use of a block is used by the next pool.
The rows of a pool are shuffled together, so no finer mixture is needed, and the shares are exact: `interleave_datasets`
would draw each row's corpus at random, and before the filters. A corpus that ends begins anew, whatever the others do.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from ..settings.corpora import Corpus
from .streaming import BLOCK, CorpusStream, Place, Pool, Row, StreamedBatches


class CorpusRows:
    """
    The rows of a corpus that training can use, so many at a time, pass after pass.

    Args:
        stream: the corpus.
        place: where to begin: a place of the stream where a block begins, and `used`, how many rows of that block were
            taken before.
    """

    def __init__(self, stream: CorpusStream, place: Place):
        self.place = place
        begin = {name: place[name] for name in ("epoch", "state", "read")}
        self._blocks = stream.blocks(begin)
        self._rows: list[Row] = []
        self._end: Place | None = None

    def take(self, count: int) -> list[Row]:
        """The next `count` rows."""
        taken: list[Row] = []
        while len(taken) < count:
            if self._end is None:
                self._rows, self._end = next(self._blocks)
            used = self.place["used"]
            more = self._rows[used : used + count - len(taken)]
            taken += more
            self.place = self.place | {"used": used + len(more)}
            if self.place["used"] >= len(self._rows):
                self.place, self._end = {**self._end, "used": 0}, None
        return taken


class MixedBatches(StreamedBatches):
    """
    Yields this process's batches of several corpora, until the run's last batch. A row also says its `corpus`, by
    number.

    Each process mixes its own share of each corpus, so the mixture does not depend on the number of processes.

    Args:
        rows: for each corpus, what open_stream returns.
        tokenizer: it must append its eos to every text.
        corpora: their filters and transforms; the first has the `shuffle_buffer`.
        weights: of each corpus; 0 leaves it out.
        max_tokens, length, seed, num_processes, process_index: as for StreamedBatches.
    """

    def __init__(
        self,
        rows: Sequence[IterableDataset],
        tokenizer: PreTrainedTokenizerBase,
        corpora: Sequence[Corpus],
        weights: Sequence[float],
        max_tokens: int,
        length: int,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        sharing = num_processes, process_index
        super().__init__(rows[0], tokenizer, corpora[0], max_tokens, length, seed, *sharing)
        size = min(BLOCK, self.shuffle_buffer)
        self.names = [corpus.name for corpus in corpora]
        self.shares = [weight / sum(weights) for weight in weights]
        self.streams = [
            CorpusStream(stream, tokenizer, corpus, size, sharing, seed + number)
            for number, (stream, corpus) in enumerate(zip(rows, corpora, strict=True))
        ]
        start = {"epoch": 0, "state": None, "read": 0, "used": 0}
        self.resume({"pool": 0, "places": [start for _ in corpora], "batches": 0}, 0)

    def _pools(self) -> Iterator[Pool]:
        number, places = self.position["pool"], self.position["places"]
        corpora = [CorpusRows(stream, place) for stream, place in zip(self.streams, places, strict=True)]
        while True:
            rows: list[Row] = []
            corpus: list[int] = []
            begin = [rows_of.place for rows_of in corpora]
            for index, (rows_of, share) in enumerate(zip(corpora, self.shares, strict=True)):
                found = rows_of.take(self._until(number + 1, share) - self._until(number, share))
                rows += found
                corpus += [index] * len(found)
            position = {"pool": number, "places": begin, "after": [rows_of.place for rows_of in corpora]}
            if rows:
                yield Pool(0, number, position, rows, corpus)
            number += 1

    def _until(self, pools: int, share: float) -> int:
        """How many rows so many pools take from a corpus with this share."""
        return round(pools * self.shuffle_buffer * share)

    def next_stage(self, position: dict[str, Any]) -> None:
        """
        Begins where another mixture of the same corpora ended.

        Args:
            position: of the last batch of the other mixture. The rest of its pool is not used.
        """
        self.resume({"pool": position["pool"] + 1, "places": position["after"], "batches": 0}, 0)

    def __str__(self) -> str:
        shares = [f"{name} {share:.1%}" for name, share in zip(self.names, self.shares, strict=True) if share]
        return f"shares of the rows: {', '.join(shares)}"

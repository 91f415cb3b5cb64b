"""Which rows of several corpora make an epoch.

A mixture in memory is an order of row numbers over one table that holds all corpora (`concatenate_datasets`). An epoch
has as many rows as its corpora have together, and each corpus gives its share of them: in every epoch the same number,
but other rows.

The library's `interleave_datasets` does not fit: its shares are only approximate, its order is fixed when it is made,
and it ends where a corpus ends, or repeats that corpus in the same order.
"""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from ..errors import RecipeError
from .epochs import EpochRows, row_lengths


# The fractional part of the golden ratio: multiples of it, modulo 1, cover the interval more evenly than any other.
GOLDEN = (5**0.5 - 1) / 2


def weights_by_size(sizes: Sequence[int], temperature: float) -> list[float]:
    """
    The weights of corpora by their sizes (Arivazhagan et al., 2019, arXiv 1907.05019, section 4.1).

    Args:
        sizes: the number of rows of each corpus.
        temperature: 1 takes the sizes as they are; with more, the weights become more equal.
    """
    return [size ** (1 / temperature) for size in sizes]


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """
    How many of `total` rows each corpus gives: its share, rounded so that the sum is `total` (largest remainders).
    """
    exact = np.asarray(weights, dtype=np.float64) * (total / sum(weights))
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[: total - int(counts.sum())]] += 1
    return counts.tolist()


class Sample:
    """
    So many rows of one corpus in each epoch, other rows in other epochs, always of the same lengths (almost).

    The rows are ordered by length, and those that an epoch takes stand at equal distances (systematic sampling, Madow
    and Madow, 1944). The first place moves from epoch to epoch by the golden ratio. So

    - every row is equally probable, and is seen as often as the others, plus or minus one or two;
    - what stands at a given place of the sample is in every epoch one of a few neighbours of nearly equal lengths. So
      batches can be planned once, by the longest of these neighbours.

    Args:
        order: the numbers of the corpus's rows, ordered by length.
        count: how many rows an epoch takes; more than there are if the corpus is repeated.
        seed: decides the first epoch's place.
    """

    def __init__(self, order: np.ndarray, count: int, seed: int):
        self.order, self.count = order, count
        self.start = float(np.random.default_rng(seed).random())
        self.step = len(order) / count

    def rows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The row at each place in this epoch, and how many times it stands at earlier places: `[count]` each."""
        first = (self.start + epoch * GOLDEN) % 1
        places = ((np.arange(self.count) + first) * self.step).astype(np.int64).clip(max=len(self.order) - 1)
        return self.order[places], np.arange(self.count) - np.searchsorted(places, places)

    def longest(self, lengths: np.ndarray) -> np.ndarray:
        """The maximum of the lengths that can stand at each place, `[count]`, of the lengths of all rows."""
        first = (np.arange(self.count) * self.step).astype(np.int64)
        beyond = (np.arange(1, self.count + 1) * self.step).astype(np.int64) + 1
        ordered = np.append(lengths[self.order], 0)
        bounds = np.stack([first, beyond.clip(max=len(self.order))], axis=1).ravel()
        return np.maximum.reduceat(ordered, bounds)[::2]


class MixedRows(EpochRows):
    """
    An epoch of a mixture: `len(self)` places, each with another row in each epoch. Batches are made of places.

    A row also says its `corpus`, by number.

    Args:
        rows: the rows of all corpora.
        corpus: the number of each row's corpus, `[rows]`.
        names: the corpora.
        weights: of each corpus; 0 leaves it out.
        seed: decides, with the epoch, which rows are taken.

    Raises:
        RecipeError: a weight is so small that an epoch has no row of the corpus.
    """

    def __init__(
        self,
        rows: Dataset | EpochRows,
        corpus: np.ndarray,
        names: Sequence[str],
        weights: Sequence[float],
        seed: int,
    ):
        super().__init__(rows)
        self.names = list(names)
        source, target = row_lengths(rows)
        taken = [number for number, weight in enumerate(weights) if weight]
        self.sizes = np.bincount(corpus, minlength=len(names)).tolist()
        counts = quotas([weights[number] for number in taken], sum(self.sizes[number] for number in taken))
        #: How many rows of each corpus an epoch has.
        self.counts = [0] * len(names)
        self.samples = []
        for number, count in zip(taken, counts, strict=True):
            if not count:
                share = weights[number] / sum(weights)
                raise RecipeError(
                    f"corpora: {names[number]}: its weight is {share:.2g} of all, which gives it no row of the "
                    f"{sum(counts)} in an epoch: raise it, or leave the corpus out"
                )
            self.counts[number] = count
            order = order_by_length(np.flatnonzero(corpus == number), source, target, seed)
            self.samples.append(Sample(order, count, seed + number))
        self._corpus = np.repeat(taken, counts)
        self._lengths = tuple(np.concatenate([s.longest(side) for s in self.samples]) for side in (source, target))
        self._drawn: tuple[int, np.ndarray] = (-1, np.empty(0))

    @property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """For each place, the most source tokens and the most target tokens of the rows that may stand there."""
        source, target = self._lengths
        return source, target

    def __len__(self) -> int:
        return len(self._corpus)

    @property
    def numbers(self) -> np.ndarray:
        """The number of the row at each place in the current epoch, `[places]`."""
        epoch = self.epoch
        if self._drawn[0] != epoch:
            drawn = (sample.rows(epoch) for sample in self.samples)
            self._drawn = epoch, np.concatenate([rows + copy * len(self.rows) for rows, copy in drawn])
        return self._drawn[1]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, list[int]]]:
        """The rows at these places."""
        columns = self.columns(self.numbers[numbers].tolist())
        columns["corpus"] = self._corpus[numbers].tolist()
        names = ("input_ids", "labels", "corpus")
        return [dict(zip(names, row, strict=True)) for row in zip(*(columns[name] for name in names), strict=True)]

    def __str__(self) -> str:
        lines = [f"an epoch has {len(self):,} rows:"]
        for name, size, count in zip(self.names, self.sizes, self.counts, strict=True):
            times = f"each of its {size:,} rows {count / size:.3g} times" if count else "left out"
            lines.append(f"  {name}: {count:,} rows, {count / len(self):.1%}; {times}")
        return "\n".join(lines)


def order_by_length(rows: np.ndarray, source: np.ndarray, target: np.ndarray, seed: int) -> np.ndarray:
    """
    These rows, ordered by their longer side, then by the difference of the sides, up and down in turn, as
    TokenBudgetBatches orders them; rows of equal lengths in random order.
    """
    source, target = source[rows], target[rows]
    longest, difference = np.maximum(source, target), target - source
    snake = np.where(longest % 2 == 0, difference, -difference)
    return rows[np.lexsort((np.random.default_rng(seed).permutation(len(rows)), snake, longest))]

"""Training rows that differ from epoch to epoch, each kind laid over the one below it.

    the ids (a Dataset) <- TransformedRows <- BpeDropoutRows <- MixedRows

A row has a number. Seed, epoch and number decide everything that is drawn for it, so it is the same in resumed runs,
all processes and all workers. If a mixture takes a row several times in an epoch, each further copy has a number of its
own: the row's number plus a multiple of the number of rows.
"""

from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset


# The columns that a batch is made of.
SIDES_OF_IDS = ("input_ids", "labels")
Columns = dict[str, list[Any]]


class EpochRows(torch.utils.data.Dataset):
    """
    Rows, `{"input_ids", "labels"}`, that depend on the epoch. A subclass overrides `columns`.

    Args:
        rows: the rows below.
    """

    def __init__(self, rows: "Dataset | EpochRows"):
        self.rows = rows
        # In shared memory, since persistent workers were started in an earlier epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Must be called at the start of each epoch, before its first row is read."""
        self._epoch.fill_(epoch)
        if isinstance(self.rows, EpochRows):
            self.rows.set_epoch(epoch)

    @property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each row's source and target, by which batches are planned: the same in every epoch."""
        return row_lengths(self.rows)

    def growth(self) -> float:
        """The factor by which rows are longer than planned, on a sample."""
        return self.rows.growth() if isinstance(self.rows, EpochRows) else 1.0

    def __len__(self) -> int:
        return len(self.rows)

    def columns(self, numbers: list[int]) -> Columns:
        """The columns of these rows. A number from `len(self)` on is another copy of a row."""
        if isinstance(self.rows, EpochRows):
            return self.rows.columns(numbers)
        return self.rows[[number % len(self.rows) for number in numbers]]

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number >= len(self):
            raise IndexError(number)
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """A batch of rows, as a DataLoader asks for them."""
        columns = self.columns(numbers)
        return [
            dict(zip(SIDES_OF_IDS, row, strict=True)) for row in zip(*(columns[s] for s in SIDES_OF_IDS), strict=True)
        ]


def row_lengths(rows: Dataset | EpochRows) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row's source and target, `[rows]` each."""
    if isinstance(rows, EpochRows):
        return rows.lengths
    table = rows.with_format("arrow")[:]
    source, target = (pc.list_value_length(table[name]).to_numpy().astype(np.int64) for name in SIDES_OF_IDS)
    return source, target

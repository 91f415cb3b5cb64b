"""Batches of rows of similar length, limited by their number of tokens (Vaswani et al., 2017, section 5.1)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import BatchRebalanceSampler

from ..errors import UserError
from ..words import counted
from .epochs import EpochRows, row_lengths


class BatchError(UserError):
    """Rows that cannot be divided into the requested batches."""


# For subclasses of this sampler, the Trainer lets the sampler itself divide the batches among the processes.
class TokenBudgetBatches(BatchRebalanceSampler):
    """
    Yields batches, as lists of row numbers, of at most `max_tokens` padded tokens on each side.

    To reduce padding, rows are sorted by the length of their longer side. Rows with an equal longer side are sorted by
    the difference of both sides, alternately ascending and descending. The sorted rows are cut into batches that fill
    the budget. Each epoch shuffles rows of equal lengths, and the order of the batches: from long to short, a small
    model would forget long sentences while it learns short ones. The number and the sizes of the batches stay the same,
    so a run can resume at any batch, and every process has the same number of batches.

    Args:
        source_lengths: tokens of each row's source.
        target_lengths: tokens of each row's target.
        max_tokens: maximum tokens of a batch on each side, padding included.
        seed: seed and epoch alone determine the order, in all processes and after resuming.
        num_processes: number of processes that share the batches.
        process_index: the process whose batches are yielded.
        shuffle: False yields the batches in order, the longest first, for evaluation.

    Raises:
        BatchError: a row is longer than the budget, or there are fewer rows than processes.
    """

    def __init__(
        self,
        source_lengths: Sequence[int] | np.ndarray,
        target_lengths: Sequence[int] | np.ndarray,
        max_tokens: int,
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        shuffle: bool = True,
    ):
        sources, targets = torch.tensor(source_lengths), torch.tensor(target_lengths)
        # The parent's __init__ is not called: its attributes are for its own batches.
        self.seed = seed
        self.epoch = 0
        self.num_processes = num_processes
        self.process_index = process_index
        self.shuffle = shuffle
        longest = torch.maximum(sources, targets)
        if longest.max() > max_tokens:
            raise BatchError(
                f"row {longest.argmax() + 1} has {longest.max()} tokens, more than a batch may hold: raise the budget "
                f"of {max_tokens} tokens (per_device_train_batch_tokens, per_device_eval_batch_tokens), or leave out "
                "longer rows with max_source_length and max_target_length"
            )
        if len(sources) < num_processes:
            raise BatchError(f"{counted(len(sources), 'row')} for {num_processes} processes: add data, or use fewer")
        difference = targets - sources
        snake = torch.where(longest % 2 == 0, difference, -difference)
        self.key = longest * (2 * longest.max() + 1) + snake
        order = self.key.argsort(descending=True, stable=True)
        self.sizes = batch_sizes(longest[order].tolist(), max_tokens, num_processes)

        shapes = [part.max() * len(part) for side in (sources, targets) for part in side[order].split(self.sizes)]
        #: The share of padding in the batches, both sides together.
        self.padding = 1 - float(sources.sum() + targets.sum()) / float(sum(shapes))

    def __len__(self) -> int:
        return len(self.sizes) // self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        if not self.shuffle:
            batches = self.key.argsort(descending=True, stable=True).split(self.sizes)
            yield from (batch.tolist() for batch in batches[self.process_index :: self.num_processes])
            return
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.key), generator=generator)
        batches = shuffled[self.key[shuffled].argsort(descending=True, stable=True)].split(self.sizes)
        order = torch.randperm(len(batches), generator=generator)
        for number in order[self.process_index :: self.num_processes].tolist():
            yield batches[number].tolist()


def batch_sizes(lengths: list[int], max_tokens: int, multiple_of: int = 1) -> list[int]:
    """
    The number of rows in each batch, for rows of these lengths in this order. A batch holds as many rows as fit into
    `max_tokens` padded tokens, and at least one. Then the largest batches are halved until the number of batches is a
    multiple of `multiple_of`.
    """
    sizes, size, longest = [], 0, 0
    for length in lengths:
        longest = max(longest, length)
        if size and (size + 1) * longest > max_tokens:
            sizes.append(size)
            size, longest = 0, length
        size += 1
    sizes += [size] if size else []
    while len(sizes) % multiple_of:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        half = sizes[largest] // 2
        sizes[largest : largest + 1] = [half, sizes[largest] - half]
    return sizes


def token_budget(rows: Dataset | EpochRows, max_tokens: int, **options: Any) -> TokenBudgetBatches:
    """`TokenBudgetBatches` of rows with the columns `input_ids` and `labels`."""
    source, target = row_lengths(rows)
    return TokenBudgetBatches(source, target, max_tokens, **options)

"""The order in which a Trainer sees its rows: batches of similar lengths, in random order."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


# A pool of so many batches is sorted at a time: little padding is left, and batches still differ between epochs.
POOL = 50


class LengthGroupedBatches(Sampler[int]):
    """
    Yields row numbers so that each `batch_size` in a row are one batch of rows of similar lengths.

    transformers' own `LengthGroupedSampler` leaves the batches of a pool in the order of their lengths. Updates then go
    from long sentences to short ones, again and again, and a small model forgets the ones while it learns the others.
    Here the batches are shuffled.

    Args:
        lengths: length of each row.
        batch_size: rows of one batch.
        seed: with the epoch, it alone decides the order: the same in every process, and in a run that resumes.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's order; the Trainer calls it as each epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        batches: list[torch.Tensor] = []
        for pool in shuffled.split(POOL * self.batch_size):
            batches += pool[self.lengths[pool].argsort(stable=True)].split(self.batch_size)
        # The one batch that may be smaller must be the last, or all after it would straddle two.
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        order = torch.randperm(len(batches), generator=generator).tolist()
        for batch in [*(batches[number] for number in order), *last]:
            yield from batch.tolist()

"""The order of training rows: complete, grouped by length, shuffled, and the same wherever it must be."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from vanilla_transformer.training.batching import LengthGroupedBatches


LENGTHS = torch.randint(1, 60, (5003,), generator=torch.Generator().manual_seed(0)).tolist()


def batches(seed=0, epoch=0, size=8, lengths=LENGTHS) -> list[list[int]]:
    sampler = LengthGroupedBatches(lengths, size, seed)
    sampler.set_epoch(epoch)
    return list(BatchSampler(sampler, size, drop_last=False))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 400, 401, 5003])
def test_every_row_comes_once_and_only_the_last_batch_is_small(count):
    found = batches(lengths=LENGTHS[:count])
    assert sorted(row for batch in found for row in batch) == list(range(count))
    assert all(len(batch) == 8 for batch in found[:-1])


def test_little_of_a_batch_is_padding():
    def padding(found):
        padded = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in found)
        return 1 - sum(LENGTHS) / padded

    unsorted = list(BatchSampler(range(len(LENGTHS)), 8, drop_last=False))
    assert padding(batches()) < 0.05 < 0.3 < padding(unsorted)


def test_batches_do_not_come_in_the_order_of_their_lengths():
    means = torch.tensor([sum(LENGTHS[row] for row in batch) / 8 for batch in batches()[:-1]])
    neighbours = torch.corrcoef(torch.stack([means[1:], means[:-1]]))[0, 1]
    assert abs(neighbours) < 0.2


def test_the_seed_and_the_epoch_decide_the_order_whatever_was_drawn_before():
    first = batches(seed=3, epoch=2)
    torch.rand(7)
    assert batches(seed=3, epoch=2) == first
    assert batches(seed=3, epoch=1) != first
    assert batches(seed=4, epoch=2) != first


def test_processes_share_an_epochs_batches_without_overlap():
    shards = []
    for process in range(2):
        sampler = BatchSampler(LengthGroupedBatches(LENGTHS[:4000], 8, seed=0), 8, drop_last=False)
        shards.append([tuple(batch) for batch in BatchSamplerShard(sampler, 2, process)])
    assert not set(shards[0]) & set(shards[1])
    assert sorted(row for shard in shards for batch in shard for row in batch) == list(range(4000))

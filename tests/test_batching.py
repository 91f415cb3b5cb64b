"""Token-budget batches: complete, within the budget, shuffled, and reproducible."""

from collections import Counter

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader

from vanilla_transformer.training.data.batching import BatchError, TokenBudgetBatches, batch_sizes


GENERATOR = torch.Generator().manual_seed(0)
SOURCES = torch.randint(1, 60, (5003,), generator=GENERATOR)
TARGETS = (SOURCES * (0.8 + 0.4 * torch.rand(5003, generator=GENERATOR))).ceil().long()
SOURCES, TARGETS = SOURCES.tolist(), TARGETS.tolist()


def sampler(epoch=0, rows=5003, max_tokens=300, **options) -> TokenBudgetBatches:
    found = TokenBudgetBatches(SOURCES[:rows], TARGETS[:rows], max_tokens, **options)
    found.set_epoch(epoch)
    return found


def padded(batch: list[int], lengths: list[int]) -> int:
    return len(batch) * max(lengths[row] for row in batch)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("rows", [3, 7, 400, 5003])
def test_every_row_comes_once_within_the_budget_and_every_process_has_as_many_batches(rows, processes):
    for epoch in range(3):
        shares = [
            list(sampler(epoch, rows, num_processes=processes, process_index=index)) for index in range(processes)
        ]
        found = [batch for share in shares for batch in share]
        assert sorted(row for batch in found for row in batch) == list(range(rows))
        assert max(max(padded(batch, SOURCES), padded(batch, TARGETS)) for batch in found) <= 300
        assert {len(share) for share in shares} == {len(sampler(rows=rows, num_processes=processes))}


def test_little_is_padding_and_its_share_is_told():
    batches = sampler()
    places = sum(padded(batch, lengths) for batch in batches for lengths in (SOURCES, TARGETS))
    waste = 1 - (sum(SOURCES) + sum(TARGETS)) / places
    assert batches.padding == pytest.approx(waste, rel=1e-6)
    assert waste < 0.05
    # As full as the budget allows: one more row of a batch's longest would be too much for nearly all of them.
    full = [len(batch) + 1 for batch in batches if padded(batch, SOURCES) + padded(batch, TARGETS) > 450]
    assert len(full) > 0.9 * len(batches)


def test_batches_do_not_come_in_the_order_of_their_lengths():
    means = torch.tensor([sum(TARGETS[row] for row in batch) / len(batch) for batch in sampler()])
    neighbours = torch.corrcoef(torch.stack([means[1:], means[:-1]]))[0, 1]
    assert abs(neighbours) < 0.2


def test_epochs_mix_rows_of_equal_lengths_anew():
    first, second = (Counter(frozenset(batch) for batch in sampler(epoch)) for epoch in (0, 1))
    assert sum((first & second).values()) < 0.2 * len(sampler())


def test_the_seed_and_the_epoch_decide_the_order_whatever_was_drawn_before():
    first = list(sampler(2, seed=3))
    torch.rand(7)
    assert list(sampler(2, seed=3)) == first
    assert list(sampler(1, seed=3)) != first
    assert list(sampler(2, seed=4)) != first


def test_evaluation_takes_the_longest_first():
    longest = [max(max(SOURCES[row], TARGETS[row]) for row in batch) for batch in sampler(shuffle=False)]
    assert longest == sorted(longest, reverse=True)


def test_accelerate_hands_out_the_batches_as_they_are_and_skips_to_any_of_them():
    rows = Dataset.from_dict({"row": list(range(5003))})
    batches, expected = sampler(), list(sampler(4))
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=lambda batch: [item["row"] for item in batch])
    prepared = prepare_data_loader(loader, num_processes=1, process_index=0)
    prepared.set_epoch(4)
    assert list(prepared) == expected
    batches.set_epoch(4)
    assert list(skip_first_batches(prepared, 17)) == expected[17:]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([], []), ([4, 4, 4], [2, 1]), ([20, 3, 3], [1, 2]), ([2, 8, 1], [1, 1, 1]), ([1] * 9, [9])],
)
def test_batch_sizes_fill_the_budget_and_a_longer_row_stays_alone(lengths, expected):
    assert batch_sizes(lengths, 9) == expected


def test_the_largest_batches_are_halved_until_their_number_fits():
    assert batch_sizes([1] * 9, 9, multiple_of=4) == [2, 2, 2, 3]


def test_what_cannot_be_a_batch_is_refused_by_name():
    with pytest.raises(BatchError, match=r"row 2 has 70 tokens.*budget of 64 tokens"):
        TokenBudgetBatches([5, 6], [7, 70], 64)
    with pytest.raises(BatchError, match="2 rows for 3 processes"):
        TokenBudgetBatches([5, 6], [7, 7], 64, num_processes=3)

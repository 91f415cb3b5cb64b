"""Which rows of several corpora make an epoch or a stretch of a stream: shares, evenness, order, budgets."""

import itertools
import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training.data.batching import token_budget
from vanilla_transformer.training.data.mixture import MixedRows, Sample, quotas, weights_by_size
from vanilla_transformer.training.data.streamed_mixture import MixedBatches
from vanilla_transformer.training.errors import DataError, RecipeError
from vanilla_transformer.training.settings.arguments import DataArguments
from vanilla_transformer.training.settings.corpora import Corpus, Transform


NAMES, SIZES = ["clean", "crawled", "bt"], [300, 1000, 2000]


def test_quotas_are_the_whole_numbers_nearest_to_the_shares():
    draw = random.Random(0)
    for _ in range(200):
        weights = [draw.random() + 0.01 for _ in range(draw.randint(1, 6))]
        total = draw.randint(0, 500)
        counts = quotas(weights, total)
        exact = [total * weight / sum(weights) for weight in weights]
        assert sum(counts) == total
        assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))
    # Of all whole numbers with that sum, none is nearer.
    exact = np.array([1.6, 2.3, 4.1])
    nearest = min(
        (c for c in itertools.product(range(9), repeat=3) if sum(c) == 8), key=lambda c: ((c - exact) ** 2).sum()
    )
    assert quotas(exact.tolist(), 8) == list(nearest)


def test_a_temperature_makes_the_weights_more_equal():
    assert weights_by_size(SIZES, 1) == SIZES
    shares = [np.array(weights_by_size(SIZES, t)) / sum(weights_by_size(SIZES, t)) for t in (1, 2, 5, 1e9)]
    spread = [share.max() / share.min() for share in shares]
    assert spread == sorted(spread, reverse=True)
    assert spread[1] == pytest.approx((2000 / 300) ** 0.5)
    assert spread[3] == pytest.approx(1)


@pytest.mark.parametrize("count", [1, 7, 33, 99, 100, 101, 250, 300])
def test_every_row_is_taken_as_often_as_the_others(count):
    sample, seen = Sample(np.arange(100), count, seed=3), Counter()
    epochs = 400
    for epoch in range(epochs):
        rows, copies = sample.rows(epoch)
        assert len(rows) == count
        # Of a row that is taken several times in an epoch, each copy has a number.
        assert sorted(zip(rows.tolist(), copies.tolist(), strict=True)) == sorted(
            (row, copy) for row, times in Counter(rows.tolist()).items() for copy in range(times)
        )
        assert max(Counter(rows.tolist()).values()) - (count >= 100) * min(Counter(rows.tolist()).values()) <= 1
        seen.update(rows.tolist())
    expected = epochs * count / 100
    assert all(abs(seen[row] - expected) < 3 for row in range(100))


def test_what_an_epoch_takes_is_other_rows_of_nearly_the_same_lengths():
    draw = np.random.default_rng(0)
    lengths = np.sort(draw.integers(1, 60, 5000))
    sample = Sample(np.arange(5000), 700, seed=1)
    bound = sample.longest(lengths)
    epochs = [sample.rows(epoch)[0] for epoch in range(20)]
    assert all((lengths[rows] <= bound).all() for rows in epochs)
    assert all(bound.sum() - lengths[rows].sum() < 60 * 2 for rows in epochs)
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(epochs))
    # Seven successive epochs of a seventh: a random choice would take 3,300 rows at least once.
    assert len(set(np.concatenate(epochs[:7]).tolist())) > 4400


@pytest.fixture(scope="module")
def table() -> Dataset:
    """Rows of uneven lengths whose first token is their number."""
    draw, rows = random.Random(5), []
    for number in range(sum(SIZES)):
        lengths = draw.randint(2, 20), draw.randint(2, 20)
        rows.append({name: [number] * length for name, length in zip(("input_ids", "labels"), lengths, strict=True)})
    return Dataset.from_list(rows)


CORPUS = np.repeat(range(3), SIZES)


def mixed(table, *weights: float, seed: int = 1) -> MixedRows:
    return MixedRows(table, CORPUS, NAMES, weights, seed)


def epoch_of(rows: MixedRows, epoch: int) -> list[dict]:
    rows.set_epoch(epoch)
    return rows.__getitems__(list(range(len(rows))))


WEIGHTS = [(1, 1, 1), (6, 3, 1), (1, 0, 3), (0, 0, 1), (0.07, 0.9, 0.03), (300, 1000, 2000)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_shares_of_an_epoch_are_the_weights(weights, table):
    rows = mixed(table, *weights)
    assert len(rows) == sum(size for size, weight in zip(SIZES, weights, strict=True) if weight)
    for epoch in (0, 1, 17):
        found = Counter(row["corpus"] for row in epoch_of(rows, epoch))
        for number, weight in enumerate(weights):
            assert found[number] / len(rows) == pytest.approx(weight / sum(weights), abs=0.001)
        for row in epoch_of(rows, epoch):
            assert CORPUS[row["input_ids"][0]] == row["corpus"]
            assert row["input_ids"][0] == row["labels"][0]


def test_by_their_sizes_every_row_comes_once_in_each_epoch(table):
    rows = mixed(table, *SIZES)
    for epoch in range(3):
        assert sorted(row["input_ids"][0] for row in epoch_of(rows, epoch)) == list(range(sum(SIZES)))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("weights", WEIGHTS[:3])
def test_all_processes_together_have_the_same_mixture_in_batches_within_the_budget(processes, weights, table):
    rows, budget = mixed(table, *weights), 150
    samplers = [
        token_budget(rows, budget, seed=2, num_processes=processes, process_index=index) for index in range(processes)
    ]
    for epoch in range(4):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        rows.set_epoch(epoch)
        batches = [[rows.__getitems__(places) for places in sampler] for sampler in samplers]
        assert len({len(share) for share in batches}) == 1
        given = [row for share in batches for batch in share for row in batch]
        assert sorted(map(str, given)) == sorted(map(str, epoch_of(rows, epoch)))
        shares = [Counter(row["corpus"] for batch in share for row in batch) for share in batches]
        for share in shares:
            for number, weight in enumerate(weights):
                assert share[number] / share.total() == pytest.approx(weight / sum(weights), abs=0.06)
        for batch in itertools.chain(*batches):
            for side in ("input_ids", "labels"):
                assert len(batch) * max(len(row[side]) for row in batch) <= budget


def test_seed_and_epoch_decide_and_workers_see_the_same(table):
    rows = mixed(table, 1, 1, 1)
    first = epoch_of(rows, 3)
    assert epoch_of(mixed(table, 1, 1, 1), 3) == first == epoch_of(pickle.loads(pickle.dumps(rows)), 3)
    assert epoch_of(rows, 4) != first
    assert epoch_of(mixed(table, 1, 1, 1, seed=2), 3) != first
    loader = DataLoader(rows, batch_size=100, collate_fn=list, num_workers=1, persistent_workers=True)
    for epoch in (3, 0):
        rows.set_epoch(epoch)
        assert [row for batch in loader for row in batch] == epoch_of(rows, epoch)


def test_the_rows_of_an_epoch_can_be_looped_over(table):
    rows = mixed(table, 1, 1, 1)
    assert len(list(itertools.islice(rows, len(rows) + 1))) == len(rows)


def test_a_weight_that_gives_no_row_is_refused(table):
    with pytest.raises(
        RecipeError, match=r"corpora: bt: its weight is 1e-05 of all, which gives it no row of the 3300"
    ):
        mixed(table, 1, 1, 2e-5)


WORDS = ["ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben"]
BUDGET, LENGTH = 150, 120


def texts(name: str, size: int) -> list[dict[str, str]]:
    draw = random.Random(name)
    return [
        {"source": f"{name} {number} {' '.join(draw.choices(WORDS, k=draw.randint(1, 8)))}", "target": f"{number}"}
        for number in range(size)
    ]


TEXTS = {name: texts(name, size) for name, size in zip(NAMES, (40, 170, 300), strict=True)}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for rows in TEXTS.values() for row in rows for text in row.values()], 330)


def give(name: str):
    yield from TEXTS[name]


def stream(tokenizer, *weights: float, length: int = LENGTH, transforms=(), **options) -> MixedBatches:
    data = DataArguments(shuffle_buffer=64, max_source_length=60)
    corpora = [Corpus(name, data, 1.0, transforms if name == "bt" else ()) for name in NAMES]
    streams = [IterableDataset.from_generator(give, gen_kwargs={"name": name}) for name in NAMES]
    return MixedBatches(streams, tokenizer, corpora, weights, BUDGET, length, **options)


def rows_in(batches: list[dict]) -> list[dict]:
    return [row for batch in batches for row in batch["rows"]]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("weights", [(1, 1, 1), (6, 3, 1), (1, 0, 3)])
def test_the_shares_of_a_stream_are_the_weights_in_every_process(weights, processes, tokenizer):
    for index in range(processes):
        batches = list(stream(tokenizer, *weights, length=200, num_processes=processes, process_index=index))
        last = max(batch["position"]["pool"] for batch in batches)
        rows = rows_in([batch for batch in batches if batch["position"]["pool"] < last])
        # Each corpus is rounded to whole rows.
        assert abs(len(rows) - 64 * last) <= 1
        assert last > 25
        for number, weight in enumerate(weights):
            found = sum(row["corpus"] == number for row in rows) / len(rows)
            assert found == pytest.approx(weight / sum(weights), abs=0.001)


def test_a_streamed_corpus_gives_every_row_once_in_each_of_its_passes(tokenizer):
    batches = list(stream(tokenizer, 1, 1, 1, length=200))
    for number, name in enumerate(NAMES):
        found = [row["input_ids"] for row in rows_in(batches) if row["corpus"] == number]
        counts = Counter(tokenizer.decode(ids, skip_special_tokens=True) for ids in found)
        assert set(counts) <= {row["source"] for row in TEXTS[name]}
        # The pool that is in use has taken some rows of a pass, in another order.
        assert max(counts.values()) - min(counts[row["source"]] for row in TEXTS[name]) <= 2
    assert len({str(row["input_ids"]) for row in rows_in(batches)}) == sum(map(len, TEXTS.values()))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_streamed_mixture_resumes_after_any_batch(processes, tokenizer):
    transforms = (Transform("typos", 0.5), Transform("tag", 0.5, "<t>"))
    options = {"transforms": transforms, "num_processes": processes, "process_index": processes - 1}
    batches = list(stream(tokenizer, 3, 2, 1, **options))
    draw = random.Random(0)
    for taken in [1, LENGTH - 1, *(draw.randrange(1, LENGTH) for _ in range(8))]:
        resumed = stream(tokenizer, 3, 2, 1, **options)
        resumed.resume(json.loads(json.dumps(batches[taken - 1]["position"])), skipped=taken)
        assert list(resumed) == [None] * taken + batches[taken:]


def test_a_stage_goes_on_in_the_corpora_where_the_one_before_ended(tokenizer):
    batches = list(stream(tokenizer, 0, 1, 1))
    following = stream(tokenizer, 1, 0, 1, length=3)
    following.next_stage(batches[30]["position"])
    rows = rows_in(list(following))
    assert {row["corpus"] for row in rows} == {0, 2}
    before = [row["input_ids"] for row in rows_in(batches[:31]) if row["corpus"] == 2]
    assert len(before) < 300, "within the first pass"
    assert not [row for row in rows if row["input_ids"] in before]


def test_a_streamed_corpus_without_a_usable_row_is_named(tokenizer):
    batches = stream(tokenizer, 1, 1, 1)
    batches.streams[1].length_tests = {"no reason": lambda *_: True}
    with pytest.raises(
        DataError, match=r"corpora: crawled: train: a process has no row .*of 170 rows .*170 for no reason"
    ):
        list(batches)

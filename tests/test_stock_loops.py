"""Random searches beside transformers' own loops, in a short form of `make fuzz`; and that it would see a mistake."""

from collections import Counter

import pytest
from stock_loops import PROCESSORS, differences, random_case

from vanilla_transformer import decoding_job


BLOCKS, SEEDS = 6, 10


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_searches_are_those_of_transformers(block):
    found = [each for seed in range(block * SEEDS, (block + 1) * SEEDS) for each in differences(seed)]
    assert not found, "\n".join(found)


def test_the_cases_are_of_all_kinds():
    seen: Counter[str] = Counter()
    for seed in range(BLOCKS * SEEDS):
        _, _, options = random_case(seed)
        seen.update(options.keys())
        mask = options["attention_mask"]
        seen["padding on the left"] += bool((mask[:, 0] == 0).any())
        seen["padding on the right"] += bool((mask[:, -1] == 0).any())
        seen["several ends"] += isinstance(options["eos_token_id"], list) and len(options["eos_token_id"]) > 1
        seen["no end"] += options["eos_token_id"] is None
        seen["beams"] += options["num_beams"] > 1
        seen[f"early stopping {options.get('early_stopping')}"] += 1
        seen["what the compiled program knows"] += PROCESSORS.isdisjoint(options)
    expected = PROCESSORS | {
        "padding on the left", "padding on the right", "several ends", "no end", "beams", "decoder_input_ids",
        "decoder_attention_mask", "min_length", "min_new_tokens", "max_length", "max_new_tokens",
        "num_return_sequences", "early stopping True", "early stopping False", "early stopping never",
        "what the compiled program knows",
    }  # fmt: skip
    assert {name for name in expected if seen[name] < 3} == set()


# Small mistakes in our searches, by what is replaced.
def another_length(monkeypatch):
    penalty = decoding_job.Options.length_penalty
    monkeypatch.setattr(decoding_job.Options, "length_penalty", lambda self, n, alpha: penalty(self, n + 1, alpha))


def an_end_too_many(monkeypatch):
    is_eos = decoding_job.SearchJob.is_eos
    monkeypatch.setattr(decoding_job.SearchJob, "is_eos", lambda job, tokens: is_eos(job, tokens) | (tokens == 5))


def another_minimum(monkeypatch):
    monkeypatch.setattr(decoding_job.SearchJob, "minimum_length", property(lambda self: 3))


def a_processor_left_out(monkeypatch):
    monkeypatch.setattr(decoding_job.SearchJob, "processed", lambda job, scores, ids: scores)


@pytest.mark.parametrize(
    "mistake",
    [another_length, an_end_too_many, another_minimum, a_processor_left_out],
    ids=lambda f: f.__name__,
)
def test_a_mistake_is_found(monkeypatch, mistake):
    mistake(monkeypatch)
    assert any(any(differences(seed)) for seed in range(BLOCKS * SEEDS))

"""Forbidden and required phrases: every output obeys them, the best one is found, and errors are clear."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationMixin

from vanilla_transformer.decoding_constraints import Progress, RequiredPhrases


LENGTHS = (7, 4, 1, 6, 3)
FEW = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def model(lively_model):
    return lively_model()


@pytest.fixture(scope="module")
def source(padded):
    return dict(zip(("input_ids", "attention_mask"), padded(LENGTHS), strict=True))


def contains(tokens: list[int], phrase: list[int]) -> bool:
    return any(tokens[place : place + len(phrase)] == phrase for place in range(len(tokens)))


def holds(tokens: list[int], phrases: list[list[int]]) -> bool:
    """Whether all phrases are there, without a token that two of them share."""
    if not phrases:
        return True
    first, *others = phrases
    return any(
        tokens[place : place + len(first)] == first
        and holds([*tokens[:place], *[-1] * len(first), *tokens[place + len(first) :]], others)
        for place in range(len(tokens))
    )


def phrase_lists(tokens: st.SearchStrategy[int], most: int, longest: int, sentences: int = len(LENGTHS)):
    phrase = st.lists(tokens, min_size=1, max_size=longest)
    return st.lists(st.lists(phrase, max_size=most), min_size=sentences, max_size=sentences)


# Few different tokens make phrases that overlap, repeat themselves and begin alike; many are what users give.
SOME_TOKENS = st.one_of(st.sampled_from([5, 6, 7]), st.integers(3, 60))
WAYS = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 4, "num_return_sequences": 4},
    "samples": {"num_beams": 1, "do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "num_return_sequences": 2},
}


class TestForbidden:
    @pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
    def test_no_output_contains_a_forbidden_phrase(self, model, source, options):
        """Each sentence forbids tokens, pairs and triples of its own earlier output."""
        arguments = {**source, **options, "max_new_tokens": 10}
        torch.manual_seed(0)
        outputs = model.generate(**arguments)
        each = len(outputs) // len(LENGTHS)
        phrases = []
        for row in range(len(LENGTHS)):
            tokens = [token for token in outputs[row * each, 1:].tolist() if token not in (0, 2)]
            phrases.append([tokens[:1], tokens[1:3], tokens[2:5]][row % 3 : row % 3 + 2])
            phrases[row] = [phrase for phrase in phrases[row] if phrase]
        assert sum(map(len, phrases)) > len(LENGTHS)
        torch.manual_seed(0)
        outputs = model.generate(**arguments, forbidden_phrases=phrases)
        for number, tokens in enumerate(outputs[:, 1:].tolist()):
            assert not any(contains(tokens, phrase) for phrase in phrases[number // each])

    @FEW
    @given(
        phrases=st.lists(st.lists(st.integers(3, 60), min_size=1, max_size=3), min_size=1, max_size=8),
        beams=st.integers(1, 5),
    )
    def test_one_list_for_all_is_what_transformers_calls_bad_words(self, model, source, phrases, beams):
        arguments = {**source, "num_beams": beams, "max_new_tokens": 10}
        expected = GenerationMixin.generate(model, **arguments, bad_words_ids=phrases)
        assert torch.equal(model.generate(**arguments, forbidden_phrases=[phrases] * len(LENGTHS)), expected)

    @pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 4}], ids=["greedy", "beams"])
    def test_lists_are_those_of_their_sentences(self, model, source, options):
        phrases = [[[47]], [], [[0, 58], [9]], [[0]], [[47, 58], [47, 9], [1, 0]]]
        together = model.generate(**source, **options, max_new_tokens=10, forbidden_phrases=phrases)
        for row, length in enumerate(LENGTHS):
            bad_words = {"bad_words_ids": phrases[row]} if phrases[row] else {}
            alone = GenerationMixin.generate(
                model, source["input_ids"][row : row + 1, :length], **options, max_new_tokens=10, **bad_words
            )[0]
            assert together[row, : len(alone)].tolist() == alone.tolist()
            assert set(together[row, len(alone) :].tolist()) <= {0, 2}


class TestRequired:
    @FEW
    @given(
        phrases=phrase_lists(SOME_TOKENS, 3, 3),
        beams=st.sampled_from([2, 3, 4, 8]),
        more=st.sampled_from([1, 2, 9]),
        early_stopping=st.sampled_from([False, True, "never"]),
    )
    def test_all_outputs_contain_all_phrases(self, model, source, phrases, beams, more, early_stopping):
        output = model.generate(
            **source,
            required_phrases=phrases,
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=max(sum(map(len, several)) for several in phrases) + more,
            early_stopping=early_stopping,
            return_dict_in_generate=True,
        )
        for number, (tokens, score) in enumerate(
            zip(output.sequences[:, 1:].tolist(), output.sequences_scores.tolist(), strict=True)
        ):
            assert holds(tokens, phrases[number // beams])
            assert score > -1e6

    @pytest.mark.parametrize(
        "several",
        [
            [[5, 5, 6]],
            [[5, 6, 5, 7]],
            [[5, 6], [5, 7]],
            [[5, 7], [5, 6]],
            [[5, 6, 7], [6, 8]],
            [[5], [5], [5]],
            [[5, 6], [5, 6]],
            [[5], [5, 6]],
            [[5, 6, 7], [6]],
            [[0], [1]],
        ],
        ids=str,
    )
    def test_phrases_that_share_tokens(self, model, source, several):
        """Each phrase needs its own tokens."""
        outputs = model.generate(
            **source, required_phrases=[several] * len(LENGTHS), num_beams=4, num_return_sequences=4, max_new_tokens=12
        )
        for tokens in outputs[:, 1:].tolist():
            assert holds(tokens, several)

    @pytest.mark.parametrize(
        "options", [{}, {"length_penalty": 0.0, "early_stopping": "never"}, {"num_return_sequences": 4}]
    )
    def test_without_phrases_it_is_beam_search(self, model, source, options):
        arguments = {**source, **options, "num_beams": 4, "max_new_tokens": 10, "return_dict_in_generate": True}
        ours = model.generate(**arguments, required_phrases=[[] for _ in LENGTHS])
        stock = GenerationMixin.generate(model, **arguments, output_scores=True)
        assert torch.equal(ours.sequences, stock.sequences)
        torch.testing.assert_close(ours.sequences_scores, stock.sequences_scores, atol=1e-5, rtol=0)
        assert torch.equal(ours.beam_indices, stock.beam_indices)

    def test_beams_that_stand_for_no_hypothesis_take_the_place_of_none(self):
        """At first there is one hypothesis: the others' scores are -1e9."""
        log_probs = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0)).log_softmax(dim=-1)
        scores = torch.tensor([[0.0, -1e9, -1e9, -1e9]])
        required = RequiredPhrases([[[5]]], width=4)
        best, beams, tokens = required.candidates(log_probs, scores, 8, torch.tensor([2]), is_last=False)
        assert best.max() > -10
        chosen = {
            (beam, token) for score, beam, token in zip(best[0], beams[0], tokens[0], strict=True) if score > -1e9
        }
        assert len(chosen) == 4
        assert {int(beam) for beam, _ in chosen} == {0}

    def test_neighbours_with_other_phrases_change_nothing(self, model, source):
        phrases = [[[5, 6], [30]], [], [[9]], [[5, 7, 5]], [[11, 12]]]
        options = {"num_beams": 4, "max_new_tokens": 12, "return_dict_in_generate": True}
        together = model.generate(**source, **options, required_phrases=phrases)
        for row, length in enumerate(LENGTHS):
            alone = model.generate(
                source["input_ids"][row : row + 1, :length], **options, required_phrases=[phrases[row]]
            )
            tokens = alone.sequences[0].tolist()
            assert together.sequences[row, : len(tokens)].tolist() == tokens
            assert float(together.sequences_scores[row]) == pytest.approx(float(alone.sequences_scores[0]), abs=1e-5)

    @pytest.mark.parametrize(
        "options",
        [{}, {"length_penalty_form": "gnmt", "length_penalty": 0.6}, {"ensemble": "itself"}, {"min_length": 9}],
    )
    def test_scores_are_those_of_the_outputs(self, model, source, options):
        options = {**options, "ensemble": [model]} if "ensemble" in options else options
        phrases = [[[5, 6], [30]], [], [[9]], [[5, 7, 5]], [[11, 12]]]
        output = model.generate(
            **source, **options, required_phrases=phrases, num_beams=5, max_new_tokens=12, return_dict_in_generate=True
        )
        logits = model(**source, decoder_input_ids=output.sequences[:, :-1]).logits.log_softmax(dim=-1)
        each = logits.gather(2, output.sequences[:, 1:, None]).squeeze(2)
        is_token = output.beam_indices >= 0
        length = is_token.sum(dim=1)
        divisor = ((5 + length) / 6) ** 0.6 if "length_penalty_form" in options else length
        torch.testing.assert_close(
            output.sequences_scores, (each * is_token).sum(dim=1) / divisor, atol=1e-5, rtol=1e-5
        )

    def test_more_beams_find_better_outputs(self, model, source):
        phrases = [[[5, 6], [30, 31]]] * len(LENGTHS)
        scores = [
            model.generate(
                **source, required_phrases=phrases, num_beams=beams, max_new_tokens=9, return_dict_in_generate=True
            ).sequences_scores.mean()
            for beams in (2, 40)
        ]
        assert scores[1] > scores[0]


# Required and forbidden phrases of one sentence, in a vocabulary of 5.
TOY = {
    "a token": ([[3]], []),
    "a phrase": ([[3, 4]], []),
    "two tokens": ([[3], [4]], []),
    "two that begin alike": ([[3, 4], [3, 0]], []),
    "a phrase that overlaps with itself": ([[3, 3]], []),
    "a token twice": ([[3], [3]], []),
    "forbidden only": ([], [[3], [4, 0]]),
    "required and forbidden": ([[3], [0]], [[3, 0], [4]]),
}


@pytest.mark.parametrize(("required", "forbidden"), TOY.values(), ids=TOY.keys())
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@torch.no_grad()
def test_beams_as_wide_as_the_space_find_the_best_that_keeps_to_the_phrases(
    lively_model, padded, required, forbidden, length_penalty
):
    new_tokens = 1 + max(3, sum(map(len, required)))
    model = lively_model(vocab_size=5, seed=1)
    input_ids, _ = padded((5,), vocab_size=5)
    output = model.generate(
        input_ids,
        num_beams=320 if new_tokens == 4 else 1280,
        num_return_sequences=3,
        max_new_tokens=new_tokens,
        length_penalty=length_penalty,
        early_stopping="never",
        return_dict_in_generate=True,
        **({"required_phrases": [required]} if required else {}),
        **({"forbidden_phrases": [forbidden]} if forbidden else {}),
    )
    expected = []
    for size in range(1, new_tokens + 1):
        last = range(5) if size == new_tokens else [2]
        every = list(itertools.product([1], *[[0, 1, 3, 4]] * (size - 1), last))
        every = [
            tokens
            for tokens in every
            if holds(list(tokens[1:]), required) and not any(contains(list(tokens), phrase) for phrase in forbidden)
        ]
        if not every:
            continue
        targets = torch.tensor(every)
        logits = model(input_ids.expand(len(every), -1), decoder_input_ids=targets[:, :-1]).logits.log_softmax(dim=-1)
        totals = logits.gather(2, targets[:, 1:, None]).sum(dim=(1, 2)).tolist()
        expected += [(total / size**length_penalty, tokens) for total, tokens in zip(totals, every, strict=True)]
    expected = sorted(expected, reverse=True)[:3]
    found = zip(output.sequences_scores.tolist(), output.sequences.tolist(), strict=True)
    for (score, tokens), (found_score, found_tokens) in zip(expected, found, strict=True):
        assert tuple(found_tokens[: len(tokens)]) == tokens
        assert found_score == pytest.approx(score, abs=1e-5)


class TestProgress:
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(
        tokens=st.lists(st.integers(0, 2), max_size=12),
        phrases=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=4),
    )
    def test_what_it_counts_is_there(self, tokens, phrases):
        progress = Progress()
        for number, token in enumerate(tokens):
            before, wanted = progress.tokens(phrases), progress.wanted(phrases)
            progress = progress.after(token, phrases)
            if not Progress.is_complete(progress, phrases):
                assert wanted
            # A wanted token brings it further by one, no other does.
            assert (progress.tokens(phrases) == before + 1) == (token in wanted)
            assert progress.tokens(phrases) <= number + 1
            met = [phrases[place] for place in progress.met]
            assert holds(tokens[: number + 1], met)
            assert tuple(tokens[number + 1 - len(progress.begun) : number + 1]) == progress.begun
        if progress.is_complete(phrases):
            assert progress.wanted(phrases) == set()

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_phrases_of_different_tokens_are_found_in_any_order(self, data):
        phrases = [[3, 4], [5, 6, 7], [8]]
        pieces = data.draw(st.permutations([*phrases, [3], [5, 6], [9, 4], [6]]))
        progress = Progress()
        for token in itertools.chain(*pieces):
            progress = progress.after(token, phrases)
        assert progress.is_complete(phrases)


MISTAKES = {
    "a list too few": ({"required_phrases": [[[5]]] * 4}, r"required_phrases has lists for 4 sentences.*there are 5"),
    "a list too many": ({"forbidden_phrases": [[]] * 6}, r"forbidden_phrases has lists for 6 sentences.*there are 5"),
    "no token": ({"required_phrases": [[], [[]], [], [], []]}, r"required_phrases\[1\] contains \[\]"),
    "a bare token": ({"forbidden_phrases": [[], [], [7], [], []]}, r"forbidden_phrases\[2\] contains 7, which is no"),
    "a token too high": ({"required_phrases": [[[5, 61]]] * 5}, r"required_phrases\[0\] contains token id 61; ids go"),
    "a negative token": ({"forbidden_phrases": [[[-1]]] * 5}, r"forbidden_phrases\[0\] contains token id -1"),
    "greedy search": ({"required_phrases": [[[5]]] * 5, "num_beams": 1}, r"required_phrases needs beam search"),
    "sampling": ({"required_phrases": [[[5]]] * 5, "do_sample": True}, r"required_phrases needs beam search"),
    "groups": (
        {"required_phrases": [[[5]]] * 5, "num_beams": 4, "num_beam_groups": 2}, r"required_phrases needs beam search",
    ),
    "too many new tokens": (
        {"required_phrases": [[], [[5, 6], [7, 8]], [], [], []], "max_new_tokens": 4},
        r"required_phrases\[1\] contains 4 tokens.*do not fit into 4 new tokens",
    ),
    "beyond the maximum": (
        {"required_phrases": [[[5] * 12]] * 5, "max_length": 13}, r"contains 12 tokens.*do not fit into 12 new tokens",
    ),
    "an end inside": (
        {"required_phrases": [[], [], [[5, 2]], [], []]}, r"required_phrases\[2\] contains \[5, 2\] with 2, which ends",
    ),
    "another end inside": (
        {"required_phrases": [[[5, 9]]] * 5, "eos_token_id": [2, 9]}, r"contains \[5, 9\] with 9, which ends a",
    ),
    "required and forbidden": (
        {"required_phrases": [[[5, 6, 7]]] * 5, "forbidden_phrases": [[], [], [], [[6, 7]], []]},
        r"required_phrases\[3\] contains \[5, 6, 7\], but forbidden_phrases\[3\] forbids \[6, 7\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(model, source, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**source, **arguments)


def test_phrases_that_just_fit_are_kept(model, source):
    outputs = model.generate(**source, required_phrases=[[[5, 6], [7, 8]]] * len(LENGTHS), max_new_tokens=5)
    assert all(holds(tokens, [[5, 6], [7, 8]]) for tokens in outputs[:, 1:].tolist())

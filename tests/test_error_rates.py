"""WER, CER, PER and exact match: beside a search by brute force, and beside their definitions in words."""

from functools import cache
from random import Random

import pytest
import sacrebleu

from vanilla_transformer.training.metric_names import METRICS
from vanilla_transformer.training.metrics import make_metrics, score_texts, streams
from vanilla_transformer.training.scores import score_groups


def edits(one, other) -> int:
    """The least number of substitutions, deletions and insertions, by trying all of them."""

    @cache
    def from_here(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return len(one) - i + len(other) - j
        return min(from_here(i + 1, j) + 1, from_here(i, j + 1) + 1, from_here(i + 1, j + 1) + (one[i] != other[j]))

    return from_here(0, 0)


def some_texts(count: int = 40) -> tuple[list[str], list[str]]:
    """Predictions that resemble their references, with rows that are empty and rows that are right."""
    draw = Random(0)
    references = ["".join(draw.choices("ab ü𝄞 ", k=draw.randrange(12))) for _ in range(count)]
    predictions = ["".join(letter for letter in text if draw.random() > 0.2) for text in references]
    return predictions, references


@pytest.mark.parametrize(
    ("name", "units"), [("wer", str.split), ("per", str.split), ("cer", lambda text: text.strip())]
)
def test_an_error_rate_is_all_edits_divided_by_all_units_of_the_references(name, units):
    predictions, references = some_texts()
    pairs = [
        (units(prediction), units(reference)) for prediction, reference in zip(predictions, references, strict=True)
    ]
    expected = 100 * sum(edits(*pair) for pair in pairs) / sum(len(reference) for _, reference in pairs)
    assert score_texts(predictions, references, "13a", [name]) == {name: pytest.approx(expected, rel=1e-12)}
    assert 0 < expected < 100


def test_the_metrics_of_grapheme_to_phoneme_conversion_are_those_of_its_shared_task():
    """Two of three words are wrong; two of eight phones are, and one is too many."""
    predictions, references = ["a b c", "d e e", "k l m"], ["a b c", "d e f", "k l"]
    scores = score_texts(predictions, references, "13a", ["g2p_wer", "per", "exact_match", "cer"])
    assert scores == pytest.approx({"g2p_wer": 200 / 3, "per": 200 / 8, "exact_match": 100 / 3, "cer": 300 / 13})


def test_of_several_references_the_nearest_counts_and_none_may_be_missing():
    predictions, references = ["a b c d", "x"], [["a b", "a b d", None], ["x", None, "y y y"]]
    scores = score_texts(predictions, references, "13a", ["wer", "exact_match", "bleu"])
    assert scores["wer"] == pytest.approx(100 * (1 + 0) / (2.5 + 2))
    assert scores["exact_match"] == 50
    assert "nrefs:2|" in scores["bleu_signature"]
    variable = score_texts(predictions, [["a b"], ["x", "z"]], "13a", ["bleu"])["bleu_signature"]
    assert "nrefs:var|" in variable


@pytest.mark.parametrize("name", ["wer", "cer", "per", "exact_match", "g2p_wer"])
def test_empty_texts_have_scores(name):
    right, wrong = (100, 0) if METRICS[name].higher_is_better else (0, 100)
    assert score_texts([""], [""], "13a", [name])[name] == right
    assert score_texts(["a"], [""], "13a", [name])[name] == wrong
    assert score_texts([""], ["a"], "13a", [name])[name] == wrong


def test_chrf_with_words_is_sacrebleus():
    predictions, references = ["the cat sat on the mat", "hello there"], ["the cat is on the mat", "hello"]
    expected = sacrebleu.CHRF(word_order=2)
    scores = score_texts(predictions, references, "13a", ["chrfpp", "chrf"])
    assert scores["chrfpp"] == expected.corpus_score(predictions, [references]).score != scores["chrf"]
    assert scores["chrfpp_signature"] == str(expected.get_signature())


def test_every_metric_that_can_be_named_is_there():
    assert list(make_metrics(list(METRICS))) == list(METRICS)


def test_several_references_are_the_streams_of_sacrebleu():
    predictions, references = (
        ["the cat sat on it", "hello there"],
        [["a cat sat on it", "the cat sat"], ["hello", "hi"]],
    )
    expected = sacrebleu.corpus_bleu(predictions, [["a cat sat on it", "hello"], ["the cat sat", "hi"]]).score
    assert score_texts(predictions, references, "13a", ["bleu"])["bleu"] == expected
    assert streams(["a", "b"]) == [["a", "b"]]


def test_a_group_is_scored_as_if_it_were_alone():
    predictions, references = some_texts(9)
    groups = ["news", "chat", "news", "chat", "chat", "talk", "news", "chat", "news"]
    found = score_groups(predictions, references, groups, "13a", ["ter", "cer"])
    assert {name: part["rows"] for name, part in found.items()} == {"news": 4, "chat": 4, "talk": 1}
    assert list(found) == ["news", "chat", "talk"]
    chat = score_texts([predictions[row] for row in (1, 3, 4, 7)], [references[row] for row in (1, 3, 4, 7)], "13a")
    assert found["chat"]["scores"]["ter"] == chat["ter"]
    assert list(found["chat"]["scores"]) == ["ter", "cer"]

"""What the transforms of training text do, how often, and what decides it."""

import random
import unicodedata
from collections import Counter

import pytest
from datasets import Dataset

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training.data.corpora import tokenize_corpora
from vanilla_transformer.training.data.filters import FilterReport, filter_rows
from vanilla_transformer.training.data.transformed_rows import TransformedRows
from vanilla_transformer.training.data.transforms import OF_BOTH, OF_SOURCE, transform_pair
from vanilla_transformer.training.settings.arguments import DataArguments
from vanilla_transformer.training.settings.corpora import NOISE, Corpus, Transform


SENTENCES = [
    "Größe zählt, dětí běží, déjà vu!", "Two dogs run across the green field.", "один человек идёт домой…",
    "彼は走っています。", "कुत्ता दौड़ रहा है।", "a", "", "...", "A-B 12 x", "naïve café, façade; œuvre?", "ΟΔΥΣΣΕΥΣ εδώ.",
]  # fmt: skip


def changed(name: str, text: str, seed: int = 0) -> str:
    return (OF_SOURCE | OF_BOTH)[name](text, random.Random(seed))


# A transform, a text, and what it becomes.
EXAMPLES = [
    ("lowercase", "HELLO World", "hello world"),
    ("uppercase", "Größe ist wichtig", "GRÖSSE IST WICHTIG"),
    ("titlecase", "two dogs aren't McDonald's", "Two Dogs Aren't McDonald's"),
    ("strip_diacritics", "Größe zählt, dětí běží, déjà vu!", "Große zahlt, deti bezi, deja vu!"),
    ("strip_diacritics", "plain", "plain"),
    ("drop_final_punctuation", "He runs.", "He runs"),
    ("drop_final_punctuation", "Really ?!", "Really"),
    ("drop_final_punctuation", "彼は走っています。", "彼は走っています"),
    ("drop_final_punctuation", "कुत्ता दौड़ रहा है।", "कुत्ता दौड़ रहा है"),
    ("drop_final_punctuation", "no end", "no end"),
    ("drop_final_punctuation", "...", "..."),
    ("merge_words", "ab cd", "abcd"),
    ("merge_words", "one", "one"),
    ("merge_words", "yes - no", "yes - no"),
    ("split_words", "abc", "a bc"),
    ("split_words", "12 ab", "12 ab"),
    ("typos", "a bc 123 don't", "a bc 123 don't"),
]


@pytest.mark.parametrize(("name", "before", "after"), EXAMPLES)
def test_a_transform_does_what_its_name_says(name, before, after):
    if name == "split_words" and before == "abc":
        assert {changed(name, before, seed) for seed in range(20)} <= {"a bc", "ab c"}
    else:
        assert changed(name, before) == after


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize("text", SENTENCES)
def test_any_text_can_be_transformed_and_keeps_what_the_transform_does_not_concern(name, text):
    for seed in range(20):
        after = changed(name, text, seed)
        assert changed(name, text, seed) == after
        if name in ("merge_words", "split_words"):
            assert after.replace(" ", "") == text.replace(" ", "")
            assert abs(after.count(" ") - text.count(" ")) <= 1
        elif name == "typos":
            assert [len(word) < 4 for word in text.split(" ")] == [len(w) < 4 for w in text.split(" ")]
            different = [(a, b) for a, b in zip(text.split(" "), after.split(" "), strict=True) if a != b]
            assert len(different) <= 1 + len(text.split(" ")) // 10
            for a, b in different:
                # One letter missing, doubled, or two swapped.
                assert abs(len(a) - len(b)) == 1 or (len(a) == len(b) and Counter(a) == Counter(b))
                assert set(b) <= set(a)
                assert a[0] == b[0]
        elif name == "drop_final_punctuation":
            assert text.startswith(after)
            assert all(unicodedata.category(c)[0] in "PZ" for c in text[len(after) :])
        else:
            assert after.casefold() == text.casefold() or name == "strip_diacritics"


def test_every_kind_of_typo_comes_about_as_often():
    kinds = Counter()
    for seed in range(3000):
        after = changed("typos", "abcdefgh", seed)
        kinds[len(after) - 8] += 1
    assert set(kinds) == {-1, 0, 1}
    assert all(abs(count - 1000) < 150 for count in kinds.values())


def test_some_concern_the_source_alone_and_some_both_sides():
    pair, draw = ("Große Hunde laufen.", "Big dogs run."), random.Random(0)
    for name in NOISE:
        source, target = transform_pair([Transform(name, 1.0)], *pair, {}, draw)
        assert source != pair[0] or name == "strip_diacritics" or name == "typos"
        assert (target != pair[1]) == (name in ("uppercase", "titlecase", "drop_final_punctuation"))


def test_tag_and_prefix_stand_before_the_source_and_the_tag_comes_first():
    transforms = [Transform("uppercase", 1.0), Transform("prefix", 1.0, "domain"), Transform("tag", 1.0, "<bt>")]
    row = {"domain": "news"}
    assert transform_pair(transforms, "two dogs", "zwei Hunde", row, random.Random(0)) == (
        "<bt> news TWO DOGS",
        "ZWEI HUNDE",
    )
    assert transform_pair(transforms, "two", "zwei", {"domain": ""}, random.Random(0)) == ("<bt> TWO", "ZWEI")


@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
def test_a_rate_is_the_share_of_rows_that_are_changed(rate):
    transforms = [Transform("uppercase", rate), Transform("tag", rate, "<t>")]
    rows = [transform_pair(transforms, "text", "text", {}, random.Random(seed)) for seed in range(4000)]
    for found in (sum(target == "TEXT" for _, target in rows), sum(source.startswith("<t> ") for source, _ in rows)):
        assert abs(found / 4000 - rate) < 0.03
    both = sum(source == "<t> TEXT" for source, _ in rows) / 4000
    assert abs(both - rate**2) < 0.03, "they are drawn apart"


TEXTS = [f"the number {number} is written here" for number in range(60)]


@pytest.fixture(scope="module")
def rows():
    """Rows of two corpora, of which the first has transforms; and what makes them."""
    corpora = [
        Corpus(
            "noisy", DataArguments(max_source_length=40), None, (Transform("typos", 0.5), Transform("tag", 0.5, "<t>"))
        ),
        Corpus("plain", DataArguments()),
    ]
    tokenizer = train_tokenizer(TEXTS, 300)
    texts = [Dataset.from_dict({"source": TEXTS[start::2], "target": TEXTS[start::2]}) for start in range(2)]
    reports = [FilterReport(corpus.name) for corpus in corpora]
    for text, report in zip(texts, reports, strict=True):
        filter_rows(text, {}, zip(text["source"], text["target"], strict=True), report)
    table, places = tokenize_corpora(corpora, texts, reports, tokenizer)
    assert places.tolist() == list(range(60))
    return lambda seed=1: TransformedRows(table, tokenizer, corpora, seed), tokenizer


def read(rows: TransformedRows, tokenizer, epoch: int, numbers=range(60)) -> list[tuple[str, str]]:
    rows.set_epoch(epoch)
    return [tuple(tokenizer.decode(row[side], skip_special_tokens=True) for side in ("input_ids", "labels"))
            for row in rows.__getitems__(list(numbers))]  # fmt: skip


def test_seed_epoch_and_row_decide_and_nothing_else_does(rows):
    make, tokenizer = rows
    first = read(make(), tokenizer, 0)
    random.seed(1)
    assert read(make(), tokenizer, 0, [7, 3, 7]) == [first[7], first[3], first[7]]
    assert read(make(), tokenizer, 1) != first
    assert read(make(seed=2), tokenizer, 0) != first
    # Another copy of the same row draws anew.
    assert read(make(), tokenizer, 0, [n + 60 for n in range(60)]) != first
    texts = [*zip(TEXTS[::2], TEXTS[::2], strict=True), *zip(TEXTS[1::2], TEXTS[1::2], strict=True)]
    # The second corpus stays as it is; of the first, targets too.
    assert first[30:] == texts[30:]
    assert [target for _, target in first] == [target for _, target in texts]
    different = sum(source != text for (source, _), (text, _) in zip(first[:30], texts[:30], strict=True))
    assert 0.5 * 30 < different < 30


def test_a_row_that_would_become_too_long_keeps_what_batches_were_planned_by(rows):
    make, _ = rows
    limited = make()
    planned = [len(ids) for ids in limited.rows["input_ids"]]
    limited.corpora[0] = limited.corpora[0]._replace(data=DataArguments(max_source_length=1))
    assert [len(row["input_ids"]) for row in limited.__getitems__(list(range(60)))] == planned
    assert limited.lengths[0].tolist() == planned

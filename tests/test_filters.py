"""What is left out of training, and what is said about it."""

import random
import sys

import pytest
from babel import Locale
from datasets import Dataset, IterableDataset

from vanilla_transformer.training.data.filters import (
    Duplicates,
    FilterReport,
    _identifier,
    filter_rows,
    find_fault,
    is_badly_encoded,
    length_limits,
    ratio_limit,
    text_tests,
)
from vanilla_transformer.training.data.pairs import load_pairs
from vanilla_transformer.training.errors import DataError
from vanilla_transformer.training.settings.arguments import DataArguments
from vanilla_transformer.training.settings.rules import check_data


# Right text that holds pairs of characters like those of UTF-8 in Windows-1252.
RIGHT = [
    "",
    "plain\twith a tab, two\nlines\r\n",
    "Ältere Männer „reden“ über Größe – für 12,50\u00a0€.",
    "la LIBERTÉ\u00a0! a-t-il crié, « c’est l’été\u00a0»",
    "“A IRMû, «AMANHû, É… sim, MAÇÔ",
    "to je váš“ kůň, kéž…”",
    "JÄTTEBRA… Å… 5 mÅ, HYVÄ” mitä…",
    "Nestlé® Pokémon™ café™®",
    "der Spaß… 3×½ 2×£5",
    "ESPAÑA: ¿qué? ¡ÑANDÚ!",
    "VIELGIS-RUOŠŠÂ…",
    "день, 日本語。, שלום, مرحبا 😀",
]
WORDS = {
    "German": "Männer",
    "capital": "Äpfel",
    "French": "très",
    "Portuguese": "irmã…",
    "Spanish": "¿Qué?",
    "Czech": "kůň",
    "Turkish": "çalışıyor",
    "Russian": "день",
    "Greek": "μέρα",
    "Arabic": "مرحبا",
    "Japanese": "日本語",
    "quotes": "“so”",
    "apostrophe": "it’s",
    "emoji": "😀",
    "copyright": "© 1999",
}


def double_encoded(text: str, codec: str) -> str:
    """UTF-8 read as another encoding; the bytes that Windows-1252 lacks become control characters, as on the web."""
    lacking = b"\x81\x8d\x8f\x90\x9d"
    return "".join(bytes([byte]).decode("latin-1" if byte in lacking else codec) for byte in text.encode())


@pytest.mark.parametrize("text", RIGHT)
def test_right_text_is_not_taken_for_a_wrong_encoding(text):
    assert not is_badly_encoded(text)


@pytest.mark.parametrize("codec", ["cp1252", "latin-1"])
@pytest.mark.parametrize("kind", WORDS)
def test_utf8_that_was_read_as_another_encoding_is_found_on_either_side(kind, codec):
    assert not is_badly_encoded(f"A {WORDS[kind]} b.")
    wrong = double_encoded(f"A {WORDS[kind]} b.", codec)
    assert is_badly_encoded(wrong, "right")
    assert is_badly_encoded("right", wrong)


UNREADABLE = "schön".encode("latin-1").decode("utf-8", "replace")


@pytest.mark.parametrize("text", [UNREADABLE, "a\0b", "a\x1b[1m", "a\x7f", "\x85"])
def test_unreadable_bytes_and_control_characters_are_found(text):
    assert is_badly_encoded(text)


@pytest.mark.parametrize("language", ["de", "fr", "cs", "pl", "ru", "el", "uk", "ar", "ja", "zh", "ko", "hi"])
def test_the_names_of_all_countries_are_right_and_nearly_all_found_when_they_are_not(language):
    names = list(Locale(language).territories.values())
    assert not any(map(is_badly_encoded, names))
    sentences = [", ".join(names[start : start + 8]) for start in range(0, len(names), 8)]
    foreign = [sentence for sentence in sentences if not sentence.isascii()]
    found = sum(is_badly_encoded(double_encoded(sentence, "cp1252")) for sentence in foreign)
    assert found >= 0.8 * len(foreign) > 0


def test_duplicates_are_those_that_a_set_of_the_pairs_finds():
    draw = random.Random(0)
    pairs = [("".join(draw.choices("ab1 ", k=draw.randrange(4))), draw.choice(["a", "ba", ""])) for _ in range(500)]
    is_duplicate, seen = Duplicates(), set()
    for pair in pairs:
        assert is_duplicate(*pair) == (pair in seen)
        seen.add(pair)
    assert 20 < len(seen) < 480


PAIRS = [
    ("a house", "ein Haus"),
    (" ", "leer"),
    ("a dog", "ein Hund"),
    ("a house", "ein Haus"),
    ("schÃ¶n", "schön"),
    ("same", " same"),
    ("", ""),
    ("a house", "das Haus"),
    ("a dog", "ein Hund"),
]
EVERY = {"drop_duplicates": True, "drop_identical": True, "drop_bad_encoding": True}
# arguments -> the numbers of the rows that they leave out
LEFT_OUT = [
    ({}, [2, 7]),
    ({"drop_duplicates": True}, [2, 4, 7, 9]),
    ({"drop_identical": True}, [2, 6, 7]),
    ({"drop_bad_encoding": True}, [2, 5, 7]),
    (EVERY, [2, 4, 5, 6, 7, 9]),
]


@pytest.mark.parametrize(("arguments", "left_out"), LEFT_OUT)
def test_each_filter_leaves_out_its_rows_in_a_data_set_and_in_a_stream(arguments, left_out):
    data, kept = DataArguments(**arguments), [pair for row, pair in enumerate(PAIRS, 1) if row not in left_out]
    rows = Dataset.from_list([{"source": source, "target": target} for source, target in PAIRS])
    found = filter_rows(rows, text_tests(data), PAIRS, FilterReport())
    assert list(zip(found["source"], found["target"], strict=True)) == kept

    tests = text_tests(data)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    stream = stream.filter(lambda row: find_fault(tests, row["source"], row["target"]) is None)
    assert [(row["source"], row["target"]) for row in stream] == kept


def test_the_report_counts_rows_by_their_first_fault_and_keeps_the_numbers_of_the_file():
    data = DataArguments(max_source_length=4, max_target_length=5, max_length_ratio=1.5, **EVERY)
    rows = Dataset.from_list([{"row": row} for row in range(1, len(PAIRS) + 1)])
    report = FilterReport()
    rows = filter_rows(rows, text_tests(data), PAIRS, report)
    assert list(rows["row"]) == [1, 3, 8]
    rows = filter_rows(rows, length_limits(data) | ratio_limit(data), [(4, 5), (5, 6), (3, 5)], report)
    assert list(rows["row"]) == [1]
    assert str(report).splitlines() == [
        "kept 1 of 9 rows",
        "  left out  first row  because of",
        "         2          2  an empty side",
        "         2          4  a pair that came before",
        "         1          5  a wrong encoding",
        "         1          6  identical sides",
        "         1          3  more than max_source_length=4 tokens",
        "         1          8  a length ratio over max_length_ratio=1.5",
    ]


@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0])
def test_the_ratio_is_that_of_the_tokens_without_eos(ratio):
    (is_uneven,) = ratio_limit(DataArguments(max_length_ratio=ratio)).values()
    for source in range(1, 12):
        for target in range(1, 12):
            assert is_uneven(source + 1, target + 1) == (max(source / target, target / source) > ratio)


def test_without_a_ratio_all_pairs_are_even():
    assert ratio_limit(DataArguments()) == {}


class TestLanguages:
    ENGLISH = "Two young men are outside near many bushes, and they talk about the weather."
    GERMAN = "Zwei junge Männer sind draußen bei den Büschen und reden über das Wetter."
    NAMED = {"source_lang": "en_GB", "target_lang": "de", "identify_languages": True}

    def test_a_text_in_another_language_fails_and_a_short_one_does_not(self):
        tests = text_tests(DataArguments(**self.NAMED))
        source, target = "a source in another language than en_GB", "a target in another language than de"
        for pair, fault in (
            ((self.ENGLISH, self.GERMAN), None),
            ((self.GERMAN, self.ENGLISH), source),
            ((self.GERMAN, self.GERMAN), source),
            ((self.ENGLISH, self.ENGLISH), target),
            (("ja", "no"), None),
            (("12", "34"), None),
        ):
            assert find_fault(tests, *pair) == fault

    def test_training_leaves_them_out_and_evaluation_counts_them(self, tmp_path, caplog):
        (tmp_path / "en").write_text(f"{self.ENGLISH}\n{self.ENGLISH}\n", encoding="utf-8")
        (tmp_path / "de").write_text(f"{self.GERMAN}\n{self.ENGLISH}\n", encoding="utf-8")
        files = [str(tmp_path / "en"), str(tmp_path / "de")]
        pairs = load_pairs(DataArguments(train_file=files, test_file=files, **self.NAMED))
        assert {split: len(rows) for split, rows in pairs.items()} == {"train": 1, "test": 2}
        reason = "a target in another language than de"
        assert f"test: 1 of 2 rows with {reason}, kept (first: row 2)" in caplog.text
        assert f"1          2  {reason}" in caplog.text

    def test_what_cannot_be_identified_is_named(self, monkeypatch):
        with pytest.raises(DataError, match=r"target_lang=tlh is unknown to py3langid: it knows .*, de, .*"):
            text_tests(DataArguments(target_lang="tlh", identify_languages=True))
        with pytest.raises(DataError, match="identify_languages=True needs to know which they are"):
            check_data(DataArguments(train_file=["a", "b"], identify_languages=True))
        monkeypatch.setitem(sys.modules, "py3langid.langid", None)
        _identifier.cache_clear()
        with pytest.raises(DataError, match="identify_languages: install py3langid"):
            text_tests(DataArguments(**self.NAMED))

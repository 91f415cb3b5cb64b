"""The phrasebook against Babel's own formatters, the calendar and plain string reading; no download, no GPU."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import datetime
from decimal import Decimal
from functools import lru_cache

import pytest
from babel import Locale
from babel.dates import format_date, format_datetime, format_skeleton, format_time
from babel.lists import format_list
from babel.numbers import format_currency, format_decimal

from vanilla_transformer.training.data.phrasebook import load_phrasebook, main


SPLITS = ("train", "validation", "test")
KINDS = {"date", "time", "datetime", "span", "money", "measure", "number", "countries", "languages"}
# Latin, Cyrillic, Arabic (right to left), and scripts without spaces; ja and zh have few forms, so theirs collide.
PAIRS = ("en-de", "de-en", "en-ja", "ja-en", "de-ru", "en-ar", "he-en", "pt_BR-ja", "en-sr_Latn", "zh-fr")


@lru_cache
def book(pair="en-de", seed=0, train_size=1_500, held_out=200):
    """Phrases (source, target, kind) of each split."""
    splits = load_phrasebook(pair, seed=seed, train_size=train_size, validation_size=held_out, test_size=held_out)
    return {
        name: list(zip(*(split[c] for c in ("source", "target", "kind")), strict=True))
        for name, split in splits.items()
    }


def all_phrases(*args, **kwargs):
    return [phrase for split in book(*args, **kwargs).values() for phrase in split]


def matches(pattern, phrases):
    """(match of the source, target) of the phrases whose source has the form `pattern`."""
    return [(match, target) for source, target, _ in phrases if (match := re.fullmatch(pattern, source))]


def names_in(english_list):
    return re.split(r", (?:and |or )?| and | or ", english_list)


def fingerprint():
    return hashlib.sha256(repr(book(train_size=300)).encode()).hexdigest()


def test_splits_have_the_asked_sizes_and_string_columns():
    splits = load_phrasebook("en-ja", train_size=70, validation_size=20, test_size=10)
    assert {name: len(split) for name, split in splits.items()} == {"train": 70, "validation": 20, "test": 10}
    for split in splits.values():
        assert {name: feature.dtype for name, feature in split.features.items()} == dict.fromkeys(
            ("source", "target", "kind"), "string"
        )


def test_same_arguments_give_the_same_book_in_a_process_with_other_hash_clock_and_locale():
    script = "import test_phrasebook; print(test_phrasebook.fingerprint())"
    surroundings = {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C", "LANG": "C"}
    other = subprocess.run(
        [sys.executable, "-c", script],
        cwd=os.path.dirname(__file__),
        env=os.environ | surroundings,
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == fingerprint()


def test_another_seed_draws_other_phrases():
    assert set(book(seed=0)["train"]) != set(book(seed=1)["train"])


@pytest.mark.parametrize("pair", PAIRS)
def test_no_source_and_no_target_occurs_twice_in_the_three_splits(pair):
    phrases = all_phrases(pair)
    for side in (0, 1):
        assert [text for text, count in Counter(phrase[side] for phrase in phrases).items() if count > 1] == []


def test_no_quantity_is_held_out_under_another_spelling():
    # 2.5 % and 2.50 % would be two strings and one thing to translate.
    quantities = Counter(
        (Decimal(number.replace(",", "")), unit)
        for source, _, kind in all_phrases()
        if kind in ("number", "measure")
        for number, unit in [re.fullmatch(r"([\d,.]*\d)(.*)", source).groups()]
    )
    assert len(quantities) > 300
    assert max(quantities.values()) == 1


# Luxembourgish abbreviates weeks as watts, Tatar (little translated) months as metres.
@pytest.mark.parametrize("pair", [*PAIRS, "lb-en", "tt-en"])
def test_a_source_has_the_same_target_whatever_was_drawn_with_it(pair):
    first, second = ({source: target for source, target, _ in all_phrases(pair, seed=seed)} for seed in (0, 1))
    shared = first.keys() & second.keys()
    assert len(shared) > 50
    assert {source: (first[source], second[source]) for source in shared if first[source] != second[source]} == {}


@pytest.mark.parametrize("pair", PAIRS)
def test_every_text_is_worded_and_typed_with_plain_spaces(pair):
    for source, target, _ in all_phrases(pair):
        for text in (source, target):
            assert text == text.strip() != ""
            # None, unfilled patterns, Babel's unit identifiers ("12 length-meter"), no-break spaces
            assert not re.search(r"None|[{}]|\w+-(meter|liter|gram|watt)\b|\u00a0|\u202f", text), text


@pytest.mark.parametrize("pair", PAIRS)
def test_every_kind_is_a_fair_share(pair):
    counts = Counter(kind for _, _, kind in all_phrases(pair))
    assert counts.keys() == KINDS
    assert min(counts.values()) > 0.08 * sum(counts.values())


def test_kinds_come_in_random_order():
    kinds = [kind for _, _, kind in book()["train"]]
    assert kinds[:90] != kinds[:9] * 10


def test_one_of_a_measure_is_singular():
    # Shown as "1", 1.0 would take the plural.
    found = matches(r"1 [a-z]{4,}", all_phrases(train_size=6_000))
    assert found
    assert {match[0] for match, _ in found if match[0].endswith("s")} == set()


def full_year(two_digits):
    """1950 to 2049."""
    return int(two_digits) + (1900 if int(two_digits) >= 50 else 2000)


def read(text, form):
    return datetime.strptime(text, form)


def german_list(english):
    german, style = Locale("de"), "or" if " or " in english else "standard"
    codes = {
        name: (field, code)
        for field in ("territories", "languages")
        for code, name in getattr(Locale("en"), field).items()
    }
    return format_list([getattr(german, codes[name][0])[codes[name][1]] for name in names_in(english)], style, german)


# English source pattern -> its German wording, by Babel's named formats or in plain letters.
READINGS = {
    "full date": (r"\w+day, .*\d{4}", lambda m: format_date(read(m[0], "%A, %B %d, %Y"), "full", "de")),
    "long date": (r"(?!May)[A-Z]\w{3,} \d+, \d{4}", lambda m: format_date(read(m[0], "%B %d, %Y"), "long", "de")),
    "medium date": (r"(?!May)[A-Z]\w\w \d+, \d{4}", lambda m: format_date(read(m[0], "%b %d, %Y"), "medium", "de")),
    "a date in May is long": (r"May (\d+), (\d{4})", lambda m: f"{m[1]}. Mai {m[2]}"),
    "short date": (r"(\d+)/(\d+)/(\d\d)", lambda m: f"{int(m[2]):02}.{int(m[1]):02}.{m[3]}"),
    "month and year": (r"[A-Z]\w{4,} \d{4}", lambda m: format_skeleton("yMMMM", read(m[0], "%B %Y"), locale="de")),
    "seconds": (r"\d+:\d\d:\d\d [AP]M", lambda m: format_time(read(m[0], "%I:%M:%S %p"), "medium", locale="de")),
    "minutes": (r"\d+:\d\d [AP]M", lambda m: format_time(read(m[0], "%I:%M %p"), "short", locale="de")),
    "moment": (
        r"[A-Z]\w\w \d+, \d{4}, .*",
        lambda m: format_datetime(read(m[0], "%b %d, %Y, %I:%M:%S %p"), "medium", locale="de"),
    ),
    "past days": (r"(\d+) days? ago", lambda m: f"vor {m[1]} Tag{'' if m[1] == '1' else 'en'}"),
    "coming hours": (r"in (\d+) hours?", lambda m: f"in {m[1]} Stunde{'' if m[1] == '1' else 'n'}"),
    "plain weeks": (r"(\d+) weeks?", lambda m: f"{m[1]} Woche{'' if m[1] == '1' else 'n'}"),
    "dollars": (r"([\d,.]+) US dollars", lambda m: f"{swap_marks(m[1])} US-Dollar"),
    "euro sign": (r"€([\d,.]+)", lambda m: plain(format_currency(Decimal(m[1].replace(",", "")), "EUR", locale="de"))),
    "kilometers": (r"([\d,.]+) kilometers?", lambda m: f"{swap_marks(m[1])} Kilometer"),
    "celsius": (r"([\d,.]+)°C", lambda m: f"{swap_marks(m[1])} °C"),
    "percent": (r"([\d,.]+)%", lambda m: f"{swap_marks(m[1])} %"),
    "decimal": (r"[\d,.]+", lambda m: format_decimal(Decimal(m[0].replace(",", "")), locale="de")),
    "countries or languages": (r"[A-Z][^\d]*(,| and | or )[^\d]*", lambda m: german_list(m[0])),
}


def swap_marks(number):
    return number.translate(str.maketrans(",.", ".,"))


def plain(text):
    return text.replace("\u00a0", " ")


@pytest.mark.parametrize("reading", READINGS)
def test_german_says_what_babel_says_of_the_english(reading):
    pattern, wording = READINGS[reading]
    found = matches(pattern, all_phrases(train_size=6_000))
    assert len(found) >= 5
    for match, target in found:
        assert target == wording(match), match[0]


def test_two_digit_years_tell_the_century():
    found = matches(r"(\d+)/(\d+)/(\d\d)", all_phrases("en-fr"))
    assert {full_year(match[3]) // 100 for match, _ in found} == {19, 20}
    for match, target in found:
        assert target == f"{int(match[2]):02}/{int(match[1]):02}/{full_year(match[3])}"


def test_a_field_that_the_source_leaves_out_is_not_asked_for():
    # The full date of Brunei Malay has no weekday; the English one has.
    dates = [target for _, target, kind in all_phrases("ms_BN-en") if kind == "date"]
    assert any(re.fullmatch(r"[A-Z]\w+ \d+, \d{4}", target) for target in dates)
    assert [target for target in dates if re.match(r"\w+day,", target)] == []


def test_every_word_that_is_held_out_occurs_in_training():
    phrases = book(train_size=30_000, held_out=500)
    for split in ("validation", "test"):
        for side in (0, 1):
            known, asked = (
                {word for phrase in phrases[name] for word in re.findall(r"[^\W\d_]+|[^\w\s]", phrase[side])}
                for name in ("train", split)
            )
            assert asked - known == set()


def test_every_country_and_language_has_many_occurrences_in_training():
    train = book(train_size=30_000, held_out=500)["train"]
    names = Counter(
        name for source, _, kind in train if kind in ("countries", "languages") for name in names_in(source)
    )
    assert 100 < len(names) <= 200
    assert min(names.values()) >= 30


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"pair": "en-xx"}, r"pair 'en-xx'.*'xx' is not a locale.*SOURCE-TARGET"),
        ({"pair": "english-de"}, r"pair 'english-de'.*'english' is not a locale"),
        ({"pair": "en"}, r"pair 'en'.*SOURCE-TARGET"),
        ({"pair": ""}, r"pair ''.*SOURCE-TARGET"),
        ({"pair": "en-GB-de"}, r"pair 'en-GB-de'.*SOURCE-TARGET"),
        ({"pair": "-de"}, r"pair '-de'.*'' is not a locale"),
        ({"pair": "de-de"}, r"pair 'de-de'.*both sides.*different"),
        ({"train_size": 0}, r"train_size=0.*at least 1"),
        ({"validation_size": -3}, r"validation_size=-3.*at least 1"),
        ({"test_size": 0}, r"test_size=0.*at least 1"),
        ({"train_size": 10**12}, r"train_size=1000000000000.*at most \d+ distinct phrases"),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_what_would_be_right(arguments, named):
    with pytest.raises(ValueError, match=named):
        load_phrasebook(**arguments)


def test_the_command_prints_examples_of_every_kind(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["phrasebook", "en-ja", "--per-kind", "2"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert Counter(line.split()[0] for line in lines) == dict.fromkeys(KINDS, 2)
    assert all("  ->  " in line for line in lines)


def test_the_command_refuses_a_bad_pair_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["phrasebook", "en-xx"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "'xx' is not a locale of Babel" in capsys.readouterr().err

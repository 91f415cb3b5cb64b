"""A phrasebook in any two languages: a data set that the package generates, without a download.

Source: the Unicode CLDR (https://cldr.unicode.org, Unicode License v3) as shipped with Babel (https://babel.pocoo.org).
One abstract item, such as the day 2023-03-07 in its long form, is written in both locales: "March 7, 2023" / "7. März
2023". There are nine kinds in equal shares: date, time, datetime, span, money, measure, number, countries, languages.

The target is always determined by the source. Years lie within one century, so that two digits identify them. Both
locales show the same fields and decimals. A source text that two forms share ("May 7, 2023" is long and medium in
English) belongs to the fuller form. No source and no target occurs twice, over all splits.

Print some phrases:  python -m vanilla_transformer.training.data.phrasebook en-de
"""

import argparse
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from itertools import islice, product
from typing import TYPE_CHECKING, Any, NamedTuple

from babel import Locale, UnknownLocaleError
from babel.dates import TIMEDELTA_UNITS, format_datetime, format_timedelta, get_datetime_format
from babel.lists import format_list
from babel.numbers import format_currency, format_decimal, format_percent, get_currency_precision
from babel.units import format_unit


if TYPE_CHECKING:
    from datasets import DatasetDict

# The maximum size. Beyond it kinds with few items are used up, and lists would fill the rest.
MOST_PHRASES = 200_000
# A kind counts as used up after this many draws without a new phrase.
PATIENCE = 1_000

# Within a hundred years two digits identify the year; these surround the present.
FIRST_MOMENT = datetime(1950, 1, 1)
SECONDS = int((datetime(2050, 1, 1) - FIRST_MOMENT).total_seconds())

# In every tuple of forms the fuller forms come first.
CALENDAR_FORMS = {
    "date": ("full", "long", "medium", "short", "yMMMM", "yMMM", "MMMMd", "MMMd"),
    "time": ("medium", "short"),
    "datetime": ("medium", "short"),
}
SPAN_FORMS = tuple((direction, length) for length in ("long", "short") for direction in (0, 1, -1))
SPAN_SECONDS = dict(TIMEDELTA_UNITS)
MONEY_FORMS = ("name", "standard")
MEASURE_FORMS = ("long", "short")

CURRENCIES = "AUD CAD CHF CNY EUR GBP INR JPY SEK USD"
UNITS = (
    *("length-meter", "length-kilometer", "length-centimeter", "length-mile", "speed-kilometer-per-hour"),
    *("mass-gram", "mass-kilogram", "volume-liter", "volume-milliliter", "area-square-meter"),
    *("temperature-celsius", "energy-kilowatt-hour", "power-watt", "digital-gigabyte"),
)
# Without names that contain an "and": in a list one would read as two.
TERRITORIES = """
    AF AL AM AO AR AT AU AZ BD BE BG BO BR BY CA CH CL CM CN CO CR CU CY CZ DE DK DO DZ EC EE EG ES ET FI FR GB GE
    GH GR GT HR HU ID IE IL IN IQ IR IS IT JM JO JP KE KH KR KZ LA LB LK LT LU LV LY MA MD ME MG ML MM MN MT MX MY MZ
    NA NE NG NL NO NP NZ PA PE PH PK PL PT PY RO RS RU SA SE SG SI SK SN SY TH TN TR TZ UA UG US UY UZ VE VN YE ZA
"""
LANGUAGES = """
    af am ar az be bg bn bs ca cs cy da de el en eo es et eu fa fi fr ga gl gu ha he hi hr hu hy id is it ja ka kk
    km kn ko ky la lo lt lv mk ml mn mr ms mt my ne nl no pa pl ps pt ro ru sk sl so sq sr sv sw ta te th tr uk ur uz
    vi yo zh zu
"""


class Phrase(NamedTuple):
    """One phrase, with its kind."""

    kind: str
    source: str
    target: str


@dataclass(frozen=True)
class Kind:
    """A kind of phrases: how items are drawn, and how a locale writes them.

    Attributes:
        forms: the ways to write an item, the fullest first. A source text that two forms share belongs to the fuller.
        draw: draws the next item.
        word: (locale, form, item) -> text, or None if the locale cannot write it.
    """

    forms: tuple[Hashable, ...]
    draw: Callable[[random.Random], Any]
    word: Callable[[Locale, Any, Any], str | None]

    def translate(self, form: Hashable, item: Any, source: Locale, target: Locale) -> tuple[str, str] | None:
        """Writes `item` in both locales; None if one cannot, or if a fuller form has the same source text."""
        texts = self.typed(source, form, item), self.typed(target, form, item)
        fuller = self.forms[: self.forms.index(form)]
        if not all(texts) or any(self.typed(source, other, item) == texts[0] for other in fuller):
            return None
        return texts

    def typed(self, locale: Locale, form: Hashable, item: Any) -> str:
        """The text with plain spaces; "" if the locale cannot write the item."""
        # People do not type CLDR's no-break spaces, and NFKC normalisation in a tokenizer would replace them.
        text = self.word(locale, form, item) or ""
        return text.replace("\u00a0", " ").replace("\u202f", " ")


@lru_cache
def _pattern(locale: Locale, name: str, form: Any) -> str | None:
    """The CLDR pattern of a calendar form, e.g. "MMM d, y"; None if the locale has none."""
    dates, times = locale.date_formats, locale.time_formats
    if name == "datetime":
        joint = str(get_datetime_format(form, locale=locale))
        return joint.replace("{0}", times[form].pattern).replace("{1}", dates[form].pattern)
    formats = times if name == "time" else dates
    found = formats.get(form) or locale.datetime_skeletons.get(form)
    return found.pattern if found else None


def _fields(pattern: str | None) -> set[str]:
    """The fields of a pattern, as letters of UTS #35: year y, month M, day d, weekday E, hour H, minute m, second s."""
    letters = set(re.findall("[a-zA-Z]", re.sub("'[^']*'", "", pattern or "")))
    # A 12-hour clock equals a 24-hour clock if the pattern also shows a.m. or p.m.
    if "h" in letters and letters & set("abB"):
        letters = letters - {"h"} | {"H"}
    return {{"L": "M", "c": "E", "e": "E", "k": "H"}.get(letter, letter) for letter in letters - set("abBG")}


def _calendar_kind(name: str, source: Locale, target: Locale) -> Kind:
    def shared(form: str) -> bool:
        fields = _fields(_pattern(source, name, form))
        return bool(fields) and fields == _fields(_pattern(target, name, form))

    def word(locale: Locale, form: str, moment: datetime) -> str:
        return format_datetime(moment, _pattern(locale, name, form) or "", locale=locale)

    return Kind(tuple(form for form in CALENDAR_FORMS[name] if shared(form)), _draw_moment, word)


def _draw_moment(rng: random.Random) -> datetime:
    return FIRST_MOMENT + timedelta(seconds=rng.randrange(SECONDS))


def _draw_digits(rng: random.Random, most: int = 3) -> int:
    """A positive number of up to `most` digits. All lengths are equally likely: plural rules need small numbers."""
    return rng.randrange(1, 10 ** rng.randint(1, most))


def _word_span(locale: Locale, form: tuple[int, Any], span: tuple[Any, int]) -> str | None:
    (direction, length), (unit, count) = form, span
    seconds = (direction or 1) * count * SPAN_SECONDS[unit]
    # An infinite threshold keeps the drawn unit, so nothing is rounded.
    try:
        return format_timedelta(seconds, unit, math.inf, add_direction=direction != 0, format=length, locale=locale)
    except KeyError:  # Babel's data lacks some relative patterns, e.g. the short "in {0} months" in German
        return None


def _word_money(locale: Locale, form: Any, money: tuple[str, int]) -> str:
    currency, minor_units = money
    amount = Decimal(minor_units).scaleb(-get_currency_precision(currency))
    return format_currency(amount, currency, locale=locale, format_type=form)


def _word_measure(locale: Locale, form: Any, measure: tuple[str, Decimal]) -> str | None:
    unit, amount = measure
    text = format_unit(amount, unit, form, locale=locale)
    # Babel writes the unit's identifier if the locale has no pattern.
    return None if unit in text else text


def _money_sign(locale: Locale, form: Any, currency: str) -> str:
    """An amount without its number: "$" or " US dollars"."""
    return re.sub("[0-9.,]", "", _word_money(locale, form, (currency, 500)))


def _draw_measured(rng: random.Random) -> Decimal:
    # Never 1.0: it is written "1", but with the plural of "1.0".
    tenths = rng.choice((0, rng.randint(1, 9)))
    return Decimal(_draw_digits(rng, 4)) + (Decimal(tenths) / 10 if tenths else 0)


def _unclear_units(locale: Locale) -> set[str]:
    """Units written like another unit: in locales with few translations, CLDR writes "1 m" for a metre and a month."""
    owners = defaultdict(set)
    spans, measures = Kind(SPAN_FORMS, _draw_digits, _word_span), Kind(MEASURE_FORMS, _draw_digits, _word_measure)
    for kind, units in ((spans, SPAN_SECONDS), (measures, UNITS)):
        # These counts use all plural forms but the rarest.
        for form, unit, count in product(kind.forms, units, range(1, 13)):
            owners[kind.typed(locale, form, (unit, count))].add(unit)
    return set().union(*(units for text, units in owners.items() if text and len(units) > 1))


def _quantity_kind(
    forms: tuple[Hashable, ...], units: Sequence[str], draw_amount: Callable[[random.Random], Any], word: Callable
) -> Kind:
    """A kind whose items are (unit, amount)."""
    return Kind(forms if units else (), lambda rng: (rng.choice(units), draw_amount(rng)), word)


def _word_number(locale: Locale, form: str, number: Decimal) -> str:
    if form == "percent":
        return format_percent(number / 100, locale=locale, decimal_quantization=False)
    return format_decimal(number, locale=locale)


def _uniquely_named(items: Iterable[Any], names: Iterable[Callable[[Any], str | None]]) -> list[Any]:
    """The items for which each function of `names` gives a name that no other item has."""
    kept = list(items)
    for name in names:
        counts = Counter(map(name, kept))
        kept = [item for item in kept if name(item) and counts[name(item)] == 1]
    return kept


def _name(locale: Locale, item: tuple[str, str]) -> str | None:
    """The name of ("territories" or "languages", code) in a locale; None where CLDR only repeats the code."""
    field, code = item
    name = getattr(locale, field).get(code)
    return None if name == code else name


def _list_kind(names: list[tuple[str, str]]) -> Kind:
    def draw(rng: random.Random) -> list[tuple[str, str]]:
        return rng.sample(names, rng.randint(2, min(4, len(names))))

    def word(locale: Locale, form: Any, items: list[tuple[str, str]]) -> str:
        return format_list([_name(locale, item) or "" for item in items], form, locale)

    return Kind(("standard", "or") if len(names) > 1 else (), draw, word)


def _kinds(source: Locale, target: Locale) -> dict[str, Kind]:
    """The kinds that both locales can write, by name."""
    both = (source, target)
    # Names must be unique over both: in Thai, the country Thailand and the Thai language have the same name.
    codes = {"territories": TERRITORIES, "languages": LANGUAGES}
    named = [(field, code) for field, listed in codes.items() for code in listed.split()]
    names = _uniquely_named(named, [partial(_name, locale) for locale in both])
    currencies = _uniquely_named(
        CURRENCIES.split(), [partial(_money_sign, locale, form) for locale in both for form in MONEY_FORMS]
    )
    unclear = _unclear_units(source)
    spans, units = ([unit for unit in pool if unit not in unclear] for pool in (SPAN_SECONDS, UNITS))
    kinds = {name: _calendar_kind(name, source, target) for name in CALENDAR_FORMS}
    kinds |= {
        "span": _quantity_kind(SPAN_FORMS, spans, _draw_digits, _word_span),
        "money": _quantity_kind(MONEY_FORMS, currencies, partial(_draw_digits, most=7), _word_money),
        "measure": _quantity_kind(MEASURE_FORMS, units, _draw_measured, _word_measure),
        "number": Kind(("decimal", "percent"), lambda rng: Decimal(_draw_digits(rng, 7)).scaleb(-2), _word_number),
        "countries": _list_kind([item for item in names if item[0] == "territories"]),
        "languages": _list_kind([item for item in names if item[0] == "languages"]),
    }
    return {name: kind for name, kind in kinds.items() if kind.forms}


def _write(source: Locale, target: Locale, rng: random.Random, most: int) -> list[Phrase]:
    """Up to `most` phrases in random order, with equal shares of all kinds until a kind is used up."""
    phrases: list[Phrase] = []
    sources: set[str] = set()
    targets: set[str] = set()
    kinds = _kinds(source, target)
    while kinds and len(phrases) < most:
        for name, kind in list(kinds.items()):
            pair = _next_pair(kind, source, target, rng, sources, targets)
            if pair is None:
                del kinds[name]
                continue
            sources.add(pair[0])
            targets.add(pair[1])
            phrases.append(Phrase(name, *pair))
    del phrases[most:]
    rng.shuffle(phrases)
    return phrases


def _next_pair(
    kind: Kind, source: Locale, target: Locale, rng: random.Random, sources: set[str], targets: set[str]
) -> tuple[str, str] | None:
    """A pair whose source and target are both new; None if the kind seems used up."""
    for _ in range(PATIENCE):
        pair = kind.translate(rng.choice(kind.forms), kind.draw(rng), source, target)
        if pair and pair[0] not in sources and pair[1] not in targets:
            return pair
    return None


def parse_pair(pair: str) -> tuple[Locale, Locale]:
    """The two locales of "SOURCE-TARGET", e.g. "en-de" or "pt_BR-ja". Raises ValueError for anything else."""
    advice = "write two different CLDR locales as SOURCE-TARGET, e.g. 'en-de' or 'pt_BR-ja'"
    codes = pair.split("-")
    if len(codes) != 2:
        raise ValueError(f"phrasebook pair {pair!r} must be two locales with one hyphen between them; {advice}")
    locales = []
    for code in codes:
        try:
            locales.append(Locale.parse(code))
        except (ValueError, UnknownLocaleError) as error:
            raise ValueError(f"phrasebook pair {pair!r}: {code!r} is not a locale of Babel; {advice}") from error
    if locales[0] == locales[1]:
        raise ValueError(f"phrasebook pair {pair!r}: both sides are the locale '{locales[0]}'; {advice}")
    return locales[0], locales[1]


def _check_sizes(sizes: dict[str, int]) -> int:
    for field, size in sizes.items():
        if size < 1:
            raise ValueError(f"{field}_size={size}: a split needs at least 1 phrase")
    total = sum(sizes.values())
    if total > MOST_PHRASES:
        raise ValueError(
            f"{_sum_of(sizes)}: the phrasebook holds at most {MOST_PHRASES} distinct phrases; ask for fewer"
        )
    return total


def _sum_of(sizes: dict[str, int]) -> str:
    return " + ".join(f"{field}_size={size}" for field, size in sizes.items()) + f" = {sum(sizes.values())}"


def load_phrasebook(
    pair: str = "en-de",
    *,
    seed: int = 0,
    train_size: int = 50_000,
    validation_size: int = 500,
    test_size: int = 500,
) -> "DatasetDict":
    """Generates the phrasebook of a locale pair.

    With the default sizes each kind has some 5,500 training phrases, and every name occurs about a hundred times. This
    takes four seconds.

    Args:
        pair: SOURCE-TARGET, each a CLDR locale as Babel writes it ("en", "pt_BR", "sr_Latn").
        seed: of the draws. The same pair, seed, sizes and version of Babel give the same data on any machine.
        train_size, validation_size, test_size: number of phrases in each split.

    Returns:
        Splits `train`, `validation` and `test` with the string columns `source`, `target` and `kind`. No source and no
        target occurs twice in the three together. Phrases of the held-out splits are new combinations of known words.

    Raises:
        ValueError: the pair is not two different locales of Babel, a size is below 1, or there are fewer distinct
            phrases than the sizes ask for.
    """
    from datasets import Dataset, DatasetDict

    source, target = parse_pair(pair)
    sizes = {"train": train_size, "validation": validation_size, "test": test_size}
    total = _check_sizes(sizes)
    # A string gives the same seed in every process. It is the same for all pairs, so they have the same items.
    phrases = _write(source, target, random.Random(f"phrasebook {seed}"), total)
    if len(phrases) < total:
        raise ValueError(f"{_sum_of(sizes)}: {pair!r} holds only {len(phrases)} distinct phrases; ask for fewer")
    rest = iter(phrases)
    splits = {split: list(islice(rest, size)) for split, size in sizes.items()}
    columns = ("source", "target", "kind")
    return DatasetDict(
        {
            split: Dataset.from_dict({column: [getattr(phrase, column) for phrase in book] for column in columns})
            for split, book in splits.items()
        }
    )


def main() -> None:
    """Prints a few phrases of each kind."""
    parser = argparse.ArgumentParser(description="Print a few phrases of each kind in two languages.")
    parser.add_argument("pair", nargs="?", default="en-de", help="SOURCE-TARGET, two CLDR locales (default: en-de)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other phrases (default: 0)")
    parser.add_argument("--per-kind", type=int, default=3, help="phrases to print of each kind (default: 3)")
    args = parser.parse_args()
    if args.per_kind < 1:
        parser.error(f"--per-kind {args.per_kind} must be at least 1")
    try:
        source, target = parse_pair(args.pair)
    except ValueError as error:
        parser.error(str(error))
    phrases = _write(
        source, target, random.Random(f"phrasebook {args.seed}"), args.per_kind * len(_kinds(source, target))
    )
    for kind, source_text, target_text in sorted(phrases):
        print(f"{kind:<10} {source_text}  ->  {target_text}")


if __name__ == "__main__":
    from ..program import run_program

    run_program(lambda _: main(), [])

"""Changes of training text that make a model robust: letter case, typos, missing diacritics, tags and others.

They are the modifiers of OpusTrainer (Nikolov and others, 2023, arXiv 2311.14838) that need no word alignment. Each
function is pure: it takes a text and a generator of random numbers, and returns the changed text. A text that it cannot
change is returned as it was. Seed, epoch and row decide what is drawn, so a resumed run draws the same.
"""

import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..settings.corpora import Corpus, Transform


# One typo for so many words of a text, but at least one.
WORDS_PER_TYPO = 10
# Words of fewer letters get no typo, and are not split.
SHORT = 4
# Keys of what is drawn here have this bit, so that they differ from those of BPE-dropout.
KEY = 1 << 160
# The epoch whose draws only serve to plan batches.
PLANNED = (1 << 32) - 1


def strip_diacritics(text: str, draw: random.Random) -> str:
    """Removes the marks above and below letters: "Größe, déjà" becomes "Große, deja"."""
    letters = unicodedata.normalize("NFD", text)
    return unicodedata.normalize("NFC", "".join(letter for letter in letters if not unicodedata.combining(letter)))


def titlecase(text: str, draw: random.Random) -> str:
    """Makes the first letter of each word a capital."""
    return re.sub(r"\S+", lambda word: word[0][:1].title() + word[0][1:], text)


def typos(text: str, draw: random.Random) -> str:
    """Makes a typo in one word of ten, at least in one: a letter is missing, doubled, or swapped with its neighbour."""
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if len(word) >= SHORT and word.isalpha()]
    for place in draw.sample(places, min(len(places), 1 + len(words) // WORDS_PER_TYPO)):
        words[place] = _misspelt(words[place], draw)
    return " ".join(words)


def _misspelt(word: str, draw: random.Random) -> str:
    kind = draw.choice(("missing", "doubled", "swapped"))
    # The first letter is seldom wrong, and two equal neighbours would swap in vain.
    places = [place for place in range(1, len(word) - 1) if kind != "swapped" or word[place] != word[place + 1]]
    if not places:
        return word
    at = draw.choice(places)
    before, letter, following, after = word[:at], word[at], word[at + 1], word[at + 2 :]
    middle = {"missing": following, "doubled": 2 * letter + following, "swapped": following + letter}[kind]
    return before + middle + after


def merge_words(text: str, draw: random.Random) -> str:
    """Removes one space."""
    spaces = [match.start() for match in re.finditer(r"(?<=\w) (?=\w)", text)]
    if not spaces:
        return text
    place = draw.choice(spaces)
    return text[:place] + text[place + 1 :]


def split_words(text: str, draw: random.Random) -> str:
    """Puts one space into a word."""
    # A letter with letters on both sides, not counting marks, which belong to the letter before.
    places = [match.start() for match in re.finditer(r"(?<=[^\W\d_])[^\W\d_](?=[^\W\d_])", text)]
    if not places:
        return text
    place = draw.choice(places)
    return f"{text[:place]} {text[place:]}"


def drop_final_punctuation(text: str, draw: random.Random) -> str:
    """Removes the punctuation at the end, whatever the script."""
    end = len(text.rstrip())
    while end and unicodedata.category(text[end - 1]).startswith("P"):
        end -= 1
    # A text of nothing but punctuation stays.
    return text[:end].rstrip() if text[:end].strip() else text


# Transforms of the source alone: the user's text has the fault, the translation should not.
OF_SOURCE: dict[str, Callable[[str, random.Random], str]] = {
    "lowercase": lambda text, draw: text.lower(),
    "strip_diacritics": strip_diacritics,
    "typos": typos,
    "merge_words": merge_words,
    "split_words": split_words,
}
# Transforms of both sides: the translation should be like the user's text.
OF_BOTH: dict[str, Callable[[str, random.Random], str]] = {
    "uppercase": lambda text, draw: text.upper(),
    "titlecase": titlecase,
    "drop_final_punctuation": drop_final_punctuation,
}


def transform_pair(
    transforms: Sequence[Transform], source: str, target: str, columns: Mapping[str, Any], draw: random.Random
) -> tuple[str, str]:
    """
    Applies each transform to a pair, at its rate.

    Args:
        transforms: those of a corpus, in order.
        source: the text.
        target: its translation.
        columns: the row's other columns, for `prefix`.
        draw: the row's generator.

    Returns:
        The changed source and target.
    """
    for name, rate, text in transforms:
        if draw.random() >= rate:
            continue
        if name in OF_SOURCE:
            source = OF_SOURCE[name](source, draw)
        elif name in OF_BOTH:
            source, target = OF_BOTH[name](source, draw), OF_BOTH[name](target, draw)
        else:
            before = text if name == "tag" else columns[text or ""]
            source = f"{before} {source}" if before else source
    return source, target


def transform_batch(
    corpus: Corpus, columns: Mapping[str, Sequence[Any]], numbers: Sequence[int], seed: int, epoch: int
) -> tuple[list[str], list[str]]:
    """
    Applies the transforms of a corpus to rows.

    Args:
        corpus: has the transforms.
        columns: `source`, `target` and the other columns of the rows.
        numbers: the numbers of the rows: with seed and epoch, they decide what is drawn.
        seed: the run's.
        epoch: the current one.

    Returns:
        The changed sources and the changed targets.
    """
    first_key = KEY | (seed << 32 | epoch) << 64
    changed = []
    for place, number in enumerate(numbers):
        others = {name: columns[name][place] for name in corpus.columns}
        pair = columns["source"][place], columns["target"][place]
        changed.append(transform_pair(corpus.transforms, *pair, others, random.Random(first_key | number)))
    return [source for source, _ in changed], [target for _, target in changed]


def examples(corpus: Corpus, rows: Sequence[Mapping[str, Any]], seed: int, count: int) -> dict[Transform, list[str]]:
    """
    What each transform of a corpus does to real rows, for `--check`.

    Args:
        corpus: has the transforms.
        rows: rows of text, with the columns that they need.
        seed: the run's.
        count: the maximum number of examples of each transform.

    Returns:
        For each transform, lines "before -> after" of rows that it changes.
    """
    found: dict[Transform, list[str]] = {transform: [] for transform in corpus.transforms}
    for transform, lines in found.items():
        for number, row in enumerate(rows):
            before = row["source"], row["target"]
            after = transform_pair(
                [transform._replace(rate=1.0)], *before, row, random.Random(KEY | seed << 96 | number)
            )
            changed = [f"{old} -> {new}" for old, new in zip(before, after, strict=True) if old != new]
            lines += [" | ".join(changed)] if changed else []
            if len(lines) == count:
                break
    return found

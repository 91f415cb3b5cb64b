"""Many languages in one model: rows that name their direction, and the tokenizer that knows the languages.

Rows of text then have two more columns, LANGUAGES. The token of the target language is put before the source by the
tokenizer (vanilla_transformer/tokenization_languages.py).
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from vanilla_transformer.tokenization_languages import (
    LANGUAGE_CODE,
    MultilingualTokenizer,
    language_token,
    multilingual,
)

from ..errors import DataError, RecipeError
from ..settings.arguments import DataArguments


# The columns of a row's languages, beside its source and target.
LANGUAGES = ("source_lang", "target_lang")
# A language with the share p of all texts has a share of the vocabulary's texts proportional to p^(1 / TEMPERATURE)
# (Arivazhagan et al., 2019, https://arxiv.org/abs/1907.05019, section 4.2).
TEMPERATURE = 5
TAG = re.compile(r"<[^<>\s]+>")

# How many rows each pair of source and target language has.
Directions = Counter[tuple[str, str]]


def has_languages(rows: Dataset | IterableDataset) -> bool:
    """Whether rows name their directions."""
    return LANGUAGES[1] in (rows.column_names or next(iter(rows), {}))


def count_directions(rows: Dataset | IterableDataset) -> Directions:
    """How many rows each direction has."""
    found: Directions = Counter()
    for batch in rows.select_columns(list(LANGUAGES)).iter(batch_size=1000):
        found.update(zip(*(batch[name] for name in LANGUAGES), strict=True))
    return found


def with_languages(rows: Dataset, data: DataArguments) -> Dataset:
    """Rows with both LANGUAGES. Those that are not columns of the file are the ones that `data` names for all rows."""
    for name, language in zip(LANGUAGES, data.direction, strict=True):
        if name not in rows.column_names:
            rows = rows.add_column(name, [language] * len(rows))
    return rows


def language_fault(value: Any) -> str | None:
    """Why a value is not a language, as a phrase to follow its name; None if it is one."""
    if isinstance(value, str) and LANGUAGE_CODE.fullmatch(value):
        return None
    return f"is {value!r}, and must be a code such as de, pt-BR or zh_Hans"


def balanced_texts(rows: Dataset | IterableDataset, directions: Directions) -> Iterator[str]:
    """
    The texts that a joint vocabulary is learned from: as many as the rows have, but more of each rare language and
    fewer of each frequent one. Texts are repeated or left out at regular intervals, so that the choice depends on the
    rows alone.

    Args:
        rows: the text, with its LANGUAGES.
        directions: what `count_directions` gives for these rows.
    """
    texts: Counter[str] = Counter()
    for direction, count in directions.items():
        for language in direction:
            texts[language] += count
    wanted = {language: count ** (1 / TEMPERATURE) for language, count in texts.items()}
    scale = texts.total() / sum(wanted.values())
    # Rounded, so that languages of equal size have each text once.
    rates = {language: round(scale * wanted[language] / count, 9) for language, count in texts.items()}
    seen: Counter[str] = Counter()
    for batch in rows.iter(batch_size=1000):
        for side, language_of in zip(("source", "target"), LANGUAGES, strict=True):
            for text, language in zip(batch[side], batch[language_of], strict=True):
                number, rate = seen[language], rates[language]
                for _ in range(int((number + 1) * rate) - int(number * rate)):
                    yield text
                seen[language] += 1


def add_languages(tokenizer: PreTrainedTokenizerBase, directions: Directions) -> None:
    """
    Gives a tokenizer the languages that it does not know yet. Their tokens come after all others.

    If there is one direction only, it becomes the tokenizer's default.

    Raises:
        RecipeError: the tokenizer is of another kind.
    """
    if not isinstance(tokenizer, MultilingualTokenizer):
        raise RecipeError(
            "several languages need a tokenizer of this package, which has a token for each of them: leave tokenizer "
            f"out to learn one (this one is a {type(tokenizer).__name__})"
        )
    sources, targets = (sorted(set(languages)) for languages in zip(*directions, strict=True))
    tokenizer.add_languages(targets, sources)
    if len(directions) == 1:
        tokenizer.src_lang, tokenizer.tgt_lang = sources[0], targets[0]


def add_tags(tokenizer: PreTrainedTokenizerBase, tags: Sequence[str]) -> None:
    """
    Gives a tokenizer tags: tokens that text may write, such as `<formal>` before a source. White space after a tag
    belongs to it.

    Raises:
        RecipeError: a tag is not written as `<formal>`, or is the token of something else.
    """
    taken = {*tokenizer.special_tokens_map.values(), *map(language_token, getattr(tokenizer, "languages", []))}
    for tag in tags:
        if not TAG.fullmatch(tag) or tag in taken:
            raise RecipeError(f"tags: {tag!r} cannot be a tag: give a word in angle brackets, such as <formal>")
    tokenizer.add_tokens([AddedToken(tag, rstrip=True, normalized=False, special=True) for tag in tags])


def set_direction(tokenizer: PreTrainedTokenizerBase, data: DataArguments) -> None:
    """
    For rows that do not name their direction: makes the one that `data` names the default of a tokenizer with
    languages.

    Raises:
        DataError: no target language is given.
    """
    if not multilingual(tokenizer):
        return
    source, target = data.direction
    if target is not None:
        tokenizer.add_languages([target], [source] if source else [])
        tokenizer.src_lang, tokenizer.tgt_lang = source, target
    if tokenizer.tgt_lang is None:
        raise DataError(f"target_lang is not given, but the model translates into {', '.join(tokenizer.languages)}")


def name_directions(pairs: DatasetDict, data: DataArguments) -> None:
    """
    If the training rows have LANGUAGES, gives them to the rows of the other splits that do not name them.

    Args:
        pairs: the text of all splits; changed in place.
        data: names their direction.

    Raises:
        DataError: it does not.
    """
    if not has_languages(pairs["train"]):
        return
    for split, rows in pairs.items():
        if not has_languages(rows):
            if not all(data.direction):
                raise DataError(
                    f"{split}: the training data has several directions, but the {split} rows do not name theirs: set "
                    "source_lang_column and target_lang_column, or source_lang and target_lang"
                )
            pairs[split] = with_languages(rows, data)


def refuse_unknown_languages(pairs: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Checks that the tokenizer knows the target language of every row in memory.

    Raises:
        DataError: a row asks for another language.
    """
    for split, rows in pairs.items():
        if isinstance(rows, Dataset) and has_languages(rows):
            refuse_unknown(tokenizer, rows[LANGUAGES[1]], f"{split}, row {{}}: ".format)


def refuse_unknown(
    tokenizer: PreTrainedTokenizerBase, languages: Iterable[str], place: Callable[[int], str] = "".format
) -> None:
    """
    Args:
        languages: the target language of each row.
        place: the beginning of an error about the row of a number, from 1.

    Raises:
        DataError: a row asks for a language that the tokenizer does not know.
    """
    known = set(getattr(tokenizer, "languages", []))
    for number, language in enumerate(languages, start=1):
        if language not in known:
            raise DataError(f"{place(number)}{unknown_language(language, tokenizer)}")


def unknown_language(language: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The words of an error about a target language that a tokenizer does not know."""
    if not multilingual(tokenizer):
        return f"target_lang={language} is given, but the model translates in one direction only"
    return f"target_lang={language} is unknown: the model translates into {', '.join(tokenizer.languages)}"


def checked_languages(
    tokenizer: PreTrainedTokenizerBase, tgt_lang: str | Sequence[str] | None, place: Callable[[int], str]
) -> dict[str, Any]:
    """
    The argument `tgt_lang` of a tokenizer, if it is given.

    Args:
        tgt_lang: a language for all texts, or one for each.
        place: what an error calls the text of a number, from 1.

    Raises:
        DataError: a language is unknown, or none is given and the tokenizer has no default.
    """
    known = getattr(tokenizer, "languages", [])
    if tgt_lang is None:
        if known and tokenizer.tgt_lang is None:
            raise DataError(f"target_lang is not given: choose one of {', '.join(known)}")
        return {}
    if isinstance(tgt_lang, str):
        refuse_unknown(tokenizer, [tgt_lang])
    else:
        refuse_unknown(tokenizer, tgt_lang, lambda number: f"{place(number)}: ")
    return {"tgt_lang": tgt_lang}


def target_languages(rows: Dataset) -> dict[str, list[str]]:
    """The argument `tgt_lang` of a tokenizer for these rows, if they name their directions."""
    return {"tgt_lang": list(rows[LANGUAGES[1]])} if has_languages(rows) else {}


def trained_on(rows: Dataset | IterableDataset) -> Collection[tuple[str, str]] | None:
    """The directions of training rows; None if the rows do not name them, or are a stream and not all known."""
    return count_directions(rows) if isinstance(rows, Dataset) and has_languages(rows) else None


def direction_names(rows: Dataset, trained: Collection[tuple[str, str]] | None = None) -> list[str]:
    """
    The name of each row's direction; none if the rows do not name them.

    Args:
        trained: the directions that the model was trained on, as far as they are known. Others are called zero-shot.
    """
    if not has_languages(rows):
        return []
    directions = list(zip(*(rows[name] for name in LANGUAGES), strict=True))
    seen = set(directions) if trained is None else set(trained)
    return [f"{source}-{target}{'' if (source, target) in seen else ' (zero-shot)'}" for source, target in directions]

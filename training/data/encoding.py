"""Text of a corpus as ids."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from vanilla_transformer.tokenization_languages import multilingual

from ..settings.arguments import DataArguments


# The columns of a side's ids -> the columns of its words' lengths in tokens.
WORDS = {"input_ids": "source_words", "labels": "target_words"}


def word_lengths(encoded: BatchEncoding) -> list[list[int]]:
    """For each text, the number of tokens of each word; tokens that the tokenizer adds around the text are a word."""
    rows = range(len(encoded["input_ids"]))
    return [[len(list(tokens)) for _, tokens in groupby(encoded.word_ids(row))] for row in rows]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str],
    targets: list[str],
    data: DataArguments,
    with_words: bool = False,
    languages: Sequence[str] | None = None,
) -> dict[str, Any]:
    """
    Turns pairs of one corpus into ids.

    Args:
        tokenizer: must append eos to every text.
        sources: the sources.
        targets: their translations.
        data: the fields of the corpus.
        with_words: whether BPE-dropout needs the lengths of the words.
        languages: each row's target language, if the rows name it. Otherwise a tokenizer with languages takes that of
            `data`, or its default.

    Returns:
        `input_ids` and `labels`, and perhaps the columns of WORDS.
    """
    if not sources:
        return {name: [] for name in (*WORDS, *(WORDS.values() if with_words else ()))}
    direction = {"tgt_lang": languages or data.direction[1]} if multilingual(tokenizer) else {}
    sides = {
        "input_ids": tokenizer(sources, return_attention_mask=False, **direction),
        "labels": tokenizer(text_target=targets, return_attention_mask=False),
    }
    columns = {name: side["input_ids"] for name, side in sides.items()}
    return columns | ({WORDS[name]: word_lengths(side) for name, side in sides.items()} if with_words else {})

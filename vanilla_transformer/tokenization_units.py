"""Tokenizers whose tokens are units of the text: characters, or words that white space separates.

They are for spelling, sounds and other text that has a small inventory: the source of a task from spelling to sound is
the characters of a word, the target is phones with spaces between them. Each side may have other units.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase

from .tokenization_vanilla_transformer import SPECIAL_TOKENS, VanillaTransformerTokenizer


# Begins the token of a word, and stands for the space before it. In text it is read as an underscore.
MARK = "▁"
# Each kind of unit -> what splits a text into tokens.
UNITS: dict[str, pre_tokenizers.PreTokenizer] = {
    "characters": pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"),
    "words": pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(MARK, prepend_scheme="always", split=False)]
    ),
}
# What WhitespaceSplit splits at: Unicode's white space, to which Python adds four control characters.
WHITE_SPACE = re.compile(r"[^\S\x1c-\x1f]+")


class VanillaTransformerUnitTokenizer(VanillaTransformerTokenizer):
    """
    A tokenizer of characters or words, which may be different on the two sides: `tokenizer(text)` splits a source,
    `tokenizer(text_target=text)` a target. The tokens of words and of characters are different tokens, so that `decode`
    puts spaces between words but not between characters.

    The units are the arguments `source_units` and `target_units`. A class with an `__init__` of its own would have
    transformers build another tokenizer from the file instead of loading it.
    """

    @property
    def source_units(self) -> str:
        """ "characters" or "words"."""
        return self.init_kwargs["source_units"]

    @property
    def target_units(self) -> str:
        """The same for the target."""
        return self.init_kwargs["target_units"]

    # transformers calls these two around `text_target`.
    def _switch_to_input_mode(self) -> None:
        super()._switch_to_input_mode()
        self._tokenizer.pre_tokenizer = UNITS[self.source_units]

    def _switch_to_target_mode(self) -> None:
        super()._switch_to_target_mode()
        self._tokenizer.pre_tokenizer = UNITS[self.target_units]


def kind_of_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to call the tokens of any tokenizer: "subwords", "characters", "words" or "characters and words"."""
    if isinstance(tokenizer, VanillaTransformerUnitTokenizer):
        return " and ".join(sorted({tokenizer.source_units, tokenizer.target_units}))
    return "subwords"


def train_unit_tokenizer(
    pairs: Iterable[tuple[str, str]],
    vocab_size: int,
    source_units: str = "characters",
    target_units: str = "characters",
) -> VanillaTransformerUnitTokenizer:
    """
    Counts the units of a parallel text.

    Encoding appends `</s>`; the model itself puts `<s>` before the target. Decoding gives back characters exactly, and
    words with one space between them. A unit that is not in the vocabulary becomes `<unk>`.

    Args:
        pairs: sources and targets.
        vocab_size: number of tokens at most, the 4 special tokens included; the rarest units are left out.
        source_units: "characters" (code points of Unicode) or "words" (what white space separates).
        target_units: the same for the target.

    Returns:
        A tokenizer with pad 0, bos 1, eos 2, unk 3, then the units, the most frequent first.

    Raises:
        ValueError: the units are unknown, `vocab_size` has no room for a unit, or there is no text.
    """
    for units in (source_units, target_units):
        if units not in UNITS:
            raise ValueError(f"units={units!r} are unknown: choose {' or '.join(UNITS)}")
    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size={vocab_size} must be at least {len(SPECIAL_TOKENS) + 1}, for 4 special tokens")
    counts: Counter[str] = Counter()
    splits = [_splitter(units) for units in (source_units, target_units)]
    for pair in pairs:
        for split, text in zip(splits, pair, strict=True):
            counts.update(split(text.replace(MARK, "_")))
    if not counts:
        raise ValueError("no text to learn a vocabulary from: the training data is empty")
    kept = sorted(counts, key=lambda unit: (-counts[unit], unit))[: vocab_size - len(SPECIAL_TOKENS)]
    tokens = [*SPECIAL_TOKENS.values(), *kept]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.Replace(MARK, "_")
    tokenizer.pre_tokenizer = UNITS[source_units]
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(MARK, 1, 0), decoders.Replace(MARK, " ")])
    eos = SPECIAL_TOKENS["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, vocabulary[eos])]
    )
    return VanillaTransformerUnitTokenizer(
        tokenizer_object=tokenizer,
        source_units=source_units,
        target_units=target_units,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **SPECIAL_TOKENS,
    )


def _splitter(units: str) -> Callable[[str], Iterable[str]]:
    """What splits a text as UNITS does, without its offsets, which take time."""
    if units == "words":
        return lambda text: (f"{MARK}{word}" for word in WHITE_SPACE.split(text) if word)
    return lambda text: text

"""Learns a joint subword vocabulary and saves it as a tokenizer that `AutoTokenizer` loads.

Subwords consist of bytes: byte-pair encoding (Sennrich et al., 2016) or a unigram model (Kudo, 2018) over the 256 byte
values. So every text can be encoded, without unknown tokens. The `tokenizers` library does the work.
"""

import json
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .tokenization_languages import MultilingualTokenizer, language_token


# In the order of their ids, 0 to 3, which are the defaults of VanillaTransformerConfig.
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENIZER_MODELS = ("bpe", "unigram")
MOST_IDS = 2**31
# What decoding puts between a token added by the user and the text beside it, by the class of the normaliser: nothing
# if the text's own spaces are kept, and a space if the text was split at white space.
SEPARATORS = {normalizers.Prepend: "", type(None): " "}


class VanillaTransformerTokenizer(MultilingualTokenizer):
    """
    A tokenizer that never finds SPECIAL_TOKENS and the tokens of its `languages` in text, but does find tokens added by
    the user: a tag, added by `add_tokens(["<formal>"], special_tokens=True)` or `add_special_tokens`, is one token
    wherever it occurs.

    The `tokenizers` library splits all special tokens or none (`split_special_tokens`). So this class adds a user's
    special tokens to it as ordinary ones. If a saved folder is loaded without this package, they are ordinary too: then
    `skip_special_tokens` does not remove them.
    """

    def _add_tokens(self, new_tokens: list[str] | list[AddedToken], special_tokens: bool = False) -> int:
        own = {str(token) for name in SPECIAL_TOKENS if (token := self._special_tokens_map[name]) is not None}
        own |= set(map(language_token, self.languages))
        added = []
        for token in new_tokens:
            if isinstance(token, str):
                # Search for the token in the original text: in normalised text it would need a space before it.
                token = AddedToken(token, normalized=False, special=special_tokens)
            special = special_tokens or token.special
            if special and token.content not in self.all_special_tokens:
                self._extra_special_tokens.append(token.content)
            options = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            added.append(AddedToken(token.content, **options, special=special and token.content in own))
        return self._tokenizer.add_tokens(added)

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        token_ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        # Some decoders of `tokenizers` panic if there is nothing to decode.
        if skipped.issuperset(token_ids):
            return ""
        added = {number for number, token in self.added_tokens_decoder.items() if not token.special}
        if not added:
            return super()._decode(token_ids, skip_special_tokens, **kwargs)
        separator = SEPARATORS.get(type(self._tokenizer.normalizer))
        if separator is None:
            return super()._decode([token for token in token_ids if token not in skipped], **kwargs)
        # Text between added tokens was encoded separately.
        parts: list[str] = []
        for is_added, tokens in groupby(token_ids, added.__contains__):
            if is_added:
                parts += [str(self.convert_ids_to_tokens(token)) for token in tokens if token not in skipped]
            else:
                parts.append(super()._decode(list(tokens), skip_special_tokens, **kwargs))
        return separator.join(filter(None, parts))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, model: str = "bpe", pretokenized: bool = False
) -> VanillaTransformerTokenizer:
    """
    Learns subwords from both sides of the training text.

    Encoding appends `</s>`; the model itself puts `<s>` before the target. Text is never normalised. Each digit is a
    token, so that numbers are copied digit by digit. A special token that occurs in a text is encoded as text. Tokens
    that are added later, such as language tags, are one token wherever they occur.

    Args:
        texts: sentences of the source and the target.
        vocab_size: number of subwords to learn, the 256 bytes and the 4 special tokens included. A small text may give
            fewer.
        model: "bpe" or "unigram".
        pretokenized: whether the words of `texts` are separated by white space, which no subword may cross. Decoding
            then puts one space between words. Otherwise decoding restores the text exactly.

    Returns:
        A tokenizer with pad 0, bos 1, eos 2, unk 3.

    Raises:
        ValueError: `model` is unknown, `vocab_size` has no room for the bytes or is too large, or there is no text.
    """
    # The unigram trainer ignores the limit if it has nothing to learn beyond the bytes.
    smallest = len(SPECIAL_TOKENS) + len(BYTES) + (model == "unigram")
    if model not in TOKENIZER_MODELS:
        raise ValueError(f"tokenizer model={model!r} is unknown: choose one of {', '.join(TOKENIZER_MODELS)}")
    if vocab_size >= MOST_IDS:
        raise ValueError(f"vocab_size={vocab_size} must be below {MOST_IDS}: token ids have 32 bits")
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} must be at least {smallest}, for 256 bytes and 4 special tokens")

    tokenizer = Tokenizer(models.BPE() if model == "bpe" else models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = _word_boundaries(pretokenized)
    if not pretokenized:
        # Every word begins with its space, so it has the same subwords at the start of a sentence as inside.
        tokenizer.normalizer = normalizers.Prepend(" ")
    trainer_class = trainers.BpeTrainer if model == "bpe" else trainers.UnigramTrainer
    options: dict[str, Any] = {"unk_token": SPECIAL_TOKENS["unk_token"]} if model == "unigram" else {}
    trainer = trainer_class(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=BYTES,
        show_progress=False,
        **options,
    )
    tokenizer.train_from_iterator(_counted(texts), trainer)
    if model == "unigram":
        tokenizer.model = _settled(tokenizer)
    eos = SPECIAL_TOKENS["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, tokenizer.token_to_id(eos))]
    )
    return VanillaTransformerTokenizer(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **SPECIAL_TOKENS,
    )


def _word_boundaries(pretokenized: bool) -> tuple[pre_tokenizers.PreTokenizer, decoders.Decoder]:
    """The splits that no subword may cross, and the decoder that turns subwords back into text."""
    if pretokenized:
        splits = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    else:
        splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    first_space = decoders.Strip(" ", 1, 0)
    return pre_tokenizers.Sequence(splits), decoders.Sequence([decoders.ByteLevel(), first_space])


def _settled(tokenizer: Tokenizer) -> models.Unigram:
    """
    Makes the unigram model reproducible: ids and scores depend on the text alone.

    The trainer orders rare bytes randomly, by a hash map, and gives them scores 0.0001 apart, upwards from the lowest.
    Here they all get the lowest score. Other scores differ in the last bits, because threads sum in any order. Here
    they are rounded. Special tokens get such low scores that text is encoded by its bytes instead.
    """
    scores = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    special = list(SPECIAL_TOKENS.values())
    for token in special:
        del scores[token]
    lowest = min(scores.values())
    hardly_met = lowest + 0.0001 * (len(BYTES) + 1)
    for piece, score in scores.items():
        scores[piece] = round(lowest if len(piece) == 1 and score < hardly_met else score, 6)
    learned = sorted(scores.items(), key=lambda scored: (-scored[1], scored[0]))
    return models.Unigram([(token, round(100 * lowest)) for token in special] + learned, unk_id=len(special) - 1)


def _counted(texts: Iterable[str]) -> Iterable[str]:
    empty = True
    for text in texts:
        empty = empty and not text.strip()
        yield text
    if empty:
        raise ValueError("no text to learn a vocabulary from: the training data is empty")

"""Learns a joint subword vocabulary and packs it as a tokenizer that `AutoTokenizer` loads.

The units are bytes: byte-pair encoding (Sennrich et al., 2016) or a unigram model (Kudo, 2018) over the 256 byte
values, so every text can be written and none is ever unknown. The work is done by the `tokenizers` library.
"""

import json
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


# In the order of their ids, 0 to 3, which are the defaults of VanillaTransformerConfig.
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENIZER_MODELS = ("bpe", "unigram")
MOST_IDS = 2**31
# What stood between a token that a user has added and the text beside it, by the kind of normaliser: nothing where the
# text's own spaces are kept, and a space where words are told by white space.
SEPARATORS = {normalizers.Prepend: "", type(None): " "}


class VanillaTransformerTokenizer(PreTrainedTokenizerFast):
    """
    A tokenizer in which text cannot write the tokens of SPECIAL_TOKENS, but can write those that a user adds: a tag for
    a language, by `add_tokens(["<2de>"], special_tokens=True)` or `add_special_tokens`, is one token wherever it is.

    The library `tokenizers` splits all special tokens or none (`split_special_tokens`). To it a user's are therefore
    ordinary ones. So they are where a saved folder is loaded without this package, too, and only
    `skip_special_tokens` then leaves them in.
    """

    def _add_tokens(self, new_tokens: list[str] | list[AddedToken], special_tokens: bool = False) -> int:
        own = {str(token) for name in SPECIAL_TOKENS if (token := self._special_tokens_map[name]) is not None}
        added = []
        for token in new_tokens:
            if isinstance(token, str):
                # Text is written as it is: looked for in normalised text, a token would need a space before it.
                token = AddedToken(token, normalized=False, special=special_tokens)
            special = special_tokens or token.special
            if special and token.content not in self.all_special_tokens:
                self._extra_special_tokens.append(token.content)
            options = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            added.append(AddedToken(token.content, **options, special=special and token.content in own))
        return self._tokenizer.add_tokens(added)

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        added = {number for number, token in self.added_tokens_decoder.items() if not token.special}
        if not added:
            return super()._decode(token_ids, skip_special_tokens, **kwargs)
        token_ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        separator = SEPARATORS.get(type(self._tokenizer.normalizer))
        if separator is None:
            return super()._decode([token for token in token_ids if token not in skipped], **kwargs)
        # Each stretch of text between added tokens was encoded by itself.
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

    Encoding appends `</s>`; the model itself puts `<s>` before the target. Text is never normalised, and digits stand
    alone, so that numbers are copied digit by digit. One of these special tokens that is written in a text is text.
    Tokens that are added later, such as language tags, are one token wherever they are written.

    Args:
        texts: sentences of the source and the target.
        vocab_size: number of subwords to learn, the 256 bytes and the 4 special tokens included. Fewer are found in
            a text too small to hold so many.
        model: "bpe" or "unigram".
        pretokenized: the words of `texts` are separated by white space, and no subword may join them. Decoding puts
            one space between words. Otherwise decoding gives back exactly the text that was encoded.

    Returns:
        A tokenizer with pad 0, bos 1, eos 2, unk 3, to be saved by `save_pretrained`.

    Raises:
        ValueError: `model` is unknown, `vocab_size` has no room for the bytes or is too large, or there is no text.
    """
    # With nothing to learn beyond the bytes, the unigram trainer overlooks the limit.
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
        # A word is the same subwords at the start of a sentence as inside it: each begins with its space.
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
    """What no subword may cross, and how the bytes of subwords become text again."""
    if pretokenized:
        splits = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    else:
        splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    first_space = decoders.Strip(" ", 1, 0)
    return pre_tokenizers.Sequence(splits), decoders.Sequence([decoders.ByteLevel(), first_space])


def _settled(tokenizer: Tokenizer) -> models.Unigram:
    """
    The unigram model with ids and scores that depend on the text alone.

    The trainer takes bytes that it hardly met in the random order of a hash map, and scores them 0.0001 apart, upwards
    from the lowest score: here they share that. Other scores differ in the last bits, as threads add them up: here they
    are rounded. A special token scores so low that, written in a text, its bytes are preferred to it.
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

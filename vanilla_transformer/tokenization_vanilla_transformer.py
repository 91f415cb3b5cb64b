"""Learns a joint subword vocabulary and packs it as a tokenizer that `AutoTokenizer` loads.

The units are bytes: byte-pair encoding (Sennrich et al., 2016) or a unigram model (Kudo, 2018) over the 256 byte
values, so every text can be written and none is ever unknown. The work is done by the `tokenizers` library.
"""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


# In the order of their ids, 0 to 3, which are the defaults of VanillaTransformerConfig.
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENIZER_MODELS = ("bpe", "unigram")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, model: str = "bpe", pretokenized: bool = False
) -> PreTrainedTokenizerFast:
    """
    Learns subwords from both sides of the training text.

    Encoding appends `</s>`; the model itself puts `<s>` before the target. Text is never normalised, and digits stand
    alone, so that numbers are copied digit by digit. A special token that is written in a text is text.

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
        ValueError: `model` is unknown, `vocab_size` has no room for the bytes, or there is no text.
    """
    # With nothing to learn beyond the bytes, the unigram trainer overlooks the limit.
    smallest = len(SPECIAL_TOKENS) + len(BYTES) + (model == "unigram")
    if model not in TOKENIZER_MODELS:
        raise ValueError(f"tokenizer model={model!r} is unknown: choose one of {', '.join(TOKENIZER_MODELS)}")
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
    return PreTrainedTokenizerFast(
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

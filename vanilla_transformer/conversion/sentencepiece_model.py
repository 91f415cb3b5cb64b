"""Reads a SentencePiece model as a tokenizer to train with: the same ids, for texts without its special tokens."""

import re
from pathlib import Path

from tokenizers import Regex, models, pre_tokenizers

from ..tokenization_vanilla_transformer import SPECIAL_TOKENS, VanillaTransformerTokenizer
from .checkpoints import pack_tokenizer, read_sentencepiece, sentencepiece_tokenizer


def from_sentencepiece(path: str | Path) -> VanillaTransformerTokenizer:
    """
    The tokenizer of a `.model` file. It appends eos to each text. Special tokens that the model lacks (by default
    padding) follow the last piece.

    Raises:
        ValueError: the file is not such a model, or has a feature that `tokenizers` lacks. The message says which.
        ImportError: protobuf is not installed.
        OSError: the file cannot be read.
    """
    spm = read_sentencepiece(path)
    tokens = [piece.piece for piece in spm.pieces]
    specials = {}
    for name, default in SPECIAL_TOKENS.items():
        number = getattr(spm.trainer_spec, name.removesuffix("_token") + "_id")
        if number < 0:
            tokens.append(default)
        specials[name] = tokens[number]
    tokenizer = sentencepiece_tokenizer(path, tokens, tokens, specials["unk_token"])
    if isinstance(tokenizer.model, models.Unigram):
        # A unigram model of `tokenizers` would rather find a special token in the text than unknown characters.
        inside = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in specials.values())
        splits = [tokenizer.pre_tokenizer, pre_tokenizers.Split(Regex(inside), "isolated")]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return pack_tokenizer(tokenizer, specials, append_eos=True)

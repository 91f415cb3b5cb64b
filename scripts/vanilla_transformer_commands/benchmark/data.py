"""The tokenizer and the rows of ids that all contenders read."""

from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from vanilla_transformer.tokenization_vanilla_transformer import SPECIAL_TOKENS
from vanilla_transformer.training.data.pairs import ENCODED, load_pairs, tokenize_pairs
from vanilla_transformer.training.data.rows import learn_tokenizer

from .cells import GPU_FACTOR, LENGTH, SENTENCES
from .recipes import parse


def prepare(argv: list[str], folder: Path) -> Any:
    """Writes the tokenizer and the rows of ids that all contenders read. Returns the tokenizer."""
    datasets.disable_progress_bars()
    recipe = parse(argv)
    if recipe.data.dataset:
        # The recipe's own data is too large to download for a measurement of speed.
        tokenizer, rows = random_text(recipe.tokenizer.vocab_size)
    else:
        recipe.data.test_file = None
        pairs = load_pairs(recipe.data)
        tokenizer = learn_tokenizer(recipe.tokenizer, pairs["train"])
        rows = {split: tokenize_pairs(pairs[split], tokenizer, recipe.data, split) for split in pairs}
    tokenizer.save_pretrained(folder / "tokenizer")
    for split in rows:
        rows[split].save_to_disk(folder / split)
    return tokenizer


def random_text(vocab_size: int) -> tuple[Any, dict[str, Any]]:
    """A tokenizer of `vocab_size` words, and rows of `LENGTH` random tokens on both sides, each with eos at the end."""
    tokenizer, rows = word_tokenizer(vocab_size), 8 * GPU_FACTOR * SENTENCES
    columns = {name: random_ids(tokenizer, rows, LENGTH) for name in ENCODED}
    return tokenizer, {"train": Dataset.from_dict(columns, features=ENCODED)}


def word_tokenizer(vocab_size: int) -> Any:
    """A tokenizer of `vocab_size` words."""
    words = [*SPECIAL_TOKENS.values(), *(f"w{number}" for number in range(len(SPECIAL_TOKENS), vocab_size))]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **SPECIAL_TOKENS)


def random_ids(tokenizer: Any, rows: int, length: int) -> list[list[int]]:
    """Rows of random tokens, each with eos at the end."""
    ids = torch.randint(len(tokenizer.all_special_ids), len(tokenizer), (rows, length))
    ids[:, -1] = tokenizer.eos_token_id
    return ids.tolist()

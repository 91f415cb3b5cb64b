"""BPE-dropout: splits words differently in each epoch of training (Provilkov et al., 2020, arXiv 1910.13267).

A word starts as characters. In each step every possible merge is dropped with the same probability, and of the
remaining merges the one that was learned first is applied, until none remains. At a rate of 0.1, texts become some 30 %
longer.

The dropout of the library `tokenizers` cannot be seeded, and is weaker (texts some 15 % longer): it retries dropped
merges whenever its queue reaches a merge that no longer applies. Here seed, epoch and row determine the result, so it
is the same in resumed runs, all processes and all workers.
"""

import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import RecipeError
from ..settings.arguments import DataArguments
from .encoding import WORDS
from .epochs import Columns, EpochRows


class BpeDropout:
    """
    Applies BPE-dropout to texts, given their tokens without dropout.

    At a rate of 0.1 it takes some 4 microseconds per word.

    Args:
        tokenizer: a fast tokenizer with a BPE model. Tokens without a merge (added tokens, bytes) are kept.
        rate: probability of dropping a merge, from 0 (the tokenizer's own tokens) to 1 (characters, or bytes).

    Raises:
        RecipeError: the tokenizer has no merges.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rate: float):
        model: dict[str, Any] = {"type": "slow"}
        if tokenizer.is_fast:
            model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        if model["type"] != "BPE":
            raise RecipeError(
                f"bpe_dropout={rate} needs a BPE tokenizer, but this one is of type {model['type']}: "
                "set bpe_dropout to 0, or use another tokenizer"
            )
        self._log_keep = math.log1p(-rate) if rate < 1 else -math.inf
        vocab, prefix = model["vocab"], len(model["continuing_subword_prefix"] or "")
        pairs = [(vocab[left], vocab[right]) for left, right in model["merges"]]
        # For each rank the token that the merge produces; for each token the characters that it consists of.
        self._merged = [vocab[left + right[prefix:]] for left, right in model["merges"]]
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._characters: list[tuple[int, ...]] = [(token,) for token in range(len(tokenizer))]
        for (left, right), token in zip(pairs, self._merged, strict=True):
            if self._characters[token] == (token,):
                self._characters[token] = self._characters[left] + self._characters[right]

    def __call__(self, tokens: list[int], words: list[int], key: int) -> list[int]:
        """
        Splits a text with dropout.

        Args:
            tokens: its ids without dropout.
            words: the number of tokens of each word.
            key: the seed, at least 0.

        Returns:
            The ids of the text with dropout.
        """
        draw = random.Random(key).random
        # Draws the number of merges until the next dropped one, instead of a random number for each merge.
        run = self._draw_run(draw)
        cut: list[int] = []
        start = 0
        for length in words:
            word = tokens[start : start + length]
            start += length
            merges = sum(len(self._characters[token]) - 1 for token in word)
            if run >= merges:
                run -= merges
            else:
                word, run = self._cut_word(word, run, draw)
            cut += word
        return cut

    def _draw_run(self, draw: Callable[[], float]) -> float:
        """The number of merges until the next dropped one (geometric; the fractional part has no effect)."""
        return math.log(1 - draw()) / self._log_keep if self._log_keep else math.inf

    def _cut_word(self, word: list[int], run: float, draw: Callable[[], float]) -> tuple[list[int], float]:
        """Merges the characters of a word; the first `run` merges are kept. Returns tokens and the rest of `run`."""
        symbols = [character for token in word for character in self._characters[token]]
        rank_of, impossible = self._ranks.get, len(self._merged)
        ranks = [rank_of(pair, impossible) for pair in pairwise(symbols)]
        while ranks:
            rank = min(ranks)
            place = ranks.index(rank)
            if run < 1:
                possible = sorted((rank, place) for place, rank in enumerate(ranks) if rank != impossible)
                dropped = 0
                while run < 1 and dropped < len(possible):
                    dropped, run = dropped + 1, self._draw_run(draw)
                rank, place = possible[dropped] if dropped < len(possible) else (impossible, 0)
            if rank == impossible:
                break
            run -= 1
            symbols[place] = self._merged[rank]
            del symbols[place + 1], ranks[place]
            if place:
                ranks[place - 1] = rank_of((symbols[place - 1], symbols[place]), impossible)
            if place < len(ranks):
                ranks[place] = rank_of((symbols[place], symbols[place + 1]), impossible)
        return symbols, run


class BpeDropoutRows(EpochRows):
    """
    Training rows, `{"input_ids", "labels"}`, with new dropout in each epoch.

    A side that would exceed `max_source_length` or `max_target_length` keeps its tokens without dropout.

    Args:
        rows: the rows without dropout, with the columns of WORDS.
        tokenizer: the tokenizer of the rows.
        data: has the rate and the maximum lengths.
        seed: with the epoch and the row's number, determines which merges are dropped.

    Raises:
        RecipeError: the tokenizer has no merges.
    """

    def __init__(self, rows: Dataset | EpochRows, tokenizer: PreTrainedTokenizerBase, data: DataArguments, seed: int):
        super().__init__(rows)
        self._cut = BpeDropout(tokenizer, data.bpe_dropout)
        self._longest = {"input_ids": data.max_source_length, "labels": data.max_target_length}
        self._seed = seed

    def columns(self, numbers: list[int]) -> Columns:
        """The ids of these rows, cut anew."""
        columns = super().columns(numbers)
        return {side: self._cut_side(columns, side, numbers) for side in WORDS}

    def _cut_side(self, columns: Columns, side: str, numbers: list[int]) -> list[list[int]]:
        # One number of four: seed, epoch (32 bits), row and side (64 bits).
        first_key = (self._seed << 32 | self.epoch) << 64 | (side == "labels")
        cut = []
        for number, tokens, words in zip(numbers, columns[side], columns[WORDS[side]], strict=True):
            anew = self._cut(tokens, words, first_key | number << 1)
            cut.append(anew if len(anew) <= self._longest[side] else tokens)
        return cut

    def growth(self, sample: int = 1000) -> float:
        """The factor by which rows become longer, estimated from a sample spread over the data."""
        numbers = list(range(0, len(self), max(1, len(self) // sample)))
        before, after = super().columns(numbers), self.columns(numbers)
        lengths = [sum(len(tokens) for side in WORDS for tokens in columns[side]) for columns in (after, before)]
        return lengths[0] / lengths[1]

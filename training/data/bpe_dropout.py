"""BPE-dropout: words cut in another way in each epoch of training (Provilkov et al., 2020, arXiv 1910.13267).

A word begins as characters. Of the merges that are possible, each is dropped with the same probability, and the first
in the order of the vocabulary that is left is done; this repeats until nothing is left. At a rate of 0.1, texts become
some 30 % longer.

The dropout of `tokenizers` draws from a generator that cannot be seeded, and is weaker: what it drops is tried again
whenever its queue comes to a merge that is no longer there (some 15 % longer). Here the seed, the epoch and the row
decide, so that a run that resumes, and every process and worker, sees the same text.
"""

import json
import math
import random
from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any

import torch
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..errors import RecipeError
from ..settings.arguments import DataArguments


# The columns of a side's ids -> the columns of its words' lengths in tokens.
WORDS = {"input_ids": "source_words", "labels": "target_words"}


def word_lengths(encoded: BatchEncoding) -> list[list[int]]:
    """For each text the tokens of each of its words; what the tokenizer puts around the text counts as a word."""
    rows = range(len(encoded["input_ids"]))
    return [[len(list(tokens)) for _, tokens in groupby(encoded.word_ids(row))] for row in rows]


class BpeDropout:
    """
    Cuts texts anew, given their tokens without dropout.

    At a rate of 0.1 it takes some 4 microseconds a word.

    Args:
        tokenizer: a fast tokenizer with a BPE model. What is no result of a merge (an added token, a byte) stays.
        rate: probability of dropping a merge, between 0 (the tokenizer's own tokens) and 1 (characters, or bytes).

    Raises:
        RecipeError: the tokenizer has no merges.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rate: float):
        model: dict[str, Any] = {"type": "slow"}
        if tokenizer.is_fast:
            model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        if model["type"] != "BPE":
            raise RecipeError(
                f"bpe_dropout={rate} needs a tokenizer that merges (BPE), and this one is of the kind {model['type']}: "
                "set bpe_dropout to 0, or name another tokenizer"
            )
        self._log_keep = math.log1p(-rate) if rate < 1 else -math.inf
        vocab, prefix = model["vocab"], len(model["continuing_subword_prefix"] or "")
        pairs = [(vocab[left], vocab[right]) for left, right in model["merges"]]
        # By rank, what a merge gives; and by token, the characters that it is merged of.
        self._merged = [vocab[left + right[prefix:]] for left, right in model["merges"]]
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._characters: list[tuple[int, ...]] = [(token,) for token in range(len(tokenizer))]
        for (left, right), token in zip(pairs, self._merged, strict=True):
            if self._characters[token] == (token,):
                self._characters[token] = self._characters[left] + self._characters[right]

    def __call__(self, tokens: list[int], words: list[int], key: int) -> list[int]:
        """
        Cuts a text.

        Args:
            tokens: its ids without dropout.
            words: how many of them each word has.
            key: decides what is dropped, and is not negative.

        Returns:
            The ids of the text with dropout.
        """
        draw = random.Random(key).random
        # Rather than one random number for each merge, one for each run of merges until one is dropped.
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
        """How many merges are kept until the next one is dropped (geometric; what is behind the point is no matter)."""
        return math.log(1 - draw()) / self._log_keep if self._log_keep else math.inf

    def _cut_word(self, word: list[int], run: float, draw: Callable[[], float]) -> tuple[list[int], float]:
        """Merges the characters of a word. The first `run` merges are kept; what is left of that is returned, too."""
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


class BpeDropoutRows(torch.utils.data.Dataset):
    """
    Training rows whose text is cut anew in each epoch, `{"input_ids", "labels"}`.

    A side that would become longer than `max_source_length` or `max_target_length` stays as it was.

    Args:
        rows: the rows without dropout, with the columns of WORDS.
        tokenizer: what they were tokenised by.
        data: has the rate and the longest lengths.
        seed: with the epoch and the row's number, it decides what is dropped.

    Raises:
        RecipeError: the tokenizer has no merges.
    """

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataArguments, seed: int):
        self.rows = rows
        self._cut = BpeDropout(tokenizer, data.bpe_dropout)
        self._longest = {"input_ids": data.max_source_length, "labels": data.max_target_length}
        self._seed = seed
        # Shared, since workers that persist were started in an epoch before.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """To be called at the start of each epoch, before its first row is asked for."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, list[int]]]:
        """A batch of rows, as a DataLoader asks for them."""
        columns = self.rows[numbers]
        sides = {side: self._cut_side(columns, side, numbers) for side in WORDS}
        return [dict(zip(sides, row, strict=True)) for row in zip(*sides.values(), strict=True)]

    def _cut_side(self, columns: dict[str, list], side: str, numbers: list[int]) -> list[list[int]]:
        # One number of four: seed, epoch (32 bits), row and side (64 bits).
        first_key = (self._seed << 32 | int(self._epoch)) << 64 | (side == "labels")
        cut = []
        for number, tokens, words in zip(numbers, columns[side], columns[WORDS[side]], strict=True):
            anew = self._cut(tokens, words, first_key | number << 1)
            cut.append(anew if len(anew) <= self._longest[side] else tokens)
        return cut

    def growth(self, sample: int = 1000) -> float:
        """How many times as long rows become, on a sample of them from all over the data."""
        numbers = list(range(0, len(self), max(1, len(self) // sample)))
        before = self.rows[numbers]
        after = self.__getitems__(numbers)
        return sum(len(row[side]) for row in after for side in WORDS) / sum(
            len(tokens) for side in WORDS for tokens in before[side]
        )

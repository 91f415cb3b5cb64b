"""`Run`, a run that is ready to train: recipe, text, ids, tokenizer and model."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.pairs import tokenize_pairs
from ..loop.resuming import fingerprint
from ..settings.recipe import Recipe


# Number of rows that represent a streamed data set in the checks.
SAMPLE = 10_000
COLUMNS = {"source": "input_ids", "target": "labels"}

Lengths = dict[str, np.ndarray]


@dataclass
class Run:
    """A run that is ready to train, and the checkpoint that it resumes from, if any."""

    recipe: Recipe
    pairs: Any
    rows: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    checkpoint: str | None = None

    @cached_property
    def data(self) -> dict[str, str]:
        """A description that identifies the data of each split."""
        return fingerprint(self.recipe.corpora, self.tables)

    @cached_property
    def tables(self) -> dict[str, pa.Table]:
        """The ids of each split; for a stream, those of its first SAMPLE rows."""
        rows = {split: found for split, found in self.rows.items() if isinstance(found, Dataset)}
        if self.recipe.data.streaming:
            pairs = Dataset.from_list(list(self.pairs["train"].take(SAMPLE)))
            rows["train"] = tokenize_pairs(pairs, self.tokenizer, self.recipe.data, "train")
        columns = list(COLUMNS.values())
        return {split: found.with_format("arrow")[:].select(columns) for split, found in rows.items()}

    @cached_property
    def lengths(self) -> dict[str, Lengths]:
        """Tokens of each row's source and target."""
        return {
            split: {side: pc.list_value_length(table[column]).to_numpy() for side, column in COLUMNS.items()}
            for split, table in self.tables.items()
        }


def longest_rows(lengths: Lengths) -> np.ndarray:
    """Tokens of each row's longer side."""
    return np.maximum(lengths["source"], lengths["target"])

"""The tasks of `decode`: sentences, beams and batches."""

import argparse
from typing import Any

from .cells import (
    BLEU_CELL,
    LENGTH,
    MEMORY_BATCH,
    MEMORY_BEAMS,
    MEMORY_LENGTHS,
    MEMORY_NEW_TOKENS,
    SEARCHES,
    SPEED_SENTENCES,
)
from .data import random_ids


def random_tasks(tokenizer: Any, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Tasks of one batch of random text, with outputs of fixed length."""
    if options.memory:
        cells = {
            f"source {length}, beam {beams}": (beams, MEMORY_BATCH, length, MEMORY_NEW_TOKENS)
            for length in MEMORY_LENGTHS
            for beams in MEMORY_BEAMS
        }
    else:
        cells = {cell: (*SEARCHES[cell], LENGTH, LENGTH) for cell in options.cells or SEARCHES}
    return {
        cell: {"beams": beams, "batch": batch, "sources": random_ids(tokenizer, batch, length), "new_tokens": new}
        for cell, (beams, batch, length, new) in cells.items()
    }


def tasks_of_text(tokenizer: Any, pairs: Any, bleu_tokenize: str, cells: list[str]) -> dict[str, dict[str, Any]]:
    """Tasks of a test set, the longest sentences first."""
    sources, references = tokenizer(list(pairs["source"]))["input_ids"], list(pairs["target"])
    tasks = {}
    for cell in cells:
        beams, batch = SEARCHES[cell]
        chosen = range(len(sources))[: SPEED_SENTENCES if batch == 1 else None]
        order = sorted(chosen, key=lambda i: -len(sources[i]))
        tasks[cell] = {"beams": beams, "batch": batch, "sources": [sources[i] for i in order], "new_tokens": None}
        if cell == BLEU_CELL:
            tasks[cell] |= {"references": [references[i] for i in order], "bleu_tokenize": bleu_tokenize}
    return tasks

"""Batches of sentences of similar length, for the pipeline, evaluation and `vanilla-transformer translate`."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedConfig


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """
    Yields batches of similar length, as lists of row numbers. The longest rows come first, so that a
    batch that does not fit into memory fails at once.

    Args:
        lengths: source tokens of each row, at least 1.
        max_tokens: source tokens of a batch, padding included. A longer row becomes a batch by itself.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        end = start + max(1, max_tokens // lengths[order[start]])
        yield order[start:end]
        start = end


def longest_sentence(config: PreTrainedConfig) -> int | None:
    """
    The greatest number of source tokens: the number of learned positions, or None for sinusoids, which have no limit.
    Other models that transformers loads for this task lack the field, and also give None.
    """
    learned = getattr(config, "position_embedding_type", None) == "learned"
    return config.max_position_embeddings if learned else None

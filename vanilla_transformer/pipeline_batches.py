"""Which sentences are translated together: the pipeline, evaluation and `vanilla-transformer translate` share this."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedConfig


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """
    Yields batches of similar length, as lists of row numbers. The longest rows come first: if a batch does not fit in
    memory, that shows at once.

    Args:
        lengths: source tokens of each row, at least 1.
        max_tokens: source tokens of a batch, padding included. A longer row is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while order:
        size = max(1, max_tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def longest_sentence(config: PreTrainedConfig) -> int | None:
    """
    How many tokens a source may have, or None where any number will do: sinusoids go on, learned positions end. Models
    of other kinds, which transformers loads for the same task, have no field that says so.
    """
    learned = getattr(config, "position_embedding_type", None) == "learned"
    return config.max_position_embeddings if learned else None

"""The training loss: cross-entropy with label smoothing (Vaswani et al., 2017, section 5.4)."""

import torch
from torch.nn import functional as F


IGNORE_INDEX = -100


def label_smoothed_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Cross-entropy in nats per target token, against a target that has `1 - label_smoothing` on the true token and
    `label_smoothing` spread evenly over the vocabulary (the definition of `torch.nn.functional.cross_entropy`).

    The sum over tokens is divided by `num_items_in_batch`, which the Trainer counts over every micro-batch and
    process of one update. So the loss and its gradient are the same however an update's tokens are split.

    Args:
        logits: scores before the softmax, `[B, T, V]`.
        labels: ids of the true tokens, `[B, T]`; positions with -100 do not count.
        label_smoothing: mass spread over the vocabulary, in [0, 1).
        num_items_in_batch: number of target tokens in the whole update. Default: those in `labels`.

    Returns:
        A scalar, float32 or wider. 0 where no position counts.
    """
    # Half-precision logits lose the small probabilities that smoothing adds up: reduce in float32.
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))  # [B*T, V]
    labels = labels.flatten().to(logits.device)  # [B*T]
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORE_INDEX).sum().clamp(min=1)
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch

"""What R-Drop and SimCut have in common: every batch passes through the network twice, and a loss compares the passes.

The loss of all tokens and its gradient are computed together, chunk by chunk, so that the probabilities of all tokens
are never in memory at once.
"""

from collections.abc import Callable

import torch

from vanilla_transformer.network_loss import IGNORE_INDEX


# Target tokens compared at a time: about as many as fit into a CPU's cache.
CHUNK = 64

# From log p and log q, `[n, V]`: the loss summed over n tokens, and its gradients with respect to both logits.
Comparison = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def compare_passes(logits: torch.Tensor, labels: torch.Tensor, comparison: Comparison) -> torch.Tensor:
    """
    A comparison of the predictions of two passes, summed over target tokens. It supports first derivatives only.

    Args:
        logits: both passes, concatenated, `[2 B, T, V]`.
        labels: `[B, T]`; positions with -100 do not count.
        comparison: of the first pass, p, with the second, q.

    Returns:
        A scalar in float32 or wider: half precision would lose the small differences that are summed.
    """
    return _Comparison.apply(logits, (labels != IGNORE_INDEX).flatten().nonzero()[:, 0], comparison)


class _Comparison(torch.autograd.Function):
    """The comparison at the positions `kept`, `[N]`. The forward pass also computes the gradient."""

    @staticmethod
    def forward(ctx, logits, kept, comparison):
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = logits.new_zeros((), dtype=wide)
        # A float16 gradient would underflow before the backward pass multiplies it by the loss scale.
        dtype = wide if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.zeros(logits.shape, dtype=dtype, device=logits.device)
        first, second = (half.flatten(0, 1) for half in logits.chunk(2))
        first_gradient, second_gradient = (half.flatten(0, 1) for half in gradient.chunk(2))
        for rows in kept.split(CHUNK):
            log_p, log_q = (x[rows].log_softmax(dim=-1, dtype=wide) for x in (first, second))  # [n, V]
            summed, of_first, of_second = comparison(log_p, log_q)
            total += summed
            first_gradient[rows] = of_first.to(dtype)
            second_gradient[rows] = of_second.to(dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_total), None, None

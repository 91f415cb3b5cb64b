"""
R-Drop (Wu et al., 2021, "R-Drop: Regularized Dropout for Neural Networks", https://arxiv.org/abs/2106.14448).

Every batch passes through the network twice, with different dropout, and the loss pulls the two predictions together:

    loss = (CE_1 + CE_2) / 2 + alpha / 2 * (KL(P_1 || P_2) + KL(P_2 || P_1)) / 2        per target token

This is half the paper's loss (equations 2 to 4): its alpha (5 for translation) keeps its meaning, and the loss stays
comparable with other runs. Adam is invariant to the factor.
"""

import torch

from vanilla_transformer.network_loss import IGNORE_INDEX


# Target tokens compared at a time: about as many as fit into a CPU's cache.
CHUNK = 64


def symmetric_divergence(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    (KL(P_1 || P_2) + KL(P_2 || P_1)) / 2 in nats, summed over target tokens. Only first derivatives are supported.

    Args:
        logits: both passes, concatenated, `[2 B, T, V]`.
        labels: `[B, T]`; positions with -100 are ignored.

    Returns:
        A scalar in float32 or wider: half precision would lose the small differences that are summed.
    """
    return _SymmetricDivergence.apply(logits, (labels != IGNORE_INDEX).flatten().nonzero()[:, 0])


class _SymmetricDivergence(torch.autograd.Function):
    """
    The divergence at the positions `kept`, `[N]`. The forward pass also computes the gradient, chunk by chunk, while it
    has the probabilities. With d = log p - log q, the gradient of p's logits is (p (d - KL(P || Q)) + p - q) / 2.
    """

    @staticmethod
    def forward(ctx, logits, kept):
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = logits.new_zeros((), dtype=wide)
        # A float16 gradient would underflow before the backward pass multiplies it by the loss scale.
        dtype = wide if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.zeros(logits.shape, dtype=dtype, device=logits.device)
        first, second = (half.flatten(0, 1) for half in logits.chunk(2))
        first_gradient, second_gradient = (half.flatten(0, 1) for half in gradient.chunk(2))
        for rows in kept.split(CHUNK):
            log_p, log_q = (x[rows].log_softmax(dim=-1, dtype=wide) for x in (first, second))  # [n, V]
            p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
            of_p, of_q = (p * d).sum(dim=-1, keepdim=True), -(q * d).sum(dim=-1, keepdim=True)
            total += (of_p + of_q).sum() / 2
            first_gradient[rows] = ((p * (d - of_p) + p - q) / 2).to(dtype)
            second_gradient[rows] = ((q - p - q * (d + of_q)) / 2).to(dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_total), None

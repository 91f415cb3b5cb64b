"""
R-Drop (Wu et al., 2021, "R-Drop: Regularized Dropout for Neural Networks", https://arxiv.org/abs/2106.14448).

Every batch goes through the network twice, with other dropout, and the two predictions are drawn together:

    loss = (CE_1 + CE_2) / 2 + alpha / 2 * (KL(P_1 || P_2) + KL(P_2 || P_1)) / 2        per target token

This is half the paper's loss (equations 2 to 4), so that its alpha (5 for translation) keeps its meaning while the loss
stays comparable with that of other runs. Adam does not see the factor.
"""

import torch

from vanilla_transformer.network_loss import IGNORE_INDEX


# Target tokens that are compared at a time: a CPU's cache holds about as many.
CHUNK = 64


def symmetric_divergence(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    (KL(P_1 || P_2) + KL(P_2 || P_1)) / 2 in nats, summed over target tokens. It differentiates once.

    Args:
        logits: of both passes, one after the other, `[2 B, T, V]`.
        labels: `[B, T]`; positions with -100 do not count.

    Returns:
        A scalar, float32 or wider: half-precision logarithms lose what this adds up.
    """
    return _SymmetricDivergence.apply(logits, (labels != IGNORE_INDEX).flatten().nonzero()[:, 0])


class _SymmetricDivergence(torch.autograd.Function):
    """
    Of the positions `kept`, `[N]`. Its gradient is made in the forward pass, chunk by chunk, where the probabilities
    are at hand. With d = log p - log q, that in the logits of p is (p (d - KL(P || Q)) + p - q) / 2.
    """

    @staticmethod
    def forward(ctx, logits, kept):
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = logits.new_zeros((), dtype=wide)
        # Those of float16 fit into it when the loss's scale has been multiplied in, in the backward pass.
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

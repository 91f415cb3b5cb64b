"""
R-Drop (Wu et al., 2021, "R-Drop: Regularized Dropout for Neural Networks", https://arxiv.org/abs/2106.14448).

Every batch passes through the network twice, with different dropout, and the loss pulls the two predictions together:

    loss = (CE_1 + CE_2) / 2 + alpha / 2 * (KL(P_1 || P_2) + KL(P_2 || P_1)) / 2        per target token

This is half the paper's loss (equations 2 to 4): its alpha (5 for translation) keeps its meaning, and the loss stays
comparable with other runs. Adam is invariant to the factor.
"""

import torch

from .two_passes import compare_passes


def symmetric_divergence(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    (KL(P_1 || P_2) + KL(P_2 || P_1)) / 2 in nats, summed over target tokens. Only first derivatives are supported.

    Args:
        logits: both passes, concatenated, `[2 B, T, V]`.
        labels: `[B, T]`; positions with -100 are ignored.

    Returns:
        A scalar in float32 or wider: half precision would lose the small differences that are summed.
    """
    return compare_passes(logits, labels, _symmetric)


def _symmetric(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With d = log p - log q, the gradient of p's logits is (p (d - KL(P || Q)) + p - q) / 2."""
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    of_p, of_q = (p * d).sum(dim=-1, keepdim=True), -(q * d).sum(dim=-1, keepdim=True)
    return (of_p + of_q).sum() / 2, (p * (d - of_p) + p - q) / 2, (q - p - q * (d + of_q)) / 2

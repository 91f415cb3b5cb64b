"""
R-Drop (Wu et al., 2021, "R-Drop: Regularized Dropout for Neural Networks", https://arxiv.org/abs/2106.14448).

Every batch goes through the network twice, with other dropout, and the two predictions are drawn together:

    loss = (CE_1 + CE_2) / 2 + alpha / 2 * (KL(P_1 || P_2) + KL(P_2 || P_1)) / 2        per target token

This is half the paper's loss (equations 2 to 4), so that its alpha (5 for translation) keeps its meaning while the loss
stays comparable with that of other runs. Adam does not see the factor.
"""

import torch


def symmetric_divergence(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    (KL(P_1 || P_2) + KL(P_2 || P_1)) / 2 in nats, summed over target tokens.

    Args:
        logits: of both passes, one after the other, `[2 B, T, V]`.
        labels: `[B, T]`; positions with -100 do not count.

    Returns:
        A scalar, float32 or wider: half-precision logarithms lose what this adds up.
    """
    first, second = (half[labels != -100] for half in logits.chunk(2))  # [N, V]
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p, log_q = first.log_softmax(dim=-1, dtype=wide), second.log_softmax(dim=-1, dtype=wide)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum() / 2

"""Dropout (Vaswani et al., 2017, section 5.4) whose random numbers cost little on a CPU."""

import torch
from torch import nn


def fast_dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """
    `torch.nn.functional.dropout`, with a cheaper draw on a CPU, where torch's masks cost more than a small layer does.

    One 64-bit random number decides four elements, 16 bits for each: an element becomes zero if its bits, as a number,
    lie below `p * 2^16`. So the rate is exact to 2^-17. The numbers come from torch's default generator: seeds, and the
    generator's state in a checkpoint, work as ever. On other devices torch's own fused kernel draws.

    Args:
        x: any shape.
        p: probability with which an element becomes zero; the others are divided by `1 - p`.
        training: False returns `x`.
    """
    if not training or p in (0.0, 1.0) or x.device.type != "cpu" or torch.compiler.is_compiling():
        return nn.functional.dropout(x, p, training)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in [-2^15, 2^15)
    kept = (bits >= round(p * 2**16) - 2**15).to(x.dtype)
    return x * kept.mul_(1 / (1 - p))


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by the function above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape, the same back."""
        return fast_dropout(x, self.p, self.training)

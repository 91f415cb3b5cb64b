"""Faster versions of what every sub-layer does: products and dropout on a CPU, and casts under autocast."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


# Up to this number of multiplications, calling oneDNN takes longer than torch's whole plain product.
FEW_PRODUCTS = 2**17


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """
    `torch.nn.functional.linear`, x W^T + b, at twice the speed in float32 on some CPUs.

    On those CPUs torch multiplies with MKL, which does not use the AVX-512 units of processors that are not Intel's.
    oneDNN, which torch uses for bfloat16 anyway, does, with the same single precision. In all other cases torch's own
    product is used: other types and devices, autocast, compiled graphs, weights that are not plain tensors (quantised
    or sharded), small products.

    Args:
        x: `[..., in]`. weight: `[out, in]`. bias: `[out]`.

    Returns:
        `[..., out]`.
    """
    if _by_onednn(x, weight):
        return _Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] > FEW_PRODUCTS
        and type(x) is torch.Tensor
        and type(weight) in (torch.Tensor, nn.Parameter)
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _Product(torch.autograd.Function):
    """x W^T + b by oneDNN. Its gradients are such products too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # [N, out]
        return (
            linear(grad, weight.T) if wanted[0] else None,
            weight_gradient(rows, x.flatten(0, -2)) if wanted[1] else None,
            rows.sum(dim=0) if wanted[2] else None,
        )


# oneDNN needs a contiguous left operand, so a transposed one is copied first. With AVX-512 oneDNN is faster in spite of
# the copy; with AVX2 torch's own product is as fast without it.
_COPY_PAYS = torch.backends.cpu.get_cpu_capability() == "AVX512"


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
    """
    The gradient of a weight, grad^T x, by the fastest product.

    Args:
        grad: `[N, out]`. x: `[N, in]`.
        total: `[out, in]`, to which the gradient is added in place. Default: none.

    Returns:
        `[out, in]`.
    """
    if total is not None and total.dtype == grad.dtype and not (_COPY_PAYS and _by_onednn(grad, x)):
        return total.addmm_(grad.T, x)
    product = linear(grad.T, x.T) if _COPY_PAYS else grad.T @ x
    return product if total is None else total.add_(product)


class Linear(nn.Linear):
    """`torch.nn.Linear` with `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`."""
        return linear(x, self.weight, self.bias)


def fast_dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """
    `torch.nn.functional.dropout` (Vaswani et al., 2017, section 5.4), faster on a CPU, where torch's masks take longer
    than a small layer.

    One 64-bit random number decides four elements, 16 bits for each: an element becomes zero if its 16-bit number is
    below `p * 2^16`. So the rate is exact to 2^-17. The numbers come from torch's default generator, so seeds and the
    generator's state in a checkpoint work as usual. The backward pass needs the mask, which takes one byte per element.
    On other devices torch's own fused kernel is used.

    Args:
        x: any shape.
        p: probability with which an element becomes zero; the others are divided by `1 - p`.
        training: False returns `x`.
    """
    if not training or p in (0.0, 1.0) or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in [-2^15, 2^15)
    return _Keep.apply(x, bits >= round(p * 2**16) - 2**15, 1 / (1 - p))


class _Keep(torch.autograd.Function):
    """`x * scale` where `kept`, else 0; the gradient likewise."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return kept.to(x.dtype).mul_(scale).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        return kept.to(grad.dtype).mul_(ctx.scale).mul_(grad), None, None


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` with `fast_dropout`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes any shape and returns the same."""
        return fast_dropout(x, self.p, self.training)


def cast_once(x: torch.Tensor) -> torch.Tensor:
    """
    Casts `x` to autocast's dtype once. Otherwise each projection that reads `x` would cast it and keep its own copy for
    the backward pass. Without autocast, and in float64, which autocast ignores, returns `x`.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x

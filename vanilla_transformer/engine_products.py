"""Matrix products whose weights are packed once, for the fastest library on this machine.

On a CPU that is oneDNN (float32, bfloat16) or FBGEMM (int8). On other devices it is torch's own product.
"""

import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .network_operations import FEW_PRODUCTS


COMPUTE_TYPES = ("float32", "bfloat16", "int8")
# With fewer inputs int8 is not faster, because states must be rounded before the product and sums scaled after it.
FEW_INPUTS = 512

Product = Callable[[torch.Tensor], torch.Tensor]


def pack_linear(
    weight: torch.Tensor, bias: torch.Tensor, compute_type: str, relu: bool = False, positive: bool = False
) -> Product:
    """
    Packs x W^T + b with the weights rounded to `compute_type`. Input and output are float32.

    Args:
        weight: `[out, in]`. bias: `[out]`.
        compute_type: "float32"; "bfloat16", with sums in float32; or "int8". In int8, weights have 8 bits and a scale
            for each output, states have 7 or 8 bits and a scale for each row, and sums are exact integers. Matrices
            with fewer than `FEW_INPUTS` inputs stay float32. If the type is not native (`is_native`), the rounded
            weights are multiplied in float32.
        relu: whether to apply max(0, .) to the result.
        positive: whether no state is below 0. int8 then rounds states twice as finely.
    """
    if compute_type == "int8" and weight.shape[1] < FEW_INPUTS:
        compute_type = "float32"
    if not is_native(compute_type, weight.device):
        weight, compute_type = _rounded(weight.float(), compute_type), "float32"
    if compute_type == "int8":
        return _int8_linear(weight.float(), bias.float(), relu, positive)
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return _plain_linear(weight, bias, compute_type, relu)
    dtype = getattr(torch, compute_type)
    packed, bias = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), 64), bias.to(dtype)
    product, after = torch.ops.mkldnn._linear_pointwise.default, "relu" if relu else "none"
    if dtype == torch.float32:
        return _float32_linear(weight.float(), packed, bias, relu)
    return lambda x: product(x.to(dtype), packed, bias, after, [], "").float()


def is_native(compute_type: str, device: torch.device) -> bool:
    """Whether this machine has instructions for products in this type. Without them float32 is fastest."""
    if device.type != "cpu":
        return compute_type != "int8"
    if compute_type == "int8":
        return "fbgemm" in torch.backends.quantized.supported_engines
    if compute_type != "bfloat16":
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine() in ("aarch64", "arm64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # Without AVX-512 BF16, oneDNN converts to float32. get_cpu_capability() respects ATEN_CPU_CAPABILITY.
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def _rounded(weight: torch.Tensor, compute_type: str) -> torch.Tensor:
    """The weights rounded to another type, in float32."""
    if compute_type == "int8":
        scales = _scales(weight)[:, None]
        return (weight / scales).round_().mul_(scales)
    return weight.to(getattr(torch, compute_type)).float()


def _scales(weight: torch.Tensor) -> torch.Tensor:
    """The size of one int8 step for each output, `[out]`."""
    return weight.abs().amax(dim=1).clamp(min=1e-12) / 127


def _float32_linear(weight: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, relu: bool) -> Product:
    """Uses oneDNN, but torch's plain product for small inputs, which avoids oneDNN's overhead."""
    product, after = torch.ops.mkldnn._linear_pointwise.default, "relu" if relu else "none"
    # A small matrix stays in a core's cache, where the plain product is fast for longer inputs too.
    products = 8 * FEW_PRODUCTS if weight.numel() <= FEW_PRODUCTS // 2 else FEW_PRODUCTS
    few = products // len(weight)
    if few < weight.shape[1]:
        return lambda x: product(x, packed, bias, after, [], "")

    def linear(x: torch.Tensor) -> torch.Tensor:
        if x.numel() > few:
            return product(x, packed, bias, after, [], "")
        return F.linear(x, weight, bias).relu_() if relu else F.linear(x, weight, bias)

    return linear


def _plain_linear(weight: torch.Tensor, bias: torch.Tensor, compute_type: str, relu: bool) -> Product:
    dtype = getattr(torch, compute_type)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if relu:
        return lambda x: F.linear(x.to(dtype), weight, bias).relu_().float()
    return lambda x: F.linear(x.to(dtype), weight, bias).float()


def _int8_linear(weight: torch.Tensor, bias: torch.Tensor, relu: bool, positive: bool) -> Product:
    """Uses FBGEMM. Each row of states has its own scale, so that rows of a batch do not affect each other."""
    packed, bits = _packed_in_8_bits(weight), _state_bits()
    steps, zero = (2**bits - 1, 0) if positive else (2 ** (bits - 1) - 1, 2 ** (bits - 1))

    def linear(x: torch.Tensor) -> torch.Tensor:
        # FBGEMM has one scale for all states, so scale each row to [-1, 1] before the product, and back after it.
        sizes = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
        x = torch.addcmul(bias, _int8_product(x / sizes, 1 / steps, zero, packed), sizes)
        return x.relu_() if relu else x

    return linear


def _packed_in_8_bits(weight: torch.Tensor) -> Any:
    """Packs the weights `[out, in]` for FBGEMM."""
    with warnings.catch_warnings(), _packing_by_fbgemm():
        warnings.filterwarnings("ignore", message=".*are deprecated and will be removed")
        scales = _scales(weight).double()
        quantized = torch.quantize_per_channel(
            weight, scales, torch.zeros_like(scales, dtype=torch.long), 0, torch.qint8
        )
        return torch.ops.quantized.linear_prepack(quantized, None)


# Arguments: states, their scale and zero point, packed weights.
_int8_product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32


@cache
def _state_bits() -> int:
    """
    The number of bits that states may have so that sums are exact: 8, or 7 if FBGEMM adds two products in 16 bits
    (without VNNI), because 2 * 255 * 127 does not fit. This is tested by such a sum, because the instructions that
    FBGEMM uses may be limited by its settings.
    """
    inputs = 64
    ones = torch.ones(1, inputs, dtype=torch.float32, device="cpu")
    found = _int8_product(ones, 1 / 255, 0, _packed_in_8_bits(ones))
    return 8 if abs(float(found) - inputs) < 0.01 else 7


@contextmanager
def _packing_by_fbgemm() -> Iterator[None]:
    """Selects FBGEMM, which is a setting of the whole process, and restores the previous library afterwards."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def resolve_compute_type(compute_type: str | None, model: PreTrainedModel) -> str:
    """
    The type to compute in: the given one, else autocast's dtype under autocast, else the model's dtype.

    Raises:
        ValueError: `compute_type` is unknown.
    """
    device = model.device.type
    if compute_type is None:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
        if device == "cpu" and dtype == torch.float16:
            dtype = torch.float32  # few CPUs compute in float16
        return str(dtype).removeprefix("torch.")
    if compute_type not in COMPUTE_TYPES:
        raise ValueError(f"compute_type={compute_type!r} is unknown: choose one of {', '.join(COMPUTE_TYPES)}")
    return compute_type

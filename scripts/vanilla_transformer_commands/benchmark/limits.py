"""The machine's limits: its measured rates, and the operations and bytes that the work needs at least."""

from functools import partial
from typing import Any

import torch

from vanilla_transformer.engine_products import pack_linear
from vanilla_transformer.network_operations import linear
from vanilla_transformer.training.machine import fastest, read_rate

from .contenders import TYPES
from .meters import clock


MATMUL_SECONDS = 0.5


def matmul_rate(dtype: str) -> float:
    """Floating-point operations per second of a large matrix product, measured now."""
    size, device = (8192, "cuda") if torch.cuda.is_available() else (2048, "cpu")
    a, b = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
    linear(a, b)
    count, started = 0, clock()
    while (seconds := clock() - started) < MATMUL_SECONDS or not count:
        linear(a, b)
        count += 1
    return count * 2 * size**3 / seconds


def training_flops(config: Any, lengths: list[tuple[int, int]]) -> float:
    """
    Floating-point operations of the matrix products in one update: two for each weight and each token that it is
    multiplied by, and those of the attention, once forward and twice backward. Work on padding is not counted.

    Args:
        config: ours or Marian's.
        lengths: tokens of each row's source and target.
    """
    d, flops = config.d_model, 0
    for source, target in lengths:
        encoder = source * (8 * d**2 + 4 * d * config.encoder_ffn_dim) + 4 * d * source**2
        decoder = target * (12 * d**2 + 4 * d * config.decoder_ffn_dim) + 4 * d * target**2
        across = source * 4 * d**2 + 4 * d * source * target
        output = 2 * target * d * config.decoder_vocab_size
        flops += config.encoder_layers * encoder + config.decoder_layers * (decoder + across) + output
    return 3.0 * flops


def measure_limits(types: set[str]) -> dict[str, float]:
    """The rates of all threads, measured now: bytes per second of memory, operations per second of products by type."""
    size = 2048
    states, weight, bias = torch.randn(size, size), torch.randn(size, size), torch.zeros(size)
    rates = {}
    for name in {*types, "float32"}:
        product = pack_linear(weight, bias, name)
        rates[name] = 2 * size**3 / fastest(partial(product, states), MATMUL_SECONDS)
    # If torch has no fast product in a narrow type, its limit is at least float32's rate.
    return {"bytes": read_rate(), **{name: max(rate, rates["float32"]) for name, rate in rates.items()}}


def least_seconds(model: Any, task: dict[str, Any], lengths: list[int], dtype: str, limits: dict[str, float]) -> float:
    """
    The least time in seconds that the task takes on a machine with these limits. Weights are read once for the sources
    of a batch and once for each step, and multiplied by all rows of states; the slower of both counts.

    Args:
        model: ours. Attention and caches are ignored.
        task: the sentences, and the batch size.
        lengths: tokens of each output. Finished sentences need no operations.
        dtype: the type of the products.
        limits: the result of `measure_limits`.
    """
    once, step = count_weights(model)
    size, rate = TYPES[dtype]

    def seconds(weights: int, rows: int) -> float:
        return max(weights * size / limits["bytes"], 2 * weights * rows / limits[rate])

    total = 0.0
    for first in range(0, len(lengths), task["batch"]):
        sources, outputs = (rows[first : first + task["batch"]] for rows in (task["sources"], lengths))
        total += seconds(once, sum(map(len, sources)))
        for done in range(max(outputs)):
            total += seconds(step, task["beams"] * sum(length > done for length in outputs))
    return total


def count_weights(model: Any) -> tuple[int, int]:
    """The number of weights that the sources of a batch are multiplied by, and the number of those of a step."""
    sizes = [0, model.lm_head.weight.numel()]
    for name, weight in model.model.named_parameters():
        if ".layers." in name and weight.dim() == 2:
            of_sources = name.startswith("encoder.") or "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
            sizes[not of_sources] += weight.numel()
    return sizes[0], sizes[1]

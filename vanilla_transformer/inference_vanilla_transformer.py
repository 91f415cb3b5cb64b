"""The network without what only training needs: packed weights, and one decoding step for all beams of a batch at once.

`PackedTransformer` computes what the modules of the modeling file compute, from the same weights, faster:

- the projections of queries, keys and values are one product; 1 / sqrt(d_k) is part of the weights;
- on a CPU, weights are laid out once as oneDNN (float32, bfloat16) or FBGEMM (int8) read them;
- the beams of a sentence share its cross-attention keys and values: their queries attend together, and nothing of the
  source is ever copied for a beam;
- the beams' own keys and values are never reordered: see `TargetCache`.

Sizes in the comments: B sentences, W beams (or samples) of each, S source tokens, N cached target tokens, H heads.
"""

import os
import platform
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .loading_vanilla_transformer import refuse_lost_weights
from .operations_vanilla_transformer import FEW_PRODUCTS, Dropout, Linear


logger = logging.get_logger(__name__)

COMPUTE_TYPES = ("float32", "bfloat16", "int8")
# A product over fewer is not faster in int8, whose states must be rounded first and whose sums must be scaled.
FEW_INPUTS = 512

# What holds weights. A layer that something has wrapped (LoRA, quantisation, parallelism) is of another class.
_PLAIN = (nn.Linear, Linear, nn.Embedding, nn.LayerNorm)
_PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_Linear = Callable[[torch.Tensor], torch.Tensor]


def pack_linear(
    weight: torch.Tensor, bias: torch.Tensor, compute_type: str, relu: bool = False, positive: bool = False
) -> _Linear:
    """
    x W^T + b, of float32 states into float32 states, with the weights rounded to `compute_type`.

    Args:
        weight: `[out, in]`. bias: `[out]`.
        compute_type: "float32"; "bfloat16", with sums in float32; or "int8": weights have 8 bits and a scale for each
            output, states have 7 or 8 bits and a scale for each row, and sums are exact integers. Matrices with fewer
            than `FEW_INPUTS` inputs stay float32. Where `is_native` says no, the rounded weights are multiplied in
            float32.
        relu: whether max(0, .) follows.
        positive: whether no state is below 0; int8 then rounds them twice as finely.
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
    """Whether this machine has instructions for products in this type: without them, float32 is fastest."""
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
    # oneDNN computes bfloat16 on any AVX-512, but by float32. The capability is what ATEN_CPU_CAPABILITY leaves.
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def _rounded(weight: torch.Tensor, compute_type: str) -> torch.Tensor:
    """The float32 weights with the precision of another type."""
    if compute_type == "int8":
        scales = _scales(weight)[:, None]
        return (weight / scales).round_().mul_(scales)
    return weight.to(getattr(torch, compute_type)).float()


def _scales(weight: torch.Tensor) -> torch.Tensor:
    """What a step of 8 bits is worth for each output, `[out]`."""
    return weight.abs().amax(dim=1).clamp(min=1e-12) / 127


def _float32_linear(weight: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, relu: bool) -> _Linear:
    """By oneDNN; where there is little to multiply, without its overhead."""
    product, after = torch.ops.mkldnn._linear_pointwise.default, "relu" if relu else "none"
    # A small matrix stays in the cache of a core, where the plain product reads it.
    products = 8 * FEW_PRODUCTS if weight.numel() <= FEW_PRODUCTS // 2 else FEW_PRODUCTS
    few = products // len(weight)
    if few < weight.shape[1]:
        return lambda x: product(x, packed, bias, after, [], "")

    def linear(x: torch.Tensor) -> torch.Tensor:
        if x.numel() > few:
            return product(x, packed, bias, after, [], "")
        return F.linear(x, weight, bias).relu_() if relu else F.linear(x, weight, bias)

    return linear


def _plain_linear(weight: torch.Tensor, bias: torch.Tensor, compute_type: str, relu: bool) -> _Linear:
    dtype = getattr(torch, compute_type)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if relu:
        return lambda x: F.linear(x.to(dtype), weight, bias).relu_().float()
    return lambda x: F.linear(x.to(dtype), weight, bias).float()


def _int8_linear(weight: torch.Tensor, bias: torch.Tensor, relu: bool, positive: bool) -> _Linear:
    """By FBGEMM, each row of states with a scale of its own, so that no row depends on the others of a call."""
    packed, bits = _packed_in_8_bits(weight), _state_bits()
    steps, zero = (2**bits - 1, 0) if positive else (2 ** (bits - 1) - 1, 2 ** (bits - 1))

    def linear(x: torch.Tensor) -> torch.Tensor:
        # The product rounds all states alike: rows are brought to [-1, 1] before it, and back after it.
        sizes = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
        x = torch.addcmul(bias, _int8_product(x / sizes, 1 / steps, zero, packed), sizes)
        return x.relu_() if relu else x

    return linear


def _packed_in_8_bits(weight: torch.Tensor) -> Any:
    """The weights `[out, in]` as FBGEMM reads them."""
    with warnings.catch_warnings(), _packing_by_fbgemm():
        warnings.filterwarnings("ignore", message=".*are deprecated and will be removed")
        scales = _scales(weight).double()
        quantized = torch.quantize_per_channel(
            weight, scales, torch.zeros_like(scales, dtype=torch.long), 0, torch.qint8
        )
        return torch.ops.quantized.linear_prepack(quantized, None)


# Of states, their scale and zero point, and packed weights.
_int8_product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32


@cache
def _state_bits() -> int:
    """
    How many bits states may have so that sums are exact: 8, or 7 where FBGEMM adds two products in 16 bits (without
    VNNI), which 2 * 255 * 127 does not fit into. Found by such a sum, so that instructions hidden from FBGEMM count.
    """
    inputs = 64
    ones = torch.ones(1, inputs, dtype=torch.float32, device="cpu")
    found = _int8_product(ones, 1 / 255, 0, _packed_in_8_bits(ones))
    return 8 if abs(float(found) - inputs) < 0.01 else 7


@contextmanager
def _packing_by_fbgemm() -> Iterator[None]:
    """Which library packs quantised weights is one setting for the process: it is put back."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    softmax(Q K^T + mask) V, Q being scaled already (Vaswani et al., 2017, equation 1), with every head a row.

    Args:
        query: `[B * H, W, d_k]`. key: `[B * H, N, d_k]`. value: `[B * H, N, d_v]`.
        mask: 0 where a query may look and -inf where not, `[B * H, W or 1, N]`; None: everywhere.

    Returns:
        The attended values `[B * H, W, d_v]` and the weights `[B * H, W, N]`.
    """
    key = key.transpose(1, 2)
    scores = torch.bmm(query, key) if mask is None else torch.baddbmm(mask, query, key)
    weights = scores.softmax(dim=-1)
    return torch.bmm(weights, value), weights


def rows_of(sentences: torch.Tensor, count: int) -> torch.Tensor:
    """The rows of these sentences, `[n]`, where each has `count` rows, one after the other: `[n * count]`."""
    return (sentences[:, None] * count + torch.arange(count, device=sentences.device)).flatten()


class TargetCache:
    """
    The keys and values of what has been decoded, for all hypotheses of a sentence in one row.

    Every step appends a column for each hypothesis. Which columns a hypothesis may look at, its own ancestors, is told
    by a mask; when beams move, only the mask moves. Columns that no living hypothesis descends from are dropped when
    the buffers are full, so that they hold little more than the distinct histories (beams share most of theirs) and
    grow rarely. Without a mask every hypothesis has a row of its own (greedy search and sampling).

    Args:
        layers: number of decoder layers. rows: B, or hypotheses when each has its own row. heads: H.
        d_k, d_v: widths of a head. dtype: of keys and values.
        masked: whether rows hold several hypotheses, or prefixes that are padded.
    """

    CAPACITY = 32

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        d_k: int,
        d_v: int,
        masked: bool,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.heads = heads
        self.length = 0
        self.keys = [torch.empty(rows, heads, 0, d_k, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.empty(rows, heads, 0, d_v, device=device, dtype=dtype) for _ in range(layers)]
        self.mask = torch.empty(rows, 1, 0, device=device, dtype=torch.float32) if masked else None  # [B, W, N]

    def make_room(self, width: int) -> None:
        """Before each step: opens a column for each of a row's `width` hypotheses."""
        if self.length + width > self.keys[0].shape[2]:
            self._make_buffers(self._living_columns(), width)
        if self.mask is not None:
            rows, width, _ = self.mask.shape
            # A new column is seen by the hypothesis that it belongs to.
            own = self.mask.new_full((width, width), float("-inf")).fill_diagonal_(0.0)
            self.mask = torch.cat([self.mask, own.expand(rows, width, width)], dim=2)
        self.length += width

    def _living_columns(self) -> torch.Tensor:
        """Those that some hypothesis looks at, in order, `[B, most of a row]`; rows with fewer are filled up."""
        rows = len(self.keys[0])
        if self.mask is None:
            return torch.arange(self.length, device=self.keys[0].device).expand(rows, -1)
        living = (self.mask == 0).any(dim=1)  # [B, N]
        most = int(living.sum(dim=1).max())
        return living.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]

    def _make_buffers(self, columns: torch.Tensor, width: int) -> None:
        """New buffers that begin with these columns `[B, n]`, with room for as many again by half, or for 8 steps."""
        rows, length = columns.shape
        capacity = max(self.CAPACITY, length + max(length // 2, 8 * width))
        index = nn.functional.pad(columns, (0, capacity - length))[:, None]  # [B, 1, capacity]
        # As rows of the buffers seen as [B * H * capacity, d]: those are copied whole.
        firsts = torch.arange(rows * self.heads, device=columns.device).view(rows, self.heads, 1)
        index = (firsts * self.keys[0].shape[2] + index).flatten()

        def taken(states: torch.Tensor) -> torch.Tensor:
            if not self.length:
                return states.new_empty(rows, self.heads, capacity, states.shape[3])
            return states.flatten(0, 2).index_select(0, index).view(rows, self.heads, capacity, -1)

        self.keys, self.values = [taken(keys) for keys in self.keys], [taken(values) for values in self.values]
        if self.mask is not None:
            self.mask = self.mask.take_along_dim(columns[:, None], dim=2)
        self.length = length

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This step's `[B, W, H, d]` into the columns opened for it -> all so far, `[B * H, N, d]`."""
        return self._append(self.keys[layer], key), self._append(self.values[layer], value)

    def _append(self, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        width = new.shape[1]
        states.narrow(2, self.length - width, width).copy_(new.transpose(1, 2))
        return states.flatten(0, 1).narrow(1, 0, self.length)

    def mask_for_heads(self) -> torch.Tensor | None:
        """The mask for `attend`, `[B * H, W, N]`."""
        if self.mask is None:
            return None
        rows, width, length = self.mask.shape
        mask = self.mask.to(self.keys[0].dtype)
        return mask[:, None].expand(rows, self.heads, width, length).reshape(rows * self.heads, width, length)

    def hide_last(self, rows: torch.Tensor) -> None:
        """Nobody will look at the last column of these rows (`[B]`, true or false): it is padding."""
        assert self.mask is not None
        self.mask[:, :, -1].masked_fill_(rows[:, None], float("-inf"))

    def move_beams(self, parents: torch.Tensor) -> None:
        """Each hypothesis becomes a child of the one that `parents` `[B, W]` names."""
        assert self.mask is not None
        self.mask = self.mask.take_along_dim(parents[:, :, None], dim=1)

    def keep(self, rows: torch.Tensor) -> None:
        """Drops the rows that are not named."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.mask = None if self.mask is None else self.mask[rows]


class DecoderState:
    """
    What the decoder knows of a batch between two steps.

    Args:
        cross: keys and values of the source in each layer, `[B * H, S, d]`.
        source_mask: for `attend`, `[B * H, 1, S]`; None where no source is padded.
        target: the cache of the target.
        sentences: B.
    """

    def __init__(
        self,
        cross: list[tuple[torch.Tensor, torch.Tensor]],
        source_mask: torch.Tensor | None,
        target: TargetCache,
        sentences: int,
    ):
        self.cross = cross
        self.source_mask = source_mask
        self.target = target
        self.sentences = sentences
        # Where the next token of each sentence stands, [B, 1]: only padded prefixes make sentences differ.
        self.position: int | torch.Tensor = 0

    def keep(self, sentences: torch.Tensor) -> None:
        """Finished sentences leave: drops all but those named by their row."""

        def kept(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(0, (self.sentences, -1))[sentences].flatten(0, 1)

        self.cross = [(kept(keys), kept(values)) for keys, values in self.cross]
        self.source_mask = None if self.source_mask is None else kept(self.source_mask)
        self.target.keep(rows_of(sentences, self.target.keys[0].shape[0] // self.sentences))
        if isinstance(self.position, torch.Tensor):
            self.position = self.position[sentences]
        self.sentences = len(sentences)


class _Layer:
    """What encoder and decoder layers have in common: self-attention, feed-forward network, residual connections."""

    def __init__(self, layer: Any, compute_type: str):
        self.normalize_before = layer.normalize_before
        self_attn = layer.self_attn
        self.d_k, self.d_v = self_attn.d_k, self_attn.d_v
        self.heads = self_attn.q_proj.out_features // self.d_k
        self.qkv = _packed_together(
            [scaled_query(self_attn), weight_and_bias(self_attn.k_proj), weight_and_bias(self_attn.v_proj)],
            compute_type,
        )
        self.out = pack_linear(*weight_and_bias(self_attn.out_proj), compute_type)
        self.self_norm = _norm(layer.self_attn_layer_norm)
        fused = type(layer.activation_fn) is nn.ReLU
        self.activation = None if fused else layer.activation_fn
        self.fc1 = pack_linear(*weight_and_bias(layer.fc1), compute_type, relu=fused)
        self.fc2 = pack_linear(*weight_and_bias(layer.fc2), compute_type, positive=fused)
        self.final_norm = _norm(layer.final_layer_norm)

    def residual(self, x: torch.Tensor, norm: _Linear, sublayer: _Linear) -> torch.Tensor:
        if self.normalize_before:
            return sublayer(norm(x)).add_(x)
        return norm(sublayer(x).add_(x))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden if self.activation is None else self.activation(hidden))

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys `[B, L, H, d_k]`, values `[B, L, H, d_v]` of `[B, L, d_model]`."""
        rows, length, _ = x.shape
        queries = self.heads * self.d_k
        query, key, value = self.qkv(x).split_with_sizes((queries, queries, self.heads * self.d_v), dim=-1)
        return (
            query.view(rows, length, self.heads, self.d_k),
            key.view(rows, length, self.heads, self.d_k),
            value.view(rows, length, self.heads, self.d_v),
        )


class _EncoderLayer(_Layer):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`[B, S, d_model]` -> the same; `mask` for `scaled_dot_product_attention`."""

        def self_attention(x: torch.Tensor) -> torch.Tensor:
            query, key, value = (states.transpose(1, 2) for states in self.split(x))  # [B, H, S, d]
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
            return self.out(context.transpose(1, 2).flatten(2))

        x = self.residual(x, self.self_norm, self_attention)
        return self.residual(x, self.final_norm, self.feed_forward)


class _DecoderLayer(_Layer):
    def __init__(self, layer: Any, compute_type: str):
        super().__init__(layer, compute_type)
        encoder_attn = layer.encoder_attn
        self.cross_query = pack_linear(*scaled_query(encoder_attn), compute_type)
        self.cross_out = pack_linear(*weight_and_bias(encoder_attn.out_proj), compute_type)
        self.cross_norm = _norm(layer.encoder_attn_layer_norm)

    def forward(
        self,
        x: torch.Tensor,
        index: int,
        state: DecoderState,
        mask: torch.Tensor | None,
        record: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """`[B, W, d_model]` -> the same. Cross-attention weights `[B, H, W, S]` are appended to `record`, if given."""
        beams = x.shape[:2]

        def self_attention(x: torch.Tensor) -> torch.Tensor:
            query, key, value = self.split(x.view(*rows, -1))
            keys, values = state.target.append(index, key, value)
            context, _ = attend(self._rows_of_heads(query, keys), keys, values, mask)
            return self.out(self._concatenated(context, rows)).view(*beams, -1)

        def cross_attention(x: torch.Tensor) -> torch.Tensor:
            keys, values = state.cross[index]
            query = self._rows_of_heads(self.cross_query(x).view(*beams, self.heads, self.d_k), keys)
            context, weights = attend(query, keys, values, state.source_mask)
            if record is not None:
                record.append(weights.float().unflatten(0, (-1, self.heads)))
            return self.cross_out(self._concatenated(context, beams))

        # Of the cache's rows: [B, W], or [B * W, 1] where every hypothesis has a row of its own.
        rows = (state.target.keys[0].shape[0], x.shape[0] * x.shape[1] // state.target.keys[0].shape[0])
        x = self.residual(x, self.self_norm, self_attention)
        x = self.residual(x, self.cross_norm, cross_attention)
        return self.residual(x, self.final_norm, self.feed_forward)

    def _rows_of_heads(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """`[B, W, H, d_k]` -> `[B * H, W, d_k]`, in the dtype of the keys."""
        query = query.transpose(1, 2).reshape(-1, query.shape[1], self.d_k)
        return query if query.dtype == keys.dtype else query.to(keys.dtype)

    def _concatenated(self, context: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """`[B * H, W, d_v]` -> `[B, W, H * d_v]`, in float32."""
        context = context.view(rows[0], self.heads, rows[1], self.d_v).transpose(1, 2)
        context = context.reshape(rows[0], rows[1], self.heads * self.d_v)
        return context if context.dtype == torch.float32 else context.float()


class PositionTable:
    """The encodings of a stack's positions in float32, made for more at a time than are needed."""

    def __init__(self, stack: Any):
        self.stack = stack
        self.table = stack.embed_tokens.weight.new_empty(0, stack.config.d_model, dtype=torch.float32)

    def upto(self, last: int) -> torch.Tensor:
        """`[L, d_model]` with L above `last`."""
        table = self.table  # read once: another thread may replace it by a shorter one
        if last >= len(table):
            longest, config = max(64, 2 * last), self.stack.config
            if config.position_embedding_type == "learned":
                longest = max(last + 1, min(longest, config.max_position_embeddings))
            ids = torch.arange(longest, device=self.stack.embed_tokens.weight.device)[None]
            table = self.stack.embed_positions(ids, torch.float32)[0].contiguous()
            self.table = table
        return table


class PackedTransformer:
    """
    A model's weights laid out for decoding, and its computation on them. Products with weights are computed in
    `compute_type`, states are float32 between them. Caches are float32 on a CPU, elsewhere 16 bits if the products are.

    Args:
        model: a `VanillaTransformerForConditionalGeneration`.
        compute_type: see `pack_linear`.
    """

    def __init__(self, model: Any, compute_type: str):
        encoder, decoder = model.model.encoder, model.model.decoder
        self.config = model.config
        self.compute_type = compute_type
        self.device = model.lm_head.weight.device
        sixteen = self.device.type != "cpu" and compute_type != "int8"
        self.cache_dtype = getattr(torch, compute_type) if sixteen else torch.float32
        if not is_native(compute_type, self.device):
            logger.warning_once(
                f"compute_type={compute_type!r} brings no speed here: torch has no {compute_type} products for this "
                f"{self.device.type}. The weights are rounded to {compute_type} and multiplied in float32."
            )
        self.encoder, self.decoder = encoder, decoder
        self.encoder_layers = [_EncoderLayer(layer, compute_type) for layer in encoder.layers]
        self.decoder_layers = [_DecoderLayer(layer, compute_type) for layer in decoder.layers]
        self.encoder_norm, self.decoder_norm = _norm(encoder.layer_norm), _norm(decoder.layer_norm)
        # Keys and values of the source for all layers in one product.
        cross = [(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in decoder.layers]
        self.read_source = _packed_together([weight_and_bias(each) for pair in cross for each in pair], compute_type)
        self.project = pack_linear(*weight_and_bias(model.lm_head), compute_type)
        self.encoder_positions, self.decoder_positions = PositionTable(encoder), PositionTable(decoder)

    def encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Source `[B, S]` and its mask, 1 for tokens -> `[B, S, d_model]`."""
        if attention_mask is None:
            position_ids, mask = torch.arange(input_ids.shape[1], device=self.device), None
        else:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # [B, S]
            mask = attention_mask.bool()[:, None, None]  # [B, 1, 1, S]
        # Padding may be longer than learned positions are.
        positions = self.encoder_positions.upto(int(position_ids.max()))[position_ids]
        x = self._embedded(self.encoder, input_ids, positions)
        for layer in self.encoder_layers:
            x = layer.forward(x, mask)
        return self.encoder_norm(x)

    def start(
        self, memory: torch.Tensor, attention_mask: torch.Tensor | None, width: int, beams: bool, padded: bool
    ) -> DecoderState:
        """
        The state before the first step.

        Args:
            memory: the encoder's output, `[B, S, d_model]`. attention_mask: `[B, S]`, or None without padding.
            width: hypotheses of a sentence. beams: whether they descend from one another.
            padded: whether target prefixes are padded.
        """
        sentences, layer = len(memory), self.decoder_layers[0]
        source_mask = None
        if attention_mask is not None and not attention_mask.all():
            source_mask = torch.zeros(attention_mask.shape, device=self.device, dtype=self.cache_dtype)
            source_mask = source_mask.masked_fill_(attention_mask == 0, float("-inf"))
            source_mask = source_mask.repeat_interleave(layer.heads, dim=0)[:, None]
        widths = [layer.heads * layer.d_k, layer.heads * layer.d_v] * len(self.decoder_layers)
        states = [
            part.unflatten(-1, (layer.heads, -1)).transpose(1, 2).flatten(0, 1)  # [B * H, S, d]
            for part in self.read_source(memory.float()).to(self.cache_dtype).split(widths, dim=-1)
        ]
        cross = list(zip(states[::2], states[1::2], strict=True))
        rows = sentences if beams else sentences * width
        sizes = (len(self.decoder_layers), rows, layer.heads, layer.d_k, layer.d_v)
        target = TargetCache(*sizes, beams or padded, self.device, self.cache_dtype)
        return DecoderState(cross, source_mask, target, sentences)

    def step(
        self, tokens: torch.Tensor, state: DecoderState, record: list[torch.Tensor] | None = None, logits: bool = True
    ) -> torch.Tensor:
        """
        The next token of every hypothesis, `[B, W]` -> logits of what follows, `[B, W, V]`, in float32.

        Args:
            record: receives the last layer's cross-attention weights, `[B, H, W, S]`.
            logits: False spares the output projection (for all tokens of a prefix but the last).
        """
        position = state.position
        last = position if isinstance(position, int) else int(position.max())
        positions = self.decoder_positions.upto(last)[position]  # [d_model], or [B, 1, d_model]
        state.position = position + 1
        x = self._embedded(self.decoder, tokens, positions)
        state.target.make_room(tokens.numel() // state.target.keys[0].shape[0])
        mask = state.target.mask_for_heads()
        last = len(self.decoder_layers) - 1
        for index, layer in enumerate(self.decoder_layers):
            x = layer.forward(x, index, state, mask, record if index == last else None)
        return self.project(self.decoder_norm(x)) if logits else x

    def _embedded(self, stack: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[B, L]` and encodings of their positions, `[..., d_model]` -> `[B, L, d_model]`."""
        return F.embedding(ids, stack.embed_tokens.weight).float() * stack.embed_scale + positions


def weight_and_bias(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    return linear.weight.detach(), linear.bias.detach()


def scaled_query(attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The projection of queries, with 1 / sqrt(d_k) in it."""
    weight, bias = weight_and_bias(attention.q_proj)
    return weight * attention.scaling, bias * attention.scaling


def _packed_together(parameters: Iterable[tuple[torch.Tensor, torch.Tensor]], compute_type: str) -> _Linear:
    weights, biases = zip(*parameters, strict=True)
    return pack_linear(torch.cat(weights), torch.cat(biases), compute_type)


def _norm(norm: nn.Module) -> _Linear:
    if isinstance(norm, nn.Identity):
        return lambda x: x
    assert isinstance(norm, nn.LayerNorm)
    shape, eps = list(norm.normalized_shape), norm.eps
    weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


class Inspected(NamedTuple):
    """What a model is made of, as `inspect_model` finds it."""

    parameters: list[torch.Tensor]  # tied ones as often as they are used
    kinds: list[type]  # the classes of all modules
    unknown: str | None = None  # what the engines do not know, in words


class _Copy:
    """What was made of a model, and what tells whether that has changed since."""

    def __init__(self, made: Any, found: Inspected):
        self.made = made
        self.kinds = found.kinds
        self.versions = self._versions(found)
        # Views: they change with the weights.
        self.last = [parameter.detach()[(-1,) * parameter.dim()] for parameter in found.parameters]
        self.last_values = torch.stack(self.last)

    def is_of(self, found: Inspected) -> bool:
        """By torch's count of changes, and for what avoids it by the last value of each weight."""
        if self.kinds != found.kinds or self.versions != self._versions(found):
            return False
        return torch.equal(torch.stack(self.last), self.last_values)

    @staticmethod
    def _versions(found: Inspected) -> list[tuple[int, int]]:
        try:
            return [(parameter.data_ptr(), parameter._version) for parameter in found.parameters]
        except RuntimeError:  # made in inference mode, where torch counts no changes
            return [(parameter.data_ptr(), 0) for parameter in found.parameters]


_COPIES: WeakKeyDictionary[PreTrainedModel, dict[Any, _Copy]] = WeakKeyDictionary()
# One thread packs, and the others wait for what it makes.
_packing = threading.Lock()


def _renew_lock() -> None:
    global _packing
    _packing = threading.Lock()


# A thread that packs is not in the child of a fork, and would never release the lock there.
if os.name == "posix":
    os.register_at_fork(after_in_child=_renew_lock)


def copy_of(model: PreTrainedModel, found: Inspected, make: Callable, *arguments: Any) -> Any:
    """
    `make(model, *arguments)`, made at the first use and again after the model has changed. Threads may call it.

    Args:
        found: of `inspect_model`.
        make: a class of packed weights, such as `PackedTransformer`.

    Raises:
        ValueError: there are weights that are no finite numbers.
    """
    copies, kind = _COPIES.setdefault(model, {}), (make, *arguments)
    # Read once: another thread may take it out.
    copy = copies.get(kind)
    if copy is None or not copy.is_of(found):
        with _packing:
            copy = copies.get(kind)
            if copy is None or not copy.is_of(found):
                copies.pop(kind, None)
                refuse_lost_weights(model)
                copies[kind] = copy = _Copy(make(model, *arguments), found)
    return copy.made


# The methods that decide what a module computes, and those that transformers' loops call of a model.
_COMPUTING = ("__call__", "forward", "residual", "feed_forward", "embed", "_split_heads", "_keys_and_values")
_LOOPING = (*(name for name, method in vars(GenerationMixin).items() if callable(method)), "_reorder_cache")
# Functions around `forward` that compute nothing, by their module: accelerate's, which cast the inputs and outputs of a
# model in training, and that of gradient checkpointing.
_WRAPPERS = ("accelerate.utils.operations", "torch.amp.autocast_mode", "transformers.modeling_layers")
# The hooks that transformers leaves in a model that was once asked for its attention weights do nothing here.
_CAPTURING = "transformers.utils.output_capturing"

# For each class that the engines know, its methods as they were then.
_KNOWN: dict[type, dict[str, Any]] = {}


def know(*classes: type) -> None:
    """The engines compute what modules of these classes do, and of subclasses, with the methods of this moment."""
    for each in classes:
        names = [name for name in _COMPUTING if hasattr(each, name)]
        if issubclass(each, GenerationMixin):
            names += [name for name in _LOOPING if name != "generate"]
        _KNOWN[each] = {name: getattr(each, name, None) for name in names}


# They compute the same in training mode, in which new ones are.
_WITHOUT_MODE = {*_PLAIN, nn.Identity, nn.ModuleList}
_WITHOUT_MODE |= {each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()}
know(*_WITHOUT_MODE, nn.Dropout, Dropout)


def _known_methods(kind: type) -> dict[str, Any] | None:
    return next((_KNOWN[base] for base in kind.__mro__ if base in _KNOWN), None)


def _unwrapped(method: Any) -> Any:
    """The function that a method calls in the end."""
    while True:
        method = getattr(method, "__func__", method)
        home = getattr(method, "__globals__", {}).get("__name__") or type(method).__module__
        if home not in _WRAPPERS:
            return method
        method = method.__wrapped__


def _why_unknown_class(kind: type) -> str | None:
    """Which of its methods is not known, in words; None if all are."""
    known = _known_methods(kind)
    if known is None:
        return f"the class {kind.__module__}.{kind.__qualname__}"
    for name, method in known.items():
        found = getattr(kind, name, None)
        if found is not method and _unwrapped(found) is not _unwrapped(method):
            return f"{kind.__name__}.{name}, which is not this package's own"
    return None


def _why_unknown_module(module: nn.Module) -> str | None:
    """What a module of a known class does otherwise than others of its class, in words; None if nothing."""
    if module.training and type(module) not in _WITHOUT_MODE:
        return "training mode"
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks):
        return "a hook"
    for name, method in (_known_methods(type(module)) or {}).items():
        if name in module.__dict__ and _unwrapped(module.__dict__[name]) is not _unwrapped(method):
            return f"a {name} of its own"
    return None


def is_unchanged(module: nn.Module) -> bool:
    """Whether its class alone decides what a module computes: there is no hook, and no `forward` of its own."""
    return not _hooks_on_all_modules() and _why_unknown_module(module) is None


def _hooks_on_all_modules() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def inspect_model(model: PreTrainedModel) -> Inspected:
    """
    Looks whether the engines compute what the model does: whether all modules are known, as `know` has it, nobody's
    hook wants them to be called, and all weights are torch's own, on one device, in one dtype that is packed.
    """
    positions = (model.model.encoder.embed_positions, model.model.decoder.embed_positions)
    parameters: list[Any] = []
    kinds: list[type] = []
    methods: dict[type, dict[str, Any]] = {}
    # torch's `modules()` takes three times as long, and this is done at each call of `generate()`.
    modules: list[nn.Module] = [model]
    for module in modules:
        if module is None:
            continue
        kind, state, why = type(module), module.__dict__, None
        if kind not in methods:
            methods[kind], why = _known_methods(kind) or {}, _why_unknown_class(kind)
        kinds.append(kind)
        # Most modules are leaves, which have one method.
        changed = "forward" in state or (state["_modules"] and not state.keys().isdisjoint(methods[kind]))
        if changed or state["training"] or state["_forward_hooks"] or state["_forward_pre_hooks"]:
            why = why or _why_unknown_module(module)
        if own := state["_parameters"]:
            parameters += own.values()
            if kind not in _PLAIN and module not in positions:
                why = why or f"the class {kind.__module__}.{kind.__qualname__}"
        if why:
            name = next(name for name, each in model.named_modules() if each is module)
            return Inspected(parameters, kinds, f"{why} ({name or 'the model'})")
        modules.extend(state["_modules"].values())
    return Inspected(parameters, kinds, _why_unknown_weights(parameters) or _why_unknown_setting(model))


def _why_unknown_weights(parameters: list[torch.Tensor]) -> str | None:
    kinds = set(map(type, parameters))
    if type(None) in kinds:
        return "a layer without bias"
    if kinds != {nn.Parameter}:
        return "weights that are no plain tensors"
    dtypes, devices = {each.dtype for each in parameters}, {each.device for each in parameters}
    if len(devices) > 1:
        return "weights on several devices"
    if len(dtypes) > 1:
        return "weights of several dtypes"
    return None if dtypes <= set(_PACKED_DTYPES) else f"weights in {dtypes.pop()}"


def _why_unknown_setting(model: PreTrainedModel) -> str | None:
    if _hooks_on_all_modules():
        return "a hook on all modules"
    name = model.config._attn_implementation
    attention: Any = ALL_ATTENTION_FUNCTIONS.get(name)  # none for "eager"
    attention = attention.func if isinstance(attention, partial) else attention
    if attention is not None and not attention.__module__.startswith("transformers."):
        return f"the attention implementation {name!r}"
    return None


def resolve_compute_type(compute_type: str | None, model: PreTrainedModel) -> str:
    """
    What to compute in: as asked for; under autocast, autocast's dtype; else the model's own.

    Raises:
        ValueError: there is no such type.
    """
    device = model.device.type
    if compute_type is None:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
        if device == "cpu" and dtype == torch.float16:
            dtype = torch.float32  # few CPUs compute in float16
        return str(dtype).removeprefix("torch.")
    if compute_type not in COMPUTE_TYPES:
        raise ValueError(
            f"compute_type={compute_type!r}: there is no such type; take one of {', '.join(COMPUTE_TYPES)}"
        )
    return compute_type

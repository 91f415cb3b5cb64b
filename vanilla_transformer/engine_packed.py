"""The network for inference only: packed weights, and decoding steps for all beams of a batch at once.

`PackedTransformer` computes the same as the modules of the modeling file, from the same weights, but faster:

- queries, keys and values are projected by one product; 1 / sqrt(d_k) is part of the weights;
- weights are packed once for the fastest product (`engine_products.py`);
- the beams of a sentence share its cross-attention keys and values: their queries attend together, and nothing of the
  source is copied per beam;
- the beams' own keys and values are never reordered (`engine_cache.py`).

Sizes in the comments: B sentences, W beams (or samples) of each, S source tokens, N cached target tokens, H heads.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .engine_cache import DecoderState, TargetCache
from .engine_products import Product, is_native, pack_linear


logger = logging.get_logger(__name__)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    softmax(Q K^T + mask) V with Q already scaled (Vaswani et al., 2017, equation 1). Each head is a row.

    Args:
        query: `[B * H, W, d_k]`. key: `[B * H, N, d_k]`. value: `[B * H, N, d_v]`.
        mask: 0 where a query may look and -inf elsewhere, `[B * H, W or 1, N]`. None: it may look everywhere.

    Returns:
        The attended values `[B * H, W, d_v]` and the weights `[B * H, W, N]`.
    """
    key = key.transpose(1, 2)
    scores = torch.bmm(query, key) if mask is None else torch.baddbmm(mask, query, key)
    weights = scores.softmax(dim=-1)
    return torch.bmm(weights, value), weights


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

    def residual(self, x: torch.Tensor, norm: Product, sublayer: Product) -> torch.Tensor:
        if self.normalize_before:
            return sublayer(norm(x)).add_(x)
        return norm(sublayer(x).add_(x))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden if self.activation is None else self.activation(hidden))

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[B, L, d_model]` -> queries and keys `[B, L, H, d_k]`, values `[B, L, H, d_v]`."""
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

        # [B, W], or [B * W, 1] if every hypothesis has its own row in the cache.
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
    """A stack's position encodings in float32. The table grows by more than is needed, so that it grows rarely."""

    def __init__(self, stack: Any):
        self.stack = stack
        self.table = stack.embed_tokens.weight.new_empty(0, stack.config.d_model, dtype=torch.float32)

    def upto(self, last: int) -> torch.Tensor:
        """`[L, d_model]` with L above `last`."""
        table = self.table  # read once: another thread may replace it with a shorter one
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
    A model's weights packed for decoding, and the computation on them. Products with weights are computed in
    `compute_type`; states between them are float32. Caches are float32 on a CPU. On other devices they have 16 bits if
    the products do.

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
                f"compute_type={compute_type!r} is not faster here: torch has no {compute_type} products for this "
                f"{self.device.type}. The weights are rounded to {compute_type} and multiplied in float32."
            )
        self.encoder, self.decoder = encoder, decoder
        self.encoder_layers = [_EncoderLayer(layer, compute_type) for layer in encoder.layers]
        self.decoder_layers = [_DecoderLayer(layer, compute_type) for layer in decoder.layers]
        self.encoder_norm, self.decoder_norm = _norm(encoder.layer_norm), _norm(decoder.layer_norm)
        # One product gives the source's keys and values for all layers.
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
        # Count positions without padding: a padded row may be longer than the table of learned positions.
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
            width: hypotheses per sentence. beams: whether one may continue another (beam search).
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
            logits: False skips the output projection (for all tokens of a prefix but the last).
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
        """Ids `[B, L]` and their position encodings `[..., d_model]` -> `[B, L, d_model]`."""
        return F.embedding(ids, stack.embed_tokens.weight).float() * stack.embed_scale + positions


def weight_and_bias(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    return linear.weight.detach(), linear.bias.detach()


def scaled_query(attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The query projection, multiplied by 1 / sqrt(d_k)."""
    weight, bias = weight_and_bias(attention.q_proj)
    return weight * attention.scaling, bias * attention.scaling


def _packed_together(parameters: Iterable[tuple[torch.Tensor, torch.Tensor]], compute_type: str) -> Product:
    weights, biases = zip(*parameters, strict=True)
    return pack_linear(torch.cat(weights), torch.cat(biases), compute_type)


def _norm(norm: nn.Module) -> Product:
    if isinstance(norm, nn.Identity):
        return lambda x: x
    assert isinstance(norm, nn.LayerNorm)
    shape, eps = list(norm.normalized_shape), norm.eps
    weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)

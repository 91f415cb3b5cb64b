"""The Transformer of "Attention Is All You Need" (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762).

The file reads in the order of the paper's section 3, from the smallest part up: attention (3.2), feed-forward network
(3.3), positions (3.5), layers and stacks (3.1, with the embeddings of 3.4), the model, and the model that predicts
the next token. Sizes in the comments:

    B sentences    S source tokens    T target tokens    L tokens of either
    H heads        d_k, d_v widths of a head's keys and values        d_model, d_ff, V vocabulary
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_vanilla_transformer import VanillaTransformerConfig
from .engine_eligibility import is_unchanged, know
from .generation_vanilla_transformer import VanillaTransformerGenerationMixin
from .loading import GuardedLoading
from .network_loss import (
    OutputWithoutLogits,
    decoder_inputs,
    label_smoothed_cross_entropy,
    projected_cross_entropy,
)
from .network_operations import Dropout, Linear, cast_once, fast_dropout
from .scoring import VanillaTransformerScoringMixin


def scaled_dot_product_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V  (section 3.2.1, equation 1).

    This is the "eager" member of transformers' attention interface; "sdpa", "flash_attention_2" and "flex_attention"
    compute the same without keeping the weights.

    Args:
        module: the attention that calls; its `training` flag switches the dropout.
        query: `[B, H, T, d_k]`. key: `[B, H, S, d_k]`. value: `[B, H, S, d_v]`.
        attention_mask: added to the scores, 0 where a query may look and the dtype's minimum where not.
        scaling: 1 / sqrt(d_k).
        dropout: rate on the attention weights.

    Returns:
        The attended values `[B, T, H, d_v]` and the weights `[B, H, T, S]`.
    """
    scores = query @ key.transpose(-2, -1) * scaling  # [B, H, T, S]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = fast_dropout(scores.softmax(dim=-1), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights  # [B, T, H, d_v]


class MultiHeadAttention(nn.Module):
    """
    MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O with head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V)
    (section 3.2.2). Queries come from `hidden_states`; keys and values too (self-attention), or from
    `key_value_states` (cross-attention, 3.2.3). The h projections of a kind are one matrix.

    Args:
        config: sizes and rates.
        num_heads: number of heads h.
        is_causal: whether position t sees only positions up to t (the decoder's self-attention).
        layer_idx: the layer's place in the decoder, which is its place in the cache.
    """

    def __init__(self, config: VanillaTransformerConfig, num_heads: int, is_causal: bool, layer_idx: int):
        super().__init__()
        self.config = config
        self.is_causal = is_causal
        self.layer_idx = layer_idx
        self.d_k = config.d_kv or config.d_model // num_heads
        self.d_v = config.d_v or config.d_model // num_heads
        self.scaling = self.d_k**-0.5
        self.q_proj = Linear(config.d_model, num_heads * self.d_k)
        self.k_proj = Linear(config.d_model, num_heads * self.d_k)
        self.v_proj = Linear(config.d_model, num_heads * self.d_v)
        self.out_proj = Linear(num_heads * self.d_v, config.d_model)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` `[B, T, d_model]`, `key_value_states` `[B, S, d_model]` -> `[B, T, d_model]`, weights."""
        query = self._split_heads(self.q_proj(hidden_states), self.d_k)  # [B, H, T, d_k]
        key, value = self._keys_and_values(hidden_states, key_value_states, past_key_values)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, scaled_dot_product_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        heads, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        concatenated = heads.reshape(*hidden_states.shape[:-1], -1)  # [B, T, H * d_v]
        return self.out_proj(concatenated), weights  # [B, T, d_model]

    def _split_heads(self, projected: torch.Tensor, width: int) -> torch.Tensor:
        # The number of heads is inferred, because under tensor parallelism each rank holds only some of them.
        return projected.view(*projected.shape[:-1], -1, width).transpose(1, 2)  # [B, H, L, width]

    def _keys_and_values(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None,
        past_key_values: EncoderDecoderCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `[B, H, S, d_k]` and values `[B, H, S, d_v]`, those in the cache included."""
        is_cross_attention = key_value_states is not None
        if past_key_values is None:
            cache = None
        elif is_cross_attention:
            cache = past_key_values.cross_attention_cache
            if past_key_values.is_updated.get(self.layer_idx):
                # The source does not change while the target grows.
                return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            cache = past_key_values.self_attention_cache

        states = key_value_states if is_cross_attention else hidden_states
        key = self._split_heads(self.k_proj(states), self.d_k)
        value = self._split_heads(self.v_proj(states), self.d_v)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            if is_cross_attention:
                past_key_values.is_updated[self.layer_idx] = True
        return key, value


class SinusoidalPositions(nn.Module):
    """
    PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos(pos / 10000^(2i / d_model))  (section 3.5).

    They are computed, not looked up: any length works, and no table is rounded when the model is cast to bfloat16.
    """

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__()
        self.d_model = config.d_model

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`position_ids` `[B, L]` -> `[B, L, d_model]` in `dtype`, computed in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        even = torch.arange(0, self.d_model, 2, device=position_ids.device, dtype=wide)  # 2i
        angles = position_ids[..., None].to(wide) * torch.pow(10000.0, -even / self.d_model)  # [B, L, d_model / 2]
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2).to(dtype)


class LearnedPositions(nn.Embedding):
    """One trained vector for each position (Table 3, row E)."""

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(config.max_position_embeddings, config.d_model)

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:  # type: ignore[override]
        """`position_ids` `[B, L]`, each below `max_position_embeddings` -> `[B, L, d_model]`."""
        # A compiled graph cannot inspect values. Otherwise this check is cheap, and clearer than a GPU's assertion.
        if not torch.compiler.is_compiling() and position_ids.max() >= self.num_embeddings:
            raise ValueError(
                f"position {position_ids.max()} has no learned embedding: the model was built with "
                f"max_position_embeddings={self.num_embeddings}; shorten the text"
            )
        return super().forward(position_ids).to(dtype)


class TransformerLayer(GradientCheckpointingLayer):
    """What encoder and decoder layers have in common: the residual connection and the feed-forward network."""

    def __init__(self, config: VanillaTransformerConfig, ffn_dim: int):
        super().__init__()
        self.normalize_before = config.normalize_before
        self.dropout = Dropout(config.dropout)
        self.activation_fn = ACT2FN[config.activation_function]
        self.activation_dropout = Dropout(config.activation_dropout)
        self.fc1 = Linear(config.d_model, ffn_dim)
        self.fc2 = Linear(ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def residual(self, x: torch.Tensor, norm: nn.LayerNorm, sublayer) -> torch.Tensor:
        """LayerNorm(x + Dropout(Sublayer(x))) (sections 3.1, 5.4), or pre-norm: x + Dropout(Sublayer(LayerNorm(x)))."""
        if self.normalize_before:
            return x + self.dropout(sublayer(cast_once(norm(x))))
        return norm(x + self.dropout(sublayer(cast_once(x))))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2  (section 3.3, equation 2), with the configured activation."""
        return self.fc2(self.activation_dropout(self.activation_fn(self.fc1(x))))  # [B, L, d_ff] inside


class EncoderLayer(TransformerLayer):
    """Self-attention, then the feed-forward network (section 3.1)."""

    def __init__(self, config: VanillaTransformerConfig, layer_idx: int):
        super().__init__(config, config.encoder_ffn_dim)
        self.self_attn = MultiHeadAttention(config, config.encoder_attention_heads, False, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`[B, S, d_model]` -> `[B, S, d_model]`."""

        # 1. self-attention over the source
        def self_attention(x):
            return self.self_attn(x, attention_mask=attention_mask, **kwargs)[0]

        hidden_states = self.residual(hidden_states, self.self_attn_layer_norm, self_attention)
        # 2. feed-forward network
        return self.residual(hidden_states, self.final_layer_norm, self.feed_forward)


class DecoderLayer(TransformerLayer):
    """Masked self-attention, attention to the encoder's output, then the feed-forward network (section 3.1)."""

    def __init__(self, config: VanillaTransformerConfig, layer_idx: int):
        super().__init__(config, config.decoder_ffn_dim)
        self.self_attn = MultiHeadAttention(config, config.decoder_attention_heads, True, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.encoder_attn = MultiHeadAttention(config, config.decoder_attention_heads, False, layer_idx)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`[B, T, d_model]` and the encoder's `[B, S, d_model]` -> `[B, T, d_model]`."""

        # 1. masked self-attention: position t sees positions up to t
        def self_attention(x):
            return self.self_attn(x, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)[0]

        # 2. cross-attention: queries from the decoder, keys and values from the encoder
        def cross_attention(x):
            return self.encoder_attn(
                x, encoder_hidden_states, encoder_attention_mask, past_key_values=past_key_values, **kwargs
            )[0]

        hidden_states = self.residual(hidden_states, self.self_attn_layer_norm, self_attention)
        hidden_states = self.residual(hidden_states, self.encoder_attn_layer_norm, cross_attention)
        # 3. feed-forward network
        return self.residual(hidden_states, self.final_layer_norm, self.feed_forward)


class VanillaTransformerPreTrainedModel(GuardedLoading, PreTrainedModel):
    """What transformers needs to know about the models below: how to initialise, split, compile and record them."""

    config: VanillaTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-uniform projections, embeddings and output matrix N(0, d_model^-0.5); or all N(0, init_std)."""
        embedding_std = self.config.init_std or self.config.d_model**-0.5
        if isinstance(module, nn.Linear):
            if self.config.init_std or module is self.get_output_embeddings():
                init.normal_(module.weight, std=embedding_std)
            else:
                init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=embedding_std)
            # A loaded row must keep its values, but the slice below would lose the flag that it was loaded.
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True) -> nn.Embedding:
        if not self.config.share_encoder_decoder_embeddings:
            raise ValueError(
                "resize_token_embeddings needs share_encoder_decoder_embeddings=True: with two vocabularies it is "
                "unclear which one is meant. Build a model with the new vocab_size and decoder_vocab_size instead"
            )
        resized = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.decoder_vocab_size = resized.num_embeddings
        return resized

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict:
        """transformers unties everything when `tie_word_embeddings=False`; here each sharing has its own switch."""
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)
        return dict(self._tied_weights_keys or {})


class TransformerStack(VanillaTransformerPreTrainedModel):
    """
    What encoder and decoder have in common: embeddings, positions, and a stack of layers.

    Args:
        config: sizes and rates.
        vocab_size: number of subwords that this stack reads.
        layer_class: `EncoderLayer` or `DecoderLayer`.
        num_layers: depth N.
    """

    def __init__(
        self, config: VanillaTransformerConfig, vocab_size: int, layer_class: type[TransformerLayer], num_layers: int
    ):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(vocab_size, config.d_model, padding_idx=config.pad_token_id)
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        learned = config.position_embedding_type == "learned"
        self.embed_positions = LearnedPositions(config) if learned else SinusoidalPositions(config)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList([layer_class(config, layer_idx) for layer_idx in range(num_layers)])
        # Post-norm layers end in a norm; pre-norm layers do not, so their sum is normalised once at the end.
        self.layer_norm = (
            nn.LayerNorm(config.d_model, eps=config.layer_norm_eps) if config.normalize_before else nn.Identity()
        )

    def init_parallel_plans(self) -> None:
        """The configuration's plans name modules from the whole model down, so a stack has none of its own."""
        for plan in ("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan"):
            setattr(self, plan, {})

    def embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """Dropout(Embedding(x) * sqrt(d_model) + PE)  (sections 3.4, 3.5, 5.4): `[B, L]` -> `[B, L, d_model]`."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        positions = self.embed_positions(position_ids, inputs_embeds.dtype)
        return self.dropout(inputs_embeds * self.embed_scale + positions)


def one_input(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, prefix: str = "") -> torch.Tensor:
    """The one input that is given: ids `[B, L]` or embeddings `[B, L, d_model]`."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"give exactly one of {prefix}input_ids and {prefix}inputs_embeds")
    return input_ids if input_ids is not None else inputs_embeds


def position_ids_of(attention_mask: torch.Tensor | None, given: torch.Tensor, past_length=0) -> torch.Tensor:
    """
    Numbers the tokens of `given` from 0, `[B, L]` or `[1, L]`. With a mask `[B, past_length + L]` padding does not
    count, so that padding on the left shifts no position. A mask already prepared for attention is not used.
    """
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -given.shape[1] :]
    return (torch.arange(given.shape[1], device=given.device) + past_length)[None]


class Encoder(TransformerStack):
    """A stack of `config.encoder_layers` encoder layers over the embedded source (section 3.1)."""

    _can_record_outputs = {"hidden_states": EncoderLayer, "attentions": MultiHeadAttention}

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(config, config.vocab_size, EncoderLayer, config.encoder_layers)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """`input_ids` `[B, S]` (or `inputs_embeds`) and their mask, 1 for tokens -> states `[B, S, d_model]`."""
        position_ids = position_ids_of(attention_mask, one_input(input_ids, inputs_embeds))
        hidden_states = self.embed(input_ids, inputs_embeds, position_ids)
        attention_mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))


class Decoder(TransformerStack):
    """A stack of `config.decoder_layers` decoder layers over the embedded target so far (section 3.1)."""

    _can_record_outputs = {
        "hidden_states": DecoderLayer,
        "attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(MultiHeadAttention, index=1, layer_name="encoder_attn"),
    }

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(config, config.decoder_vocab_size, DecoderLayer, config.decoder_layers)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """`input_ids` `[B, T]` (or `inputs_embeds`), after the cached ones -> states `[B, T, d_model]`."""
        given = one_input(input_ids, inputs_embeds, "decoder_")
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = position_ids_of(attention_mask, given, past_length)

        hidden_states = self.embed(input_ids, inputs_embeds, position_ids)
        self_attention_cache = past_key_values.self_attention_cache if past_key_values is not None else None
        attention_mask = create_causal_mask(self.config, hidden_states, attention_mask, self_attention_cache)
        encoder_attention_mask = create_bidirectional_mask(
            self.config, hidden_states, encoder_attention_mask, encoder_hidden_states
        )
        encoder_hidden_states = cast_once(encoder_hidden_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.layer_norm(hidden_states), past_key_values=past_key_values
        )


class VanillaTransformerModel(VanillaTransformerPreTrainedModel):
    """
    Encoder and decoder without the output projection (Figure 1 below "Linear").

    With `config.share_encoder_decoder_embeddings` both read the one table `shared`.
    """

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(config)
        if config.share_encoder_decoder_embeddings:
            self.shared = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_token_id)
            self._tied_weights_keys = {
                "encoder.embed_tokens.weight": "shared.weight",
                "decoder.embed_tokens.weight": "shared.weight",
            }
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The source's embedding table."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the source's embedding table, and the target's too if they share it."""
        self.encoder.embed_tokens = value
        if self.config.share_encoder_decoder_embeddings:
            self.shared = value
            self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """
        Args:
            input_ids: source tokens, `[B, S]`. Or give `inputs_embeds`, `[B, S, d_model]`.
            attention_mask: 1 for source tokens, 0 for padding, `[B, S]`. Default: no padding.
            decoder_input_ids: target tokens so far, beginning with `decoder_start_token_id`, `[B, T]`; with a cache,
                those after the cached ones. Or give `decoder_inputs_embeds`, `[B, T, d_model]`.
            decoder_attention_mask: 1 for target tokens, 0 for padding, cached ones included. Default: no padding,
                which also serves targets padded on the right, since no token sees what is to its right.
            decoder_position_ids: positions of the target tokens. Default: counted over `decoder_attention_mask`.
            encoder_outputs: the encoder's output for this source, which may be a tuple. The encoder then does not run.
            past_key_values: the `EncoderDecoderCache` of the previous call.
            use_cache: whether to return a cache. Default: `config.use_cache`.

        Returns:
            `last_hidden_state` `[B, T, d_model]`, the cache, and what `output_attentions` and `output_hidden_states`
            ask for. With `return_dict=False` a tuple.

        Raises:
            ValueError: both or neither of ids and embeddings were given for one side.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, return_dict=True, **kwargs)
        elif isinstance(encoder_outputs, tuple):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class VanillaTransformerForConditionalGeneration(
    VanillaTransformerPreTrainedModel, VanillaTransformerGenerationMixin, VanillaTransformerScoringMixin
):
    """
    The Transformer with its output projection: logits = decoder x W + b, whose softmax is the probability of each
    next token (section 3.4). W is the embedding table by default; b is trained.

    Example:

        >>> model = VanillaTransformerForConditionalGeneration(VanillaTransformerConfig(vocab_size=100))
        >>> model(input_ids=torch.tensor([[5, 6, 2]]), labels=torch.tensor([[7, 8, 2]])).logits.shape
        torch.Size([1, 3, 100])
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: VanillaTransformerConfig):
        super().__init__(config)
        self.model = VanillaTransformerModel(config)
        self.lm_head = nn.Linear(config.d_model, config.decoder_vocab_size, bias=True)
        inner = self.model._tied_weights_keys or {}
        tied = {f"model.{target}": f"model.{source}" for target, source in inner.items()}
        if config.tie_word_embeddings:
            shared = config.share_encoder_decoder_embeddings
            tied["lm_head.weight"] = "model.shared.weight" if shared else "model.decoder.embed_tokens.weight"
        self._tied_weights_keys = tied
        self._set_paper_defaults()
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """
        The decoder's input for these labels, `[B, T]`: what transformers' collators ask for.

        Raises:
            ValueError: the labels are padded on the left, so the decoder would need a mask as well.
        """
        ids, mask = decoder_inputs(labels, self.config.pad_token_id, self.config.decoder_start_token_id)
        if mask is not None:
            raise ValueError(
                "labels are padded on the left: pad them on the right (tokenizer.padding_side), or give the model no "
                "decoder_input_ids"
            )
        return ids

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool = False,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput | tuple:
        """
        Takes what `VanillaTransformerModel.forward` takes, and:

        Args:
            labels: true target tokens, `[B, T]`, -100 for padding, which may be on either side. They are shifted right
                to make the decoder's input, unless that is given.
            num_items_in_batch: number of target tokens in the whole update, by which the loss is divided. Default: the
                number in `labels`.
            return_logits: whether training with `labels` returns logits too. Without them training is faster, and
                `outputs[1]` is an error.
            return_dict: False returns a tuple, always with logits. Default: `config.return_dict`.

        Returns:
            `loss` in nats per token (smoothed by `config.label_smoothing` in training mode only), `logits` `[B, T, V]`,
            and the outputs of `VanillaTransformerModel`.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids, mask = decoder_inputs(
                    labels, self.config.pad_token_id, self.config.decoder_start_token_id
                )
                decoder_attention_mask = mask if decoder_attention_mask is None else decoder_attention_mask
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden, head = outputs.last_hidden_state, self.lm_head
        smoothing = self.config.label_smoothing if self.training else 0.0
        # All outputs of the base model except its last state, which the logits replace.
        recorded = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        # A wrapped, split or hooked head (LoRA, quantisation, tensor parallelism, a device map) must itself be called.
        plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and is_unchanged(head)
        if self.training and labels is not None and plain and return_dict and not return_logits:
            loss = projected_cross_entropy(hidden, head.weight, head.bias, labels, smoothing, num_items_in_batch)
            return OutputWithoutLogits(loss=loss, **recorded)
        logits, loss = head(hidden), None  # [B, T, V]
        if labels is not None:
            loss = label_smoothed_cross_entropy(logits, labels, smoothing, num_items_in_batch)
        result = Seq2SeqLMOutput(loss=loss, logits=logits, **recorded)
        return result if return_dict else result.to_tuple()


# `generate()` has faster code for these modules, and uses it as long as their methods are the ones defined here.
know(MultiHeadAttention, SinusoidalPositions, LearnedPositions, EncoderLayer, DecoderLayer, Encoder, Decoder)
know(VanillaTransformerModel, VanillaTransformerForConditionalGeneration)

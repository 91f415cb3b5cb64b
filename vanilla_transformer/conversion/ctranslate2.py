"""Exports a model to CTranslate2 (https://github.com/OpenNMT/CTranslate2), as a folder for `ctranslate2.Translator`.

    to_ctranslate2(model, tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "folder")
    translator = ctranslate2.Translator("folder")
    translator.translate_batch([tokenizer.convert_ids_to_tokens(ids)], beam_size=4, min_decoding_length=0)

gives the outputs and scores of `generate(num_beams=4, early_stopping=True)`. Without `min_decoding_length=0`,
CTranslate2 forbids empty outputs.
"""

from pathlib import Path

import torch
from ctranslate2.converters import Converter
from ctranslate2.converters.utils import fuse_linear
from ctranslate2.specs import TransformerSpec
from ctranslate2.specs.attention_spec import MultiHeadAttentionSpec
from ctranslate2.specs.common_spec import Activation, LayerNormSpec, LinearSpec
from ctranslate2.specs.transformer_spec import TransformerDecoderSpec, TransformerEncoderSpec

from ..configuration_vanilla_transformer import VanillaTransformerConfig
from ..modeling_vanilla_transformer import TransformerStack, VanillaTransformerForConditionalGeneration
from ..tokenization_vanilla_transformer import SPECIAL_TOKENS
from .marian import refuse_other_heads


ACTIVATIONS = {
    "relu": Activation.RELU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELUTanh,
    "silu": Activation.SWISH,
    "swish": Activation.SWISH,
}
UNKNOWN = SPECIAL_TOKENS["unk_token"]


def to_ctranslate2(
    model: VanillaTransformerForConditionalGeneration,
    tokenizer_tokens: list[str],
    folder: str | Path,
    quantization: str | None = None,
    force: bool = False,
) -> None:
    """
    Writes a model in CTranslate2's format.

    Args:
        model: on any device, in any dtype. It stays as it is.
        tokenizer_tokens: the tokenizer's token for each id, `vocab_size` in all, including "<unk>".
        folder: the output folder.
        quantization: one of CTranslate2's types, such as "int8" or "bfloat16". Default: float32. A `Translator` can
            turn the weights into another type when it loads them (`compute_type`).
        force: whether to replace an existing folder.

    Raises:
        ValueError: CTranslate2 does not support a setting of the model, or the tokens do not match it. The message says
            which and why.
        RuntimeError: the folder exists, and `force` is not set.
    """
    _refuse_what_it_has_not(model.config)
    _refuse_other_tokens(model.config, tokenizer_tokens)
    _Converter(model, tokenizer_tokens).convert(str(folder), quantization=quantization, force=force)


def _refuse_what_it_has_not(config: VanillaTransformerConfig) -> None:
    if config.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"CTranslate2 has no activation_function={config.activation_function!r}, only {', '.join(ACTIVATIONS)}"
        )
    refuse_other_heads(config, "CTranslate2")
    if not isinstance(config.eos_token_id, int):
        raise ValueError(f"CTranslate2 needs one token that ends a sentence, but eos_token_id={config.eos_token_id}")


def _refuse_other_tokens(config: VanillaTransformerConfig, tokens: list[str]) -> None:
    for name in ("vocab_size", "decoder_vocab_size"):
        size = getattr(config, name)
        if len(tokens) != size:
            raise ValueError(f"there are {len(tokens)} tokenizer_tokens for {name}={size}: give one for each id")
    if UNKNOWN not in tokens:
        raise ValueError(f"tokenizer_tokens lack {UNKNOWN!r}, which CTranslate2 uses for unknown tokens")


class _Converter(Converter):
    """CTranslate2's own converter, for our models."""

    def __init__(self, model: VanillaTransformerForConditionalGeneration, tokens: list[str]):
        self.model, self.tokens = model, tokens

    def _load(self) -> TransformerSpec:
        config, tokens = self.model.config, self.tokens
        norm = {"pre_norm": config.normalize_before, "activation": ACTIVATIONS[config.activation_function]}
        spec = TransformerSpec(
            TransformerEncoderSpec(config.encoder_layers, config.encoder_attention_heads, **norm),
            TransformerDecoderSpec(config.decoder_layers, config.decoder_attention_heads, **norm),
        )
        # Copies, because CTranslate2 quantises in place.
        weights = {
            name: value.detach().to("cpu", torch.float32, copy=True) for name, value in self.model.state_dict().items()
        }
        for side, stack in (("encoder", self.model.model.encoder), ("decoder", self.model.model.decoder)):
            _fill_stack(getattr(spec, side), stack, f"model.{side}", weights)
        _fill(spec.decoder.projection, "lm_head", weights)
        spec.register_source_vocabulary(tokens)
        spec.register_target_vocabulary(tokens)
        assert isinstance(config.eos_token_id, int)
        assert isinstance(config.decoder_start_token_id, int)
        spec.config.unk_token = UNKNOWN
        spec.config.eos_token = tokens[config.eos_token_id]
        spec.config.decoder_start_token = tokens[config.decoder_start_token_id]
        if config.bos_token_id is not None:
            spec.config.bos_token = tokens[config.bos_token_id]
        spec.config.layer_norm_epsilon = config.layer_norm_eps
        return spec


def _fill_stack(
    spec: TransformerEncoderSpec | TransformerDecoderSpec,
    stack: TransformerStack,
    name: str,
    weights: dict[str, torch.Tensor],
) -> None:
    embeddings = spec.embeddings[0] if isinstance(spec.embeddings, list) else spec.embeddings
    embeddings.weight = weights[f"{name}.embed_tokens.weight"]
    spec.scale_embeddings = stack.embed_scale
    # CTranslate2's sinusoids have all sines before all cosines, but ours are interleaved, so write them as a table.
    numbers = torch.arange(stack.config.max_position_embeddings, device=stack.device)[None]
    spec.position_encodings.encodings = stack.embed_positions(numbers, torch.float32)[0].detach().cpu()
    if stack.config.normalize_before:
        _fill(spec.layer_norm, f"{name}.layer_norm", weights)
    for number, layer in enumerate(spec.layer):
        prefix = f"{name}.layers.{number}"
        _fill_attention(layer.self_attention, f"{prefix}.self_attn", weights)
        if hasattr(layer, "attention"):
            _fill_attention(layer.attention, f"{prefix}.encoder_attn", weights)
        _fill(layer.ffn.linear_0, f"{prefix}.fc1", weights)
        _fill(layer.ffn.linear_1, f"{prefix}.fc2", weights)
        _fill(layer.ffn.layer_norm, f"{prefix}.final_layer_norm", weights)


def _fill_attention(spec: MultiHeadAttentionSpec, name: str, weights: dict[str, torch.Tensor]) -> None:
    """Fuses projections of the same states: all three in self-attention, key and value in cross-attention."""
    query, key, value = LinearSpec(), LinearSpec(), LinearSpec()
    for letter, projection in (("q", query), ("k", key), ("v", value)):
        _fill(projection, f"{name}.{letter}_proj", weights)
    together = [[query, key, value]] if len(spec.linear) == 2 else [[query], [key, value]]
    for linear, projections in zip(spec.linear, together, strict=False):
        fuse_linear(linear, projections)
    _fill(spec.linear[-1], f"{name}.out_proj", weights)
    _fill(spec.layer_norm, f"{name}_layer_norm", weights)


def _fill(spec: LinearSpec | LayerNormSpec, name: str, weights: dict[str, torch.Tensor]) -> None:
    """Fills a projection or a norm. A norm's weight and bias are called gamma and beta."""
    weight, bias = ("gamma", "beta") if isinstance(spec, LayerNormSpec) else ("weight", "bias")
    setattr(spec, weight, weights[f"{name}.weight"])
    setattr(spec, bias, weights[f"{name}.bias"])

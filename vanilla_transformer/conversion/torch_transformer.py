"""Imports the state dict of a module that contains a `torch.nn.Transformer`.

    weights = torch.load("model.pt", weights_only=True)
    model = from_torch_transformer(
        weights, tokenizer, heads=8, prefix="transformer.", source_embedding="src_tok_emb.embedding.weight",
        target_embedding="tgt_tok_emb.embedding.weight", output="generator.weight",
    )

`torch.nn.Transformer` has only the two stacks. The module itself defines embeddings, positions and output projection,
so their names must be given. So must what the tensors do not show: the number of heads, pre- or post-norm, the
activation, and whether embeddings are scaled by sqrt(d_model).
"""

from collections.abc import Mapping

import torch
from transformers import PreTrainedTokenizerBase

from ..configuration_vanilla_transformer import VanillaTransformerConfig
from ..modeling_vanilla_transformer import VanillaTransformerForConditionalGeneration
from .checkpoints import Weights, copy_modules, copy_tables, layer_modules


LAYER_NAMES = {
    "encoder": {
        "self_attn.out_proj": "self_attn.out_proj",
        "self_attn_layer_norm": "norm1",
        "fc1": "linear1",
        "fc2": "linear2",
        "final_layer_norm": "norm2",
    },
    "decoder": {
        "self_attn.out_proj": "self_attn.out_proj",
        "self_attn_layer_norm": "norm1",
        "encoder_attn.out_proj": "multihead_attn.out_proj",
        "encoder_attn_layer_norm": "norm2",
        "fc1": "linear1",
        "fc2": "linear2",
        "final_layer_norm": "norm3",
    },
}
ATTENTIONS = {
    "encoder": {"self_attn": "self_attn"},
    "decoder": {"self_attn": "self_attn", "encoder_attn": "multihead_attn"},
}


def from_torch_transformer(
    state: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    heads: int,
    source_embedding: str,
    target_embedding: str | None = None,
    output: str | None = None,
    positions: str | None = None,
    prefix: str = "",
    normalize_before: bool = False,
    activation_function: str = "relu",
    scale_embedding: bool = True,
    layer_norm_eps: float = 1e-5,
    origin: str = "the state dict",
) -> VanillaTransformerForConditionalGeneration:
    """
    Makes a model of this package with the outputs of such a module.

    A post-norm `torch.nn.Transformer` normalises the output of its last layer once more, unlike the paper. Here this
    becomes an extra layer in each stack, whose sub-layers are zero and whose last norm is that norm. The extra layer's
    other norms change their input, which is normalised already, by less than `layer_norm_eps`.

    Args:
        state: the module's state dict. All its tensors must be used.
        tokenizer: for the special ids; the decoder starts with its bos token.
        heads: `nhead`.
        source_embedding, target_embedding: names of the tables. Default: source and target share one.
        output: name of the output projection's weight; its bias, if any, is found by that name. Default: the target's
            table.
        positions: name of a table of positions, `[L, d_model]`, with an axis of 1 in any place. Default: the paper's
            sinusoids.
        prefix: the part of the names before `encoder.layers.0...`.
        normalize_before: `norm_first`.
        activation_function: "relu" or "gelu".
        scale_embedding: whether embeddings are multiplied by sqrt(d_model) before positions are added.
        layer_norm_eps: as in torch.
        origin: the name of the state dict in messages.

    Raises:
        ValueError: a tensor is missing, unused or of the wrong shape, or the tokenizer does not match. The message says
            which.
    """
    weights = Weights(state, origin)
    layers = {stack: weights.count(f"{prefix}{stack}.layers.{{}}.norm1.weight") for stack in LAYER_NAMES}
    for stack, count in layers.items():
        if not count:
            raise ValueError(f"{origin} has no {prefix}{stack}.layers.0.norm1.weight: is prefix={prefix!r} right?")
    final_norm = {stack: f"{prefix}{stack}.norm.weight" in weights for stack in LAYER_NAMES}
    if normalize_before and not all(final_norm.values()):
        lacking = next(stack for stack, present in final_norm.items() if not present)
        raise ValueError(
            f"{origin} has no {prefix}{lacking}.norm.weight: here a pre-norm {lacking} ends in a norm, "
            "so its outputs would differ"
        )
    extra = {stack: final_norm[stack] and not normalize_before for stack in LAYER_NAMES}
    config = _config(weights, prefix, tokenizer, source_embedding, target_embedding, positions)
    config |= {
        "encoder_layers": layers["encoder"] + extra["encoder"],
        "decoder_layers": layers["decoder"] + extra["decoder"],
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "normalize_before": normalize_before,
        "activation_function": activation_function,
        "scale_embedding": scale_embedding,
        "layer_norm_eps": layer_norm_eps,
        "share_encoder_decoder_embeddings": target_embedding is None,
        "tie_word_embeddings": output is None,
    }
    model = VanillaTransformerForConditionalGeneration(VanillaTransformerConfig(**config))
    for stack, count in layers.items():
        _copy_stack(model, weights, prefix, stack, count, final_norm[stack])
    _copy_tables(model, weights, source_embedding, target_embedding, output, positions)
    weights.refuse_left_over()
    return model.eval()


def _config(
    weights: Weights,
    prefix: str,
    tokenizer: PreTrainedTokenizerBase,
    source_embedding: str,
    target_embedding: str | None,
    positions: str | None,
) -> dict:
    """The config fields that follow from the shapes of tensors and the tokenizer."""
    vocab_size, d_model = _matrix(weights, source_embedding)
    decoder_vocab_size = vocab_size if target_embedding is None else _matrix(weights, target_embedding)[0]
    for name in ("pad", "bos", "eos"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ValueError(f"the tokenizer has no {name}_token, whose id the model needs")
    if len(tokenizer) > min(vocab_size, decoder_vocab_size):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the tables of {weights.origin} have {vocab_size} and "
            f"{decoder_vocab_size} rows"
        )
    table = {} if positions is None else {"max_position_embeddings": weights.shape(positions).numel() // d_model}
    return {
        "vocab_size": vocab_size,
        "decoder_vocab_size": decoder_vocab_size,
        "d_model": d_model,
        "encoder_ffn_dim": weights.shape(f"{prefix}encoder.layers.0.linear1.weight")[0],
        "decoder_ffn_dim": weights.shape(f"{prefix}decoder.layers.0.linear1.weight")[0],
        "position_embedding_type": "sinusoidal" if positions is None else "learned",
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.bos_token_id,
        **table,
    }


def _matrix(weights: Weights, name: str) -> torch.Size:
    shape = weights.shape(name)
    if len(shape) != 2:
        raise ValueError(f"{weights.origin}: {name} has shape {list(shape)}, so it is not an embedding table")
    return shape


@torch.no_grad()
def _copy_stack(
    model: VanillaTransformerForConditionalGeneration,
    weights: Weights,
    prefix: str,
    stack: str,
    count: int,
    final_norm: bool,
) -> None:
    # `bias=False` removes all biases.
    biased = f"{prefix}{stack}.layers.0.norm1.bias" in weights
    copy_modules(
        model,
        weights,
        layer_modules(stack, count, LAYER_NAMES[stack], f"{prefix}{stack}.layers.{{}}"),
        has_bias=lambda module: biased,
    )
    d_model = model.config.d_model
    for number in range(count):
        for ours, theirs in ATTENTIONS[stack].items():
            attention = model.get_submodule(f"model.{stack}.layers.{number}.{ours}")
            name = f"{prefix}{stack}.layers.{number}.{theirs}.in_proj"
            matrices = weights.take(f"{name}_weight", (3 * d_model, d_model)).chunk(3)
            biases = weights.take(f"{name}_bias", (3 * d_model,)).chunk(3) if biased else [torch.zeros(d_model)] * 3
            for letter, matrix, bias in zip("qkv", matrices, biases, strict=True):
                projection = attention.get_submodule(f"{letter}_proj")
                projection.weight.copy_(matrix)
                projection.bias.copy_(bias)
    if final_norm:
        ours = f"model.{stack}.layer_norm"
        if not model.config.normalize_before:
            # An extra layer: zero projections, norms without scale and bias, and last the stack's final norm.
            layer = model.get_submodule(f"model.{stack}.layers.{count}")
            for name, parameter in layer.named_parameters():
                parameter.fill_(1.0 if name.endswith("layer_norm.weight") else 0.0)
            ours = f"model.{stack}.layers.{count}.final_layer_norm"
        copy_modules(model, weights, {ours: f"{prefix}{stack}.norm"}, has_bias=lambda module: biased)


@torch.no_grad()
def _copy_tables(
    model: VanillaTransformerForConditionalGeneration,
    weights: Weights,
    source_embedding: str,
    target_embedding: str | None,
    output: str | None,
    positions: str | None,
) -> None:
    if positions is not None:
        table = weights.take(positions).reshape(-1, model.config.d_model)
        for stack in ("encoder", "decoder"):
            model.get_parameter(f"model.{stack}.embed_positions.weight").copy_(table)
    source = weights.take(source_embedding)
    target = source if target_embedding is None else weights.take(target_embedding)
    matrix = target if output is None else weights.take(output)
    beside = "" if output is None else f"{output.removesuffix('weight')}bias"
    copy_tables(model, source, target, matrix, weights.take(beside) if beside in weights else None)

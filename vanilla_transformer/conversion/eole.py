"""Imports a model of Eole (https://github.com/eole-nlp/eole), with `config.json`, `vocab.json`, safetensors.

    model, tokenizer = from_eole("wmt17_en_de/step_100000")

Of Eole's many architectures, the encoder-decoder `transformer` in its default form can be converted: pre-norm layers,
LayerNorm, absolute positions, plain attention and feed-forward networks.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..configuration_vanilla_transformer import VanillaTransformerConfig
from ..modeling_vanilla_transformer import VanillaTransformerForConditionalGeneration
from .checkpoints import (
    JointVocabulary,
    Weights,
    copy_modules,
    copy_tables,
    join_vocabularies,
    layer_modules,
    pack_tokenizer,
    read_json,
    read_safetensors,
    refuse_duplicates,
    refuse_other_positions,
    sentencepiece_tokenizer,
    take_tables,
    word_tokenizer,
)


ATTENTION = {"q_proj": "linear_query", "k_proj": "linear_keys", "v_proj": "linear_values", "out_proj": "final_linear"}
LAYER_NAMES = {
    "encoder": {
        **{f"self_attn.{ours}": f"self_attn.{theirs}" for ours, theirs in ATTENTION.items()},
        "self_attn_layer_norm": "input_layernorm",
        "fc1": "mlp.gate_up_proj",
        "fc2": "mlp.down_proj",
        "final_layer_norm": "post_attention_layernorm",
    }
}
LAYER_NAMES["decoder"] = {
    **LAYER_NAMES["encoder"],
    **{f"encoder_attn.{ours}": f"context_attn.{theirs}" for ours, theirs in ATTENTION.items()},
    "encoder_attn_layer_norm": "precontext_layernorm",
}
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu-tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
# The values of each field that this package supports. The first is Eole's own default.
ONLY: dict[str, tuple] = {
    "encoder_type": ("transformer",),
    "decoder_type": ("transformer",),
    "encoder_layer_style": ("standard",),
    "final_encoder_layer_norm": (True,),
    "layer_norm": ("standard", "standardFP32"),
    "mlp_activation_fn": tuple(ACTIVATIONS),
    "position_encoding_type": ("SinusoidalInterleaved", "SinusoidalConcat", "Learned"),
    "heads_kv": (None,),
    "head_dim": (None,),
    "attn_scaling": (None,),
    "sliding_window": (0,),
    "relative_positions_buckets": (0,),
    "query_norm": (False,),
    "key_norm": (False,),
    "value_norm": (False,),
    "q_gating": (False,),
    "ffn_layernorm": (False,),
    "parallel_residual": (False,),
    "num_experts": (0,),
    "layer_types": (None,),
    "global_head_dim": (None,),
    "num_mtp_heads": (0,),
    "coverage_attn": (False,),
    "embedding_type": ("standard",),
    "generator_function": ("softmax",),
    "add_estimator": (False,),
    "left_pad": (False,),
}
SIZES = {"layers": 2, "hidden_size": 512, "heads": 8, "transformer_ff": 2048, "norm_eps": 1e-5}
SPECIALS = {"unk_token": "<unk>", "pad_token": "<blank>", "bos_token": "<s>", "eos_token": "</s>"}
# Transforms that only matter in training.
IDLE_TRANSFORMS = {"filtertoolong", "filtertooshort", "clean", "bart", "switchout", "tokendrop", "tokenmask"}


def from_eole(folder: str | Path) -> tuple[VanillaTransformerForConditionalGeneration, PreTrainedTokenizerFast]:
    """
    Makes a model with the outputs of an Eole Transformer, and its tokenizer.

    Eole's sources have no end-of-sentence token, so the tokenizer appends none. If source and target have different
    vocabularies, the model has one that contains both, source first: see `JointVocabulary`. With sinusoids in another
    order than the paper's (SinusoidalConcat), and with learned positions, texts are limited to Eole's table. Decoding
    uses the paper's defaults, and Eole's `beam_size`, `length_penalty` and `alpha` if the folder has them.

    Raises:
        ValueError: the weights do not match the configuration, or this package does not support it. The message says
            what and why.
        FileNotFoundError: a file is missing.
    """
    folder = Path(folder)
    settings = read_json(folder / "config.json")
    vocabulary = read_json(folder / "vocab.json")
    model_settings = settings.get("model")
    if not isinstance(model_settings, dict) or model_settings.get("architecture") != "transformer":
        raise ValueError(f"{folder / 'config.json'} does not describe an Eole model of architecture 'transformer'")
    tokens = {side: vocabulary[side] for side in ("src", "tgt")}
    for side, names in tokens.items():
        refuse_duplicates(names, f"{folder / 'vocab.json'}: {side}")
    specials = {**SPECIALS, **vocabulary.get("specials", {})}
    for name in SPECIALS:
        for side, names in tokens.items():
            if specials[name] not in names:
                raise ValueError(f"{folder / 'vocab.json'}: {side} lacks the {name} {specials[name]!r}")
    specials = {name: specials[name] for name in SPECIALS}

    joint = join_vocabularies(tokens["src"], tokens["tgt"], specials["unk_token"])
    all_tokens = tokens["src"] if joint is None else joint.tokens
    tokenizer = _tokenizer(settings, folder, tokens["src"], all_tokens, specials)
    weights = Weights(read_safetensors(_weight_files(folder)), folder)
    start = vocabulary.get("decoder_start_token") or specials["bos_token"]
    config = _config(model_settings, weights, all_tokens, specials, start)
    model = VanillaTransformerForConditionalGeneration(config)
    _copy(model, weights, model_settings, joint)
    _set_decoding(model, settings.get("inference") or {})
    return model.eval(), tokenizer


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("model.*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no model.00.safetensors, so it is not the folder of an Eole model")
    return files


def _field(settings: dict[str, Any], section: str, name: str, default: Any) -> Any:
    """A field of encoder, decoder or embeddings. If it is missing there, the model's own field applies."""
    inner = settings.get(section) or {}
    return inner[name] if name in inner else settings.get(name, default)


def _config(
    settings: dict[str, Any], weights: Weights, tokens: list[str], specials: dict[str, str], start: str
) -> VanillaTransformerConfig:
    for section in ("encoder", "decoder", "embeddings"):
        for name, values in ONLY.items():
            found = _field(settings, section, name, values[0])
            if found not in values:
                raise ValueError(
                    f"model.{section} has {name}={found!r}, but only {', '.join(map(repr, values))} can be converted"
                )
    stacks = {
        stack: {name: _field(settings, stack, name, default) for name, default in SIZES.items()}
        | {"activation": ACTIVATIONS[_field(settings, stack, "mlp_activation_fn", "relu")]}
        for stack in ("encoder", "decoder")
    }
    for name in ("hidden_size", "norm_eps", "activation"):
        if stacks["encoder"][name] != stacks["decoder"][name]:
            raise ValueError(
                f"{name} is {stacks['encoder'][name]!r} in the encoder and {stacks['decoder'][name]!r} in the decoder: "
                "here both have one"
            )
    encoder, decoder = stacks["encoder"], stacks["decoder"]
    kind = _positions(settings)
    table = {}
    if kind != "SinusoidalInterleaved":
        name = "src_emb.pe.weight" if kind == "Learned" else "src_emb.pe.pe"
        table["max_position_embeddings"] = weights.shape(name)[0] - _shift(settings)
    return VanillaTransformerConfig(
        vocab_size=len(tokens),
        d_model=encoder["hidden_size"],
        encoder_layers=encoder["layers"],
        decoder_layers=decoder["layers"],
        encoder_attention_heads=encoder["heads"],
        decoder_attention_heads=decoder["heads"],
        encoder_ffn_dim=encoder["transformer_ff"],
        decoder_ffn_dim=decoder["transformer_ff"],
        activation_function=encoder["activation"],
        normalize_before=True,
        layer_norm_eps=encoder["norm_eps"],
        position_embedding_type="sinusoidal" if kind == "SinusoidalInterleaved" else "learned",
        # Eole scales embeddings with sinusoids always, with learned positions only if `normalize` is set.
        scale_embedding=kind != "Learned" or _field(settings, "embeddings", "normalize", False),
        share_encoder_decoder_embeddings=settings.get("share_embeddings", False),
        tie_word_embeddings=settings.get("share_decoder_embeddings", False),
        pad_token_id=tokens.index(specials["pad_token"]),
        bos_token_id=tokens.index(specials["bos_token"]),
        eos_token_id=tokens.index(specials["eos_token"]),
        decoder_start_token_id=tokens.index(start),
        **table,
    )


def _positions(settings: dict[str, Any]) -> str:
    return _field(settings, "embeddings", "position_encoding_type", "SinusoidalInterleaved")


def _shift(settings: dict[str, Any]) -> int:
    """The first row of the learned positions that is used."""
    return _field(settings, "embeddings", "position_shift", 0) if _positions(settings) == "Learned" else 0


def _copy(
    model: VanillaTransformerForConditionalGeneration,
    weights: Weights,
    settings: dict[str, Any],
    joint: JointVocabulary | None,
) -> None:
    config = model.config
    for stack, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        modules = layer_modules(stack, layers, LAYER_NAMES[stack], f"{stack}.transformer_layers.{{}}")
        modules[f"model.{stack}.layer_norm"] = f"{stack}.layer_norm"
        copy_modules(model, weights, modules, partial(_has_bias, settings, stack, weights))
        _copy_positions(model, weights, settings, stack)
    for number in range(config.decoder_layers):
        # Saved with each layer, but used only by decoders without an encoder.
        weights.tensors.pop(f"decoder.transformer_layers.{number}.layer_scalar", None)
    names = ("src_emb.embeddings.weight", "tgt_emb.embeddings.weight", "generator.weight")
    tables = take_tables(weights, names, config.share_encoder_decoder_embeddings, config.tie_word_embeddings)
    bias = weights.take("generator.bias") if settings.get("generator_bias", True) else None
    copy_tables(model, *tables, bias, joint)
    weights.refuse_left_over()


def _has_bias(settings: dict[str, Any], stack: str, weights: Weights, module: str) -> bool:
    kind = module.rsplit(".", 1)[-1]
    queries = _field(settings, stack, "add_qkvbias", False)
    if kind == "linear_keys":
        keys = _field(settings, stack, "add_key_bias", None)
        return queries if keys is None else keys
    if kind in ("linear_query", "linear_values"):
        return queries
    if kind == "final_linear":
        # If the configuration lacks the field, Eole's trainer and its predictor disagree.
        return _field(settings, stack, "add_final_linear_bias", f"{module}.bias" in weights)
    if kind in ("gate_up_proj", "down_proj"):
        return _field(settings, stack, "add_ffnbias", False)
    return True


@torch.no_grad()
def _copy_positions(
    model: VanillaTransformerForConditionalGeneration, weights: Weights, settings: dict[str, Any], stack: str
) -> None:
    kind, config = _positions(settings), model.config
    side = "src_emb" if stack == "encoder" else "tgt_emb"
    if kind == "Learned":
        table = weights.take(f"{side}.pe.weight")[_shift(settings) :]
        if config.scale_embedding:
            table = table * math.sqrt(config.d_model)  # `normalize` scales the sum
    else:
        table = weights.take(f"{side}.pe.pe")[:, 0]  # [L, 1, d_model]
    if kind == "SinusoidalInterleaved":
        refuse_other_positions(table, config, f"{weights.origin}: {side}.pe.pe")
        return
    parameter = model.get_parameter(f"model.{stack}.embed_positions.weight")
    if parameter.shape != table.shape:
        raise ValueError(
            f"{weights.origin}: {side} has positions of shape {list(table.shape)}, not {list(parameter.shape)}"
        )
    parameter.copy_(table)


def _tokenizer(
    settings: dict[str, Any], folder: Path, source: list[str], tokens: list[str], specials: dict[str, str]
) -> PreTrainedTokenizerFast:
    """Splits text like the source's transform, and joins it like the target's."""
    unknown = specials["unk_token"]
    transforms = [name for name in settings.get("transforms") or [] if name not in IDLE_TRANSFORMS]
    options = (settings.get("transforms_configs") or {}).get(transforms[0], {}) if transforms else {}
    if not transforms:
        tokenizer = word_tokenizer(tokens, unknown)
    elif transforms == ["sentencepiece"]:
        if options.get("src_vocab_threshold") or options.get("tgt_vocab_threshold"):
            raise ValueError("transforms_configs.sentencepiece: a vocabulary with a threshold is not supported")
        tokenizer = _sentencepiece(options["src_subword_model"], folder, tokens, source, unknown)
    elif transforms == ["bpe"]:
        tokenizer = word_tokenizer(tokens, unknown, joiner="@@")
    else:
        raise ValueError(
            f"transforms {transforms}: transformers' tokenizers support only one of sentencepiece and bpe, "
            "without other transforms of text"
        )
    return pack_tokenizer(tokenizer, specials, append_eos=False)


def _sentencepiece(path: str, folder: Path, tokens: list[str], source: list[str], unknown: str) -> Tokenizer:
    beside = folder / Path(path).name
    return sentencepiece_tokenizer(beside if beside.exists() else path, tokens, source, unknown)


def _set_decoding(model: VanillaTransformerForConditionalGeneration, inference: dict[str, Any]) -> None:
    decoding = model.generation_config
    decoding.num_beams = inference.get("beam_size", decoding.num_beams)
    form, alpha = inference.get("length_penalty", "avg"), inference.get("alpha", 1.0)
    if decoding.num_beams > 1:
        # With an exponent of 0 the score is the sum of the log-probabilities.
        decoding.length_penalty = 0.0 if form == "none" else float(alpha)
        decoding.length_penalty_form = "gnmt" if form == "wu" else "power"

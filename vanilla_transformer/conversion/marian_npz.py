"""Exports a model to Marian, the C++ program (https://github.com/marian-nmt/marian-dev), in its own format, `.npz`.

    to_marian_npz(model, "folder/model.npz")
    write_vocabulary(config.vocab_size, config.eos_token_id, tokenizer.unk_token_id, "folder/vocabulary.txt")
    marian-decoder --models folder/model.npz --vocabs folder/vocabulary.txt folder/vocabulary.txt

`vanilla-transformer benchmark` measures Marian's speed this way. Translations differ slightly from ours, because Marian
fixes three things: the wavelengths of its sinusoids (10000^(i / (n - 1)) for n = d_model / 2; in the paper i / n), a
zero vector as the decoder's first input, where ours is a token, and an epsilon of 1e-6 in its norms. A model with these
three gives the same translations and scores.
"""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..configuration_vanilla_transformer import VanillaTransformerConfig
from ..modeling_vanilla_transformer import VanillaTransformerForConditionalGeneration
from .marian import refuse_what_marian_has_not, to_marian


# For each module of our layers, the names of Marian's weight and bias.
PARTS = {
    "self_attn.q_proj": ("self_Wq", "self_bq"),
    "self_attn.k_proj": ("self_Wk", "self_bk"),
    "self_attn.v_proj": ("self_Wv", "self_bv"),
    "self_attn.out_proj": ("self_Wo", "self_bo"),
    "self_attn_layer_norm": ("self_Wo_ln_scale", "self_Wo_ln_bias"),
    "encoder_attn.q_proj": ("context_Wq", "context_bq"),
    "encoder_attn.k_proj": ("context_Wk", "context_bk"),
    "encoder_attn.v_proj": ("context_Wv", "context_bv"),
    "encoder_attn.out_proj": ("context_Wo", "context_bo"),
    "encoder_attn_layer_norm": ("context_Wo_ln_scale", "context_Wo_ln_bias"),
    "fc1": ("ffn_W1", "ffn_b1"),
    "fc2": ("ffn_W2", "ffn_b2"),
    "final_layer_norm": ("ffn_ffn_ln_scale", "ffn_ffn_ln_bias"),
}
ACTIVATIONS = {"relu": "relu", "silu": "swish", "swish": "swish"}
# With this bias a token is never chosen.
NEVER = -1e9


def to_marian_npz(
    model: VanillaTransformerForConditionalGeneration, path: str | Path, never_ends: bool = False
) -> None:
    """
    Writes a model's weights as a Transformer of Marian.

    Args:
        model: on any device, in any dtype. It is not changed.
        path: the output file, whose name ends in ".npz".
        never_ends: whether to forbid the end of the sentence, so that every output has the maximum length.

    Raises:
        ValueError: Marian does not support a setting of the model. The message says which and why.
    """
    config = model.config
    options = marian_options(config)
    # transformers' Marian has the d_model axis in the order of the C++ program.
    state = {name: value.detach().float().cpu().numpy() for name, value in to_marian(model).state_dict().items()}
    bias = state["final_logits_bias"][0].copy()
    if never_ends:
        bias[config.eos_token_id] = NEVER
    arrays = {
        "encoder_Wemb": state["model.encoder.embed_tokens.weight"],
        "decoder_Wemb": state["model.decoder.embed_tokens.weight"],
        # Not tied to the embeddings: a tied matrix would stay float32 in Marian's int8.
        "decoder_ff_logit_out_W": state["lm_head.weight"].T,
        "decoder_ff_logit_out_b": bias,
    }
    for name, value in state.items():
        if ".layers." in name:
            _, stack, _, number, *part, kind = name.split(".")
            arrays[f"{stack}_l{int(number) + 1}_{PARTS['.'.join(part)][kind == 'bias']}"] = value.T
    # Marian stores vectors as rows. The description is YAML, terminated by a zero byte.
    description = np.frombuffer(yaml.safe_dump(options).encode() + b"\0", np.int8)
    rows = {name: np.ascontiguousarray(np.atleast_2d(value)) for name, value in arrays.items()}
    np.savez(path, **rows, **{"special:model.yml": description})  # type: ignore[arg-type]


def marian_options(config: VanillaTransformerConfig) -> dict[str, Any]:
    """
    The network as Marian's options, without shared matrices.

    Raises:
        ValueError: Marian does not support a setting.
    """
    refuse_what_marian_has_not(config)
    if config.activation_function not in ACTIVATIONS:
        raise ValueError(f"Marian has no activation_function={config.activation_function!r}: use relu or silu")
    heads = config.encoder_attention_heads, config.decoder_attention_heads
    if heads[0] != heads[1]:
        raise ValueError(
            f"Marian has one number of heads for both stacks, but encoder_attention_heads={heads[0]} and "
            f"decoder_attention_heads={heads[1]}"
        )
    return {
        "type": "transformer",
        "dim-vocabs": [config.vocab_size, config.decoder_vocab_size],
        "dim-emb": config.d_model,
        "enc-depth": config.encoder_layers,
        "dec-depth": config.decoder_layers,
        "transformer-heads": heads[0],
        "transformer-dim-ffn": config.encoder_ffn_dim,
        "transformer-decoder-dim-ffn": config.decoder_ffn_dim,
        "transformer-ffn-activation": ACTIVATIONS[config.activation_function],
        "transformer-preprocess": "",
        "transformer-postprocess": "dan",
        "transformer-postprocess-emb": "d",
    }


def write_vocabulary(size: int, eos: int, unknown: int, path: str | Path) -> None:
    """
    Writes a vocabulary of numbers, so that Marian reads and writes ids separated by spaces.

    Args:
        size: number of ids.
        eos: the id that ends a sentence, which Marian adds to each source and removes from each output.
        unknown: the id of unknown tokens, which Marian requires.
        path: the output file, whose name ends in ".txt".
    """
    words = [str(number) for number in range(size)]
    words[eos], words[unknown] = "</s>", "<unk>"
    Path(path).write_text("".join(f"{word}\n" for word in words), encoding="utf-8")

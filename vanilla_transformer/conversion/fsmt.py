"""Imports transformers' own `FSMTForConditionalGeneration`, fairseq's Transformers of WMT19.

    model = from_fsmt(FSMTForConditionalGeneration.from_pretrained("wmt19-en-de-folder"))

It is a post-norm Transformer with the same parameter names as ours, but other sinusoids: fairseq stretches the
wavelengths so that the last one is exactly 2 pi * 10000, and the first position is the padding token's id plus one. No
permutation of the d_model axis turns them into the paper's, so their table becomes one of learned positions.
"""

import copy

import torch
from transformers import FSMTForConditionalGeneration

from ..configuration_vanilla_transformer import VanillaTransformerConfig
from ..modeling_vanilla_transformer import VanillaTransformerForConditionalGeneration


# The fields that mean the same in both configurations.
FIELDS = """
    d_model encoder_layers decoder_layers encoder_attention_heads decoder_attention_heads encoder_ffn_dim
    decoder_ffn_dim activation_function dropout attention_dropout activation_dropout scale_embedding init_std
    max_position_embeddings tie_word_embeddings pad_token_id bos_token_id eos_token_id decoder_start_token_id
""".split()  # noqa: SIM905 -- a list of nineteen strings takes nineteen lines
LAYER_NORM_EPS = 1e-5


def from_fsmt(model: FSMTForConditionalGeneration) -> VanillaTransformerForConditionalGeneration:
    """
    Makes a model of this package with the outputs of an FSMT model.

    The generation config is copied. Two things differ: source and output are limited to `max_position_embeddings`
    tokens, where FSMT would compute more sinusoids; and a padding token within a target is an ordinary token, which
    FSMT masks. `encoder_layerdrop` and `decoder_layerdrop`, which only matter in training, are ignored.

    Args:
        model: on any device, in any dtype; the result has the same. It is not changed.
    """
    config = model.config
    ours = VanillaTransformerForConditionalGeneration(
        VanillaTransformerConfig(
            **{name: getattr(config, name) for name in FIELDS},
            vocab_size=config.src_vocab_size,
            decoder_vocab_size=config.tgt_vocab_size,
            position_embedding_type="learned",
            layer_norm_eps=LAYER_NORM_EPS,
            # FSMT ties all three matrices or none.
            share_encoder_decoder_embeddings=config.tie_word_embeddings,
        )
    )
    state = model.state_dict()
    for stack in ("encoder", "decoder"):
        name = f"model.{stack}.embed_positions.weight"
        first = config.pad_token_id + 1
        state[name] = state[name][first : first + config.max_position_embeddings]
    if config.tie_word_embeddings:
        state["model.shared.weight"] = state["model.encoder.embed_tokens.weight"]
    state["lm_head.weight"] = state.pop("model.decoder.output_projection.weight")
    state["lm_head.bias"] = torch.zeros(config.tgt_vocab_size)
    ours.to(model.device, model.dtype).load_state_dict(state)
    ours.generation_config = copy.deepcopy(model.generation_config)
    return ours.train(model.training)

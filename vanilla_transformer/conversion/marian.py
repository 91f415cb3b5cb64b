"""Converts from and to transformers' own `MarianMTModel`: imports OPUS-MT, and exports to users without our package.

    model = from_marian(MarianMTModel.from_pretrained("opus-mt-folder"))
    to_marian(model).save_pretrained("folder")

Both are post-norm Transformers with the paper's sinusoids, but Marian has all sines before all cosines, where the paper
interleaves them. Nothing in the network depends on the order of the d_model axis as long as all matrices agree on it.
So every matrix that reads or writes this axis is reordered, and the outputs do not change.

Sentences padded on the left are the exception: Marian's positions count columns, ours count tokens.
"""

import copy

import torch
from transformers import GenerationConfig, MarianConfig, MarianMTModel

from ..configuration_vanilla_transformer import VanillaTransformerConfig
from ..modeling_vanilla_transformer import VanillaTransformerForConditionalGeneration


# The fields that mean the same in both configurations.
FIELDS = """
    vocab_size decoder_vocab_size d_model encoder_layers decoder_layers encoder_attention_heads decoder_attention_heads
    encoder_ffn_dim decoder_ffn_dim activation_function dropout attention_dropout activation_dropout scale_embedding
    max_position_embeddings pad_token_id bos_token_id eos_token_id decoder_start_token_id
""".split()  # noqa: SIM905 -- a list of nineteen strings takes nineteen lines
LAYER_NORM_EPS = 1e-5
# Parameters whose second (READS) or first (WRITES) axis is d_model.
READS = tuple(f"{name}.weight" for name in ("shared", "embed_tokens", "q_proj", "k_proj", "v_proj", "fc1", "lm_head"))
WRITES = tuple(f"{name}.{kind}" for name in ("out_proj", "fc2", "layer_norm") for kind in ("weight", "bias"))


def from_marian(model: MarianMTModel) -> VanillaTransformerForConditionalGeneration:
    """
    Makes a model of this package with the outputs of a `MarianMTModel`, such as those of OPUS-MT.

    `generate()` gives the same outputs too: the generation config is copied, with the padding token as the decoder's
    first input, and the ban on it in outputs (`bad_words_ids`), if the model has them. Training differs:
    `encoder_layerdrop` and `decoder_layerdrop` are ignored, and the output bias, which is constant in Marian, can be
    trained.

    Args:
        model: on any device, in any dtype; the result has the same. It is not changed.

    Raises:
        ValueError: `d_model` is odd, so one sine lacks its cosine.
    """
    config = model.config
    if config.d_model % 2:
        raise ValueError(f"d_model={config.d_model} is odd, but here sinusoids come in pairs of sine and cosine")
    # Marian shares one table between both sides only if the output matrix is tied to it too.
    shared = config.share_encoder_decoder_embeddings and config.tie_word_embeddings
    ours = VanillaTransformerForConditionalGeneration(
        VanillaTransformerConfig(
            **{name: getattr(config, name) for name in FIELDS},
            init_std=config.init_std,
            layer_norm_eps=LAYER_NORM_EPS,
            share_encoder_decoder_embeddings=shared,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    # Our unit 2i is Marian's i, and 2i + 1 is its d_model / 2 + i.
    order = torch.arange(config.d_model).view(2, -1).T.flatten()
    state = _reordered(model.state_dict(), order, shared)
    state = {name: value for name, value in state.items() if "embed_positions" not in name}
    state["lm_head.bias"] = state.pop("final_logits_bias")[0]
    ours.to(model.device, model.dtype).load_state_dict(state)
    ours.generation_config = copy.deepcopy(model.generation_config)
    return ours.train(model.training)


def to_marian(model: VanillaTransformerForConditionalGeneration) -> MarianMTModel:
    """
    Makes a `MarianMTModel` with the outputs of a model of this package. Once saved, it needs only transformers' code.

    `generate()` gives the same outputs with the model's generation config. If that sets no maximum length, Marian's
    limit is its last position, `max_position_embeddings`, where ours is 50 tokens more than the source. Translations
    that end before are the same.

    Args:
        model: on any device, in any dtype; the result has the same. It is not changed.

    Raises:
        ValueError: Marian does not support a setting of the model or its generation config. The message says which and
            why.
    """
    config = model.config
    refuse_what_marian_has_not(config)
    generation_config = _generation_config(model)
    shared = config.share_encoder_decoder_embeddings and config.tie_word_embeddings
    marian = MarianMTModel(
        MarianConfig(
            **{name: getattr(config, name) for name in FIELDS},
            forced_eos_token_id=None,
            share_encoder_decoder_embeddings=shared,
            tie_word_embeddings=config.tie_word_embeddings,
            **({"init_std": config.init_std} if config.init_std else {}),
        )
    )
    order = torch.arange(config.d_model).view(-1, 2).T.flatten()  # the even units, then the odd ones
    state = _reordered(model.state_dict(), order, shared)
    state["final_logits_bias"] = state.pop("lm_head.bias")[None]
    positions = {name: value for name, value in marian.state_dict().items() if "embed_positions" in name}
    marian.to(model.device, model.dtype).load_state_dict(state | positions)
    marian.generation_config = generation_config
    return marian.train(model.training)


def refuse_what_marian_has_not(config: VanillaTransformerConfig) -> None:
    """
    Raises:
        ValueError: transformers' Marian and the C++ program do not support this network.
    """
    if config.normalize_before:
        raise ValueError("Marian normalises after each sub-layer only, but normalize_before=True")
    if config.position_embedding_type != "sinusoidal":
        raise ValueError(
            f"Marian has sinusoids only, but position_embedding_type={config.position_embedding_type!r}: it does not "
            "save a table of positions"
        )
    if config.layer_norm_eps != LAYER_NORM_EPS:
        raise ValueError(f"Marian's norms add {LAYER_NORM_EPS} always, but layer_norm_eps={config.layer_norm_eps}")
    refuse_other_heads(config, "Marian")


def refuse_other_heads(config: VanillaTransformerConfig, runtime: str) -> None:
    """
    Raises:
        ValueError: a head's width is not `d_model` divided by the number of heads, as `runtime` requires.
    """
    for stack in ("encoder", "decoder"):
        heads = getattr(config, f"{stack}_attention_heads")
        for name in ("d_kv", "d_v"):
            width = getattr(config, name)
            if width is not None and width * heads != config.d_model:
                raise ValueError(
                    f"{runtime} divides d_model by the number of heads, but {name}={width} is not "
                    f"d_model={config.d_model} / {stack}_attention_heads={heads}"
                )


def _generation_config(model: VanillaTransformerForConditionalGeneration) -> GenerationConfig:
    """The model's generation config for transformers' own searches. Refuses options that they lack."""
    config = copy.deepcopy(model.generation_config)
    form, coverage = getattr(config, "length_penalty_form", None), getattr(config, "coverage_penalty", None)
    if form not in (None, "power"):
        raise ValueError(f"transformers' search divides by a power of the length, but length_penalty_form={form!r}")
    if coverage:
        raise ValueError(f"transformers' search does not look at attention, but coverage_penalty={coverage}")
    if config.num_beam_groups not in (None, 1):
        raise ValueError(f"transformers' search has no groups of beams, but num_beam_groups={config.num_beam_groups}")
    # compute_type affects speed, not the outputs that the search looks for.
    for name in ("length_penalty_form", "coverage_penalty", "compute_type"):
        vars(config).pop(name, None)
    if config.max_length is None and config.max_new_tokens is None:
        config.max_length = model.config.max_position_embeddings
    return config


def _reordered(state: dict[str, torch.Tensor], order: torch.Tensor, shared: bool) -> dict[str, torch.Tensor]:
    """Permutes the d_model axis of every parameter by `order`, and drops the shared table if nothing reads it."""
    found = {}
    for name, value in state.items():
        if name == "model.shared.weight" and not shared:
            continue
        if name.endswith(READS):
            value = value[:, order]
        elif name.endswith(WRITES):
            value = value[order]
        found[name] = value
    return found

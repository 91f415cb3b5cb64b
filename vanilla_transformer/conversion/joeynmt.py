"""Imports a model of JoeyNMT (https://github.com/joeynmt/joeynmt): the folder of a run, or one of its checkpoints.

    model, tokenizer = from_joeynmt("models/wmt14_ende")

reads `config.yaml`, `src_vocab.txt`, `trg_vocab.txt` and `best.ckpt`, as JoeyNMT's own `translate` does.
"""

from pathlib import Path
from typing import Any

import yaml
from tokenizers import Regex, Tokenizer, decoders, normalizers
from transformers import PreTrainedTokenizerFast

from ..configuration_vanilla_transformer import VanillaTransformerConfig
from ..modeling_vanilla_transformer import VanillaTransformerForConditionalGeneration
from .checkpoints import (
    TARGET_ONLY,
    JointVocabulary,
    Weights,
    character_tokenizer,
    copy_modules,
    copy_tables,
    join_vocabularies,
    layer_modules,
    pack_tokenizer,
    read_pickle,
    refuse_other_positions,
    sentencepiece_tokenizer,
    take_tables,
    word_tokenizer,
)


LAYER_NAMES = {
    "encoder": {
        **{f"self_attn.{letter}_proj": f"src_src_att.{letter}_layer" for letter in "qkv"},
        "self_attn.out_proj": "src_src_att.output_layer",
        "self_attn_layer_norm": "layer_norm",
        "fc1": "feed_forward.pwff_layer.0",
        "fc2": "feed_forward.pwff_layer.3",
        "final_layer_norm": "feed_forward.layer_norm",
    },
    "decoder": {
        **{f"self_attn.{letter}_proj": f"trg_trg_att.{letter}_layer" for letter in "qkv"},
        "self_attn.out_proj": "trg_trg_att.output_layer",
        "self_attn_layer_norm": "x_layer_norm",
        **{f"encoder_attn.{letter}_proj": f"src_trg_att.{letter}_layer" for letter in "qkv"},
        "encoder_attn.out_proj": "src_trg_att.output_layer",
        "encoder_attn_layer_norm": "dec_layer_norm",
        "fc1": "feed_forward.pwff_layer.0",
        "fc2": "feed_forward.pwff_layer.3",
        "final_layer_norm": "feed_forward.layer_norm",
    },
}
# JoeyNMT's defaults for fields that config.yaml lacks.
DEFAULTS = {
    "encoder": {"type": "recurrent", "hidden_size": 512, "ff_size": 2048, "num_layers": 8, "num_heads": 4},
    "decoder": {"type": "transformer", "hidden_size": 512, "ff_size": 2048, "num_layers": 4, "num_heads": 8},
}
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu"}
LAYER_NORM_EPS = 1e-6
SPECIALS = {"unk": (0, "<unk>"), "pad": (1, "<pad>"), "bos": (2, "<s>"), "eos": (3, "</s>")}
SPACE = "\u2581"


def from_joeynmt(source: str | Path) -> tuple[VanillaTransformerForConditionalGeneration, PreTrainedTokenizerFast]:
    """
    Makes a model with the outputs of a JoeyNMT Transformer, and its tokenizer.

    If source and target have different vocabularies, the model has one that contains both, source first: see
    `JointVocabulary`. These decoding settings are kept: `beam_size`, `beam_alpha`, `generate_unk`, `max_output_length`,
    no empty outputs, and no start token, separator or language tag in them. `no_repeat_ngram_size` and
    `repetition_penalty` are not, because JoeyNMT also applies them to the source.

    Args:
        source: the run's folder, from which `best.ckpt` or else the last checkpoint is read; or a checkpoint in it.

    Raises:
        ValueError: the checkpoint contains more than weights or does not match its configuration, or this package does
            not support the configuration. The message says what and why.
        FileNotFoundError: a file is missing.
    """
    checkpoint = _checkpoint(Path(source))
    folder = checkpoint.parent
    settings = _read_settings(folder / "config.yaml")
    specials = _specials(settings["data"].get("special_symbols") or {})
    vocabularies = [_read_vocabulary(folder / f"{side}_vocab.txt", specials) for side in ("src", "trg")]
    unknown = specials["unk"][1]
    joint = join_vocabularies(vocabularies[0], vocabularies[1], unknown)

    config = _config(settings["model"], specials, len(vocabularies[0]) if joint is None else len(joint.tokens))
    tokenizer = _tokenizer(settings["data"], folder, vocabularies[0], joint, specials)
    state = read_pickle(checkpoint)
    if not isinstance(state, dict) or "model_state" not in state:
        raise ValueError(f"{checkpoint} has no model_state, so it is not a checkpoint of JoeyNMT")
    model = VanillaTransformerForConditionalGeneration(config)
    _copy(model, Weights(state["model_state"], checkpoint), settings["model"], joint)
    _set_decoding(model, settings, specials, vocabularies[0] if joint is None else joint.tokens)
    return model.eval(), tokenizer


def _checkpoint(source: Path) -> Path:
    if source.is_file():
        return source
    if (source / "best.ckpt").is_file():
        return source / "best.ckpt"
    steps = sorted((path for path in source.glob("*.ckpt") if path.stem.isdigit()), key=lambda path: int(path.stem))
    if not steps:
        raise FileNotFoundError(f"{source} has no best.ckpt, and no other checkpoint of JoeyNMT")
    return steps[-1]


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not plain YAML: {error}") from error
    for place in (
        ("model", "encoder", "embeddings"),
        ("model", "decoder", "embeddings"),
        ("data", "src"),
        ("data", "trg"),
    ):
        inner: Any = settings
        for name in place:
            inner = inner.get(name) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            raise ValueError(f"{path} has no section {'.'.join(place)}, so it is not a configuration of JoeyNMT")
    return settings


def _specials(symbols: dict[str, Any]) -> dict[str, Any]:
    """The id and the text of each special token, and other tokens that must never be generated."""
    found: dict[str, Any] = {
        name: (symbols.get(f"{name}_id", number), symbols.get(f"{name}_token", token))
        for name, (number, token) in SPECIALS.items()
    }
    separator = symbols.get("sep_token")
    found["others"] = [*([separator] if separator else []), *symbols.get("lang_tags", [])]
    return found


def _read_vocabulary(path: Path, specials: dict[str, Any]) -> list[str]:
    """Numbers the tokens as JoeyNMT's `Vocabulary` does: special ones first, each once."""
    tokens = path.read_text(encoding="utf-8").splitlines()
    first = [specials[name][1] for name in SPECIALS] + specials["others"]
    tokens = list(dict.fromkeys([*first, *tokens]))
    for name in SPECIALS:
        number, token = specials[name]
        if tokens[number] != token:
            raise ValueError(f"{path}: {name}_token {token!r} is not at {name}_id={number}, as config.yaml says")
    return tokens


def _config(model: dict[str, Any], specials: dict[str, Any], vocab_size: int) -> VanillaTransformerConfig:
    stacks = {stack: {**DEFAULTS[stack], **model[stack]} for stack in ("encoder", "decoder")}
    for stack, settings in stacks.items():
        _refuse_unsupported(stack, settings)
    if model.get("initializer") == "xavier_normal":
        raise ValueError(
            "initializer: xavier_normal weights the residual connections (DeepNet), which is not supported"
        )
    encoder, decoder = stacks["encoder"], stacks["decoder"]
    norms = {"encoder": encoder.get("layer_norm", "absent"), "decoder": decoder.get("layer_norm", "post")}
    if norms["encoder"] == "absent":
        raise ValueError(
            "model.encoder.layer_norm is absent: then JoeyNMT's encoder normalises before its sub-layers, but not at "
            "its end, which is not supported here"
        )
    if norms["encoder"] != norms["decoder"]:
        raise ValueError(
            f"layer_norm is {norms['encoder']!r} in the encoder and {norms['decoder']!r} in the decoder: here both "
            "have one normalize_before"
        )
    scales = {stack: bool(settings["embeddings"].get("scale", False)) for stack, settings in stacks.items()}
    if model.get("tied_embeddings", False):
        scales["decoder"] = scales["encoder"]
    if scales["encoder"] != scales["decoder"]:
        raise ValueError("embeddings.scale differs in encoder and decoder: here both have one scale_embedding")
    return VanillaTransformerConfig(
        vocab_size=vocab_size,
        d_model=encoder["hidden_size"],
        encoder_layers=encoder["num_layers"],
        decoder_layers=decoder["num_layers"],
        encoder_attention_heads=encoder["num_heads"],
        decoder_attention_heads=decoder["num_heads"],
        encoder_ffn_dim=encoder["ff_size"],
        decoder_ffn_dim=decoder["ff_size"],
        activation_function=_same_in_both(stacks, "activation", "relu", ACTIVATIONS),
        dropout=encoder.get("dropout", 0.1),
        normalize_before=norms["encoder"] == "pre",
        scale_embedding=scales["encoder"],
        layer_norm_eps=LAYER_NORM_EPS,
        share_encoder_decoder_embeddings=model.get("tied_embeddings", False),
        tie_word_embeddings=model.get("tied_softmax", False),
        pad_token_id=specials["pad"][0],
        bos_token_id=specials["bos"][0],
        eos_token_id=specials["eos"][0],
        decoder_start_token_id=specials["bos"][0],
    )


def _refuse_unsupported(stack: str, settings: dict[str, Any]) -> None:
    if settings["type"] != "transformer":
        raise ValueError(f"model.{stack}.type is {settings['type']!r}: only transformer can be converted")
    if settings.get("alpha", 1.0) != 1.0:
        raise ValueError(
            f"model.{stack}.alpha={settings['alpha']} weights the residual connections, which is not supported"
        )


def _same_in_both(stacks: dict[str, dict[str, Any]], name: str, default: str, values: dict[str, str]) -> str:
    found = [settings.get(name, default) for settings in stacks.values()]
    for value in found:
        if value not in values:
            raise ValueError(f"{name} {value!r} is not supported, only {', '.join(values)}")
    if found[0] != found[1]:
        raise ValueError(f"{name} is {found[0]!r} in the encoder and {found[1]!r} in the decoder: here both have one")
    return values[found[0]]


def _copy(
    model: VanillaTransformerForConditionalGeneration,
    weights: Weights,
    settings: dict[str, Any],
    joint: JointVocabulary | None,
) -> None:
    config = model.config
    for stack, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        modules = layer_modules(stack, layers, LAYER_NAMES[stack], f"{stack}.layers.{{}}")
        if config.normalize_before:
            modules[f"model.{stack}.layer_norm"] = f"{stack}.layer_norm"
        copy_modules(model, weights, modules)
        refuse_other_positions(weights.take(f"{stack}.pe.pe")[0], config, f"{weights.origin}: {stack}.pe.pe")
    names = ("src_embed.lut.weight", "trg_embed.lut.weight", "decoder.output_layer.weight")
    shared, tied = settings.get("tied_embeddings", False), settings.get("tied_softmax", False)
    copy_tables(model, *take_tables(weights, names, shared, tied), None, joint)
    weights.refuse_left_over()


def _tokenizer(
    data: dict[str, Any],
    folder: Path,
    source: list[str],
    joint: JointVocabulary | None,
    specials: dict[str, Any],
) -> PreTrainedTokenizerFast:
    """Splits text like the source's tokenizer, and joins it like the target's."""
    sides = {side: data[side] for side in ("src", "trg")}
    for side, settings in sides.items():
        if settings.get("has_prompt", False):
            raise ValueError(f"data.{side}.has_prompt adds embeddings to those of a prompt, which is not supported")
        if (settings.get("tokenizer_cfg") or {}).get("pretokenizer", "none") != "none":
            raise ValueError(f"data.{side}.tokenizer_cfg.pretokenizer: transformers' tokenizers do not support it")
    tokens, unknown = source if joint is None else joint.tokens, specials["unk"][1]
    tokenizer, joining = (_splitter(sides[side], folder, tokens, source, unknown) for side in ("src", "trg"))
    tokenizer.normalizer = _chain(normalizers, _before(sides["src"]), tokenizer.normalizer)
    tokenizer.decoder = _chain(decoders, [decoders.Replace(TARGET_ONLY, ""), joining.decoder], *_after(sides["trg"]))
    return pack_tokenizer(tokenizer, {f"{name}_token": specials[name][1] for name in SPECIALS}, append_eos=True)


def _splitter(settings: dict[str, Any], folder: Path, tokens: list[str], source: list[str], unknown: str) -> Tokenizer:
    level, options = settings["level"], settings.get("tokenizer_cfg") or {}
    kind = settings.get("tokenizer_type", settings.get("bpe_type", "sentencepiece"))
    if level == "word":
        return word_tokenizer(tokens, unknown)
    if level == "char":
        return character_tokenizer(tokens, unknown, SPACE)
    if level == "bpe" and kind == "sentencepiece":
        path = Path(options["model_file"])
        beside = folder / path.name
        return sentencepiece_tokenizer(beside if beside.exists() else path, tokens, source, unknown)
    if level == "bpe" and kind == "subword-nmt":
        return word_tokenizer(tokens, unknown, joiner=options.get("separator", "@@"))
    raise ValueError(f"data level {level!r} with tokenizer_type {kind!r} is unknown")


REPLACED = {"\u2019": "'", "\u201c": '"', "\u201d": '"'}
SPACED = (" ?", " !", " ,", " .", " :")


def _before(settings: dict[str, Any]) -> list[normalizers.Normalizer]:
    """JoeyNMT's `pre_process`."""
    steps: list[normalizers.Normalizer] = []
    if settings.get("normalize", False):
        steps += [normalizers.NFKC(), *(normalizers.Replace(old, new) for old, new in REPLACED.items())]
        steps += [normalizers.Replace("\u200b", ""), normalizers.Replace(Regex("[ \u3000]+"), " ")]
        steps += [normalizers.Replace(old, old.strip()) for old in SPACED] + [normalizers.Strip()]
    if settings.get("lowercase", False):
        steps.append(normalizers.Lowercase())
    return steps


def _after(settings: dict[str, Any]) -> list[decoders.Decoder]:
    """What JoeyNMT's `post_process` does to the joined text."""
    if not settings.get("normalize", False):
        return []
    steps: list[decoders.Decoder] = [decoders.Fuse(), decoders.Replace("\u200b", "")]
    steps += [decoders.Replace(Regex("[ \u3000]+"), " "), *(decoders.Replace(old, old.strip()) for old in SPACED)]
    return [*steps, decoders.Strip(" ", 1, 1)]


def _chain(kind: Any, steps: list, *more: Any) -> Any:
    steps = [*steps, *(step for step in more if step is not None)]
    return kind.Sequence(steps) if steps else None


def _set_decoding(
    model: VanillaTransformerForConditionalGeneration,
    settings: dict[str, Any],
    specials: dict[str, Any],
    tokens: list[str],
) -> None:
    testing = settings.get("testing") or {}
    never = [specials["bos"][1], *specials["others"]]
    if not testing.get("generate_unk", True):
        never.append(specials["unk"][1])
    decoding = model.generation_config
    decoding.num_beams = testing.get("beam_size", 1)
    if decoding.num_beams > 1:
        # With an exponent of 0 the score is the sum of the log-probabilities.
        decoding.length_penalty = float(max(testing.get("beam_alpha", testing.get("alpha", -1)), 0))
        decoding.length_penalty_form = "gnmt"
        never.append(specials["pad"][1])
    decoding.min_new_tokens = 1
    decoding.suppress_tokens = sorted(tokens.index(token) for token in never)
    if testing.get("max_output_length", -1) > 0:
        decoding.max_new_tokens = testing["max_output_length"]

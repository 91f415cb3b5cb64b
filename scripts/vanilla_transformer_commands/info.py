"""Shows a model's sizes, and how it is decoded on this machine: `vanilla-transformer info MODEL`."""

from typing import TYPE_CHECKING

from .parser import CommandParser


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Labels of sizes -> the fields of the config for encoder and decoder.
SIZES = {
    "layers": ("encoder_layers", "decoder_layers"),
    "attention heads": ("encoder_attention_heads", "decoder_attention_heads"),
    "size of the FFN": ("encoder_ffn_dim", "decoder_ffn_dim"),
}
DECODING = ("num_beams", "length_penalty", "max_new_tokens")
COMPUTE_TYPES = ("float32", "bfloat16", "int8")


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(__doc__)
    parser.add_argument("model", help="folder or Hub name of the model")
    return parser


def main(argv: list[str]) -> None:
    """Loads the model and prints its properties, one per line."""
    arguments = build_parser().parse_args(argv)
    # Imported here to keep --help fast.
    from vanilla_transformer.tokenization_units import kind_of_tokens
    from vanilla_transformer.training.machine import machine
    from vanilla_transformer.training.saved_model import load_model

    model, tokenizer = load_model(arguments.model)
    config, decoding = model.config, model.generation_config.to_dict()
    lines = {
        "model": arguments.model,
        "parameters": f"{model.num_parameters():,} in {str(model.dtype).removeprefix('torch.')}",
        "d_model": config.d_model,
        **{name: f"{getattr(config, ours)} + {getattr(config, theirs)}" for name, (ours, theirs) in SIZES.items()},
        "norms": "before the sub-layers" if config.normalize_before else "after the sub-layers, as in the paper",
        "positions": config.position_embedding_type,
        "vocabulary": f"{len(tokenizer):,} {kind_of_tokens(tokenizer)}",
        **languages_in_words(tokenizer),
        "decoding": ", ".join(f"{name}={decoding[name]}" for name in DECODING if decoding.get(name) is not None),
        "machine": machine(),
        **{f"engine, {kind}": engine_in_words(model, kind) for kind in COMPUTE_TYPES},
    }
    print("\n".join(f"{name:18}{value}" for name, value in lines.items()))


def languages_in_words(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """The languages of a model of several directions."""
    if not (targets := getattr(tokenizer, "languages", [])):
        return {}
    return {"languages": f"from {', '.join(tokenizer.source_languages)} into {', '.join(targets)}"}


def engine_in_words(model: "PreTrainedModel", compute_type: str) -> str:
    """The engine that decodes the model here with this `compute_type`, and why no faster one can."""
    from vanilla_transformer.training.translator import engine_for

    try:
        name, reason = engine_for(model, compute_type=compute_type)
    except ValueError as error:
        return f"none: {error}"
    return f"{name}: {reason}" if reason else name

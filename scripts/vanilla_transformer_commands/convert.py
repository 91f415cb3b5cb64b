"""Converts a model of another framework: `vanilla-transformer convert SOURCE --format FORMAT --output FOLDER`.

SOURCE for each format:
  marian   folder of a MarianMTModel and its MarianTokenizer, such as an OPUS-MT model
  fsmt     folder of an FSMTForConditionalGeneration and its FSMTTokenizer
  joeynmt  folder of a JoeyNMT run (config.yaml, src_vocab.txt, trg_vocab.txt, best.ckpt), or a checkpoint in it
  eole     folder of an Eole model (config.json, vocab.json, model.00.safetensors)
  torch    state dict of a module around a torch.nn.Transformer (.pt or .safetensors); see the options for torch

AutoModelForSeq2SeqLM, AutoTokenizer and the other commands then load FOLDER. docs/interoperability.md lists what is
converted and what is refused.
"""

import argparse
import math
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from .parser import CommandParser


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMATS = ("marian", "fsmt", "joeynmt", "eole", "torch")
# Tables that transformers recomputes, although some folders contain them.
COMPUTED = ("embed_positions.weight",)


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(__doc__)
    parser.add_argument("source", type=Path, help="what to convert")
    parser.add_argument("--format", choices=FORMATS, required=True, help="format of the source")
    parser.add_argument("--output", type=Path, required=True, help="new folder to write the model into")
    torch = parser.add_argument_group("torch", "names of tensors, and settings that a state dict does not contain")
    torch.add_argument("--tokenizer", help="folder of the tokenizer; its bos token starts the decoder (required)")
    torch.add_argument("--heads", type=int, help="number of attention heads, nhead (required)")
    torch.add_argument("--source_embedding", metavar="NAME", help="source embedding table (required)")
    torch.add_argument("--target_embedding", metavar="NAME", help="target embedding table (default: the source's)")
    torch.add_argument("--output_projection", metavar="NAME", help="output matrix (default: the target embeddings)")
    torch.add_argument("--positions", metavar="NAME", help="position table (default: the paper's sinusoids)")
    torch.add_argument("--prefix", default="", help="prefix of the names before encoder.layers.0...")
    torch.add_argument("--norm_first", action="store_true", help="pre-norm: layers normalise before their sub-layers")
    torch.add_argument("--activation", choices=("relu", "gelu"), default="relu")
    torch.add_argument("--layer_norm_eps", type=float, default=1e-5)
    torch.add_argument("--unscaled", action="store_true", help="embeddings are not multiplied by sqrt(d_model)")
    return parser


def main(argv: list[str]) -> None:
    """Reads, converts, writes."""
    arguments = build_parser().parse_args(argv)
    # Imported here to keep --help fast.
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from vanilla_transformer.loading import refuse_other_tokenizer
    from vanilla_transformer.training.errors import UserError, message_of
    from vanilla_transformer.training.files import missing, new_folder

    if not arguments.source.exists():
        raise UserError(missing(arguments.source, "file or folder"))
    damaged = (OSError, RuntimeError, ImportError, SafetensorError, UnpicklingError)
    with new_folder("output", arguments.output) as folder:
        try:
            model, tokenizer = read(arguments)
            refuse_other_tokenizer(tokenizer, model.config)
        except (ValueError, StrictDataclassError, *damaged) as error:
            raise UserError(f"cannot convert {arguments.source}: {message_of(error)}") from error
        # A settings file of unexpected structure can raise almost anything in the loaders.
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise UserError(f"cannot convert {arguments.source}: one of its files is malformed: {error!r}") from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{arguments.source}: {model.num_parameters():,} parameters, saved in {arguments.output}")


def read(arguments: argparse.Namespace) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """
    The converted model and its tokenizer.

    Raises:
        ValueError, OSError: the source is damaged, contains code, or has features that this package lacks.
    """
    from vanilla_transformer.conversion.checkpoints import refuse_other_kind

    refuse_other_kind(arguments.source, arguments.format)
    if arguments.format == "joeynmt":
        from vanilla_transformer.conversion.joeynmt import from_joeynmt

        return from_joeynmt(arguments.source)
    if arguments.format == "eole":
        from vanilla_transformer.conversion.eole import from_eole

        return from_eole(arguments.source)
    if arguments.format == "torch":
        return read_torch(arguments)
    return read_transformers(arguments)


def read_transformers(arguments: argparse.Namespace) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A folder that transformers itself can load."""
    from transformers import FSMTForConditionalGeneration, MarianMTModel

    from vanilla_transformer.conversion.fsmt import from_fsmt
    from vanilla_transformer.conversion.marian import from_marian
    from vanilla_transformer.training.saved_model import load_tokenizer, refuse_other_weights

    kinds: dict[str, Any] = {
        "marian": (MarianMTModel, from_marian),
        "fsmt": (FSMTForConditionalGeneration, from_fsmt),
    }
    kind, convert = kinds[arguments.format]
    report_all = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    theirs, found = kind.from_pretrained(arguments.source, local_files_only=True, **report_all)
    if theirs.config.model_type != arguments.format or type(theirs).__name__ not in (theirs.config.architectures or []):
        raise ValueError(
            f"config.json describes {theirs.config.architectures} with model_type={theirs.config.model_type!r}, not "
            f"{kind.__name__}"
        )
    found["missing_keys"] = [name for name in found["missing_keys"] if not name.endswith(COMPUTED)]
    refuse_other_weights(found)
    tokenizer = load_tokenizer(str(arguments.source))
    model = convert(theirs.eval())
    if arguments.format == "marian":
        forbid_padding(model)
    return model, tokenizer


def forbid_padding(model: "PreTrainedModel") -> None:
    """Bans the padding token from outputs. Marian's decoder starts with it, and must not generate it."""
    forbidden = model.generation_config.bad_words_ids or []
    if [model.config.pad_token_id] not in forbidden:
        model.generation_config.bad_words_ids = [*forbidden, [model.config.pad_token_id]]


def read_torch(arguments: argparse.Namespace) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A state dict, with the settings of the command line."""
    from vanilla_transformer.conversion.checkpoints import read_pickle, read_safetensors
    from vanilla_transformer.conversion.torch_transformer import from_torch_transformer
    from vanilla_transformer.training.saved_model import load_tokenizer

    for name in ("tokenizer", "heads", "source_embedding"):
        if getattr(arguments, name) is None:
            raise ValueError(f"--format torch needs --{name}, which a state dict does not contain")
    if not 0 < arguments.layer_norm_eps < math.inf:
        raise ValueError(f"--layer_norm_eps {arguments.layer_norm_eps} must be above 0")
    source = arguments.source
    state = read_safetensors([source]) if source.suffix == ".safetensors" else read_pickle(source)
    tokenizer = load_tokenizer(arguments.tokenizer)
    model = from_torch_transformer(
        state,
        tokenizer,
        heads=arguments.heads,
        source_embedding=arguments.source_embedding,
        target_embedding=arguments.target_embedding,
        output=arguments.output_projection,
        positions=arguments.positions,
        prefix=arguments.prefix,
        normalize_before=arguments.norm_first,
        activation_function=arguments.activation,
        scale_embedding=not arguments.unscaled,
        layer_norm_eps=arguments.layer_norm_eps,
        origin=str(source),
    )
    return model, tokenizer

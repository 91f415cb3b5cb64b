"""Loads a saved model and its tokenizer, and refuses a folder whose files do not belong together."""

from typing import Any

from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vanilla_transformer import VanillaTransformerConfig  # importing it registers the Auto classes
from vanilla_transformer.engine_program import load_if_possible
from vanilla_transformer.loading import refuse_nonfinite_weights, refuse_other_tokenizer

from .errors import UserError


# Differences between weights and config.json that a message lists, at most.
SHOWN = 3


def load_model(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A saved model, ready to translate on the device that accelerate chooses, and its tokenizer.

    Raises:
        UserError: as `read_model` does.
    """
    model, tokenizer = read_model(folder)
    model = model.to(PartialState().device).eval()
    if model.device.type == "cpu":
        load_if_possible()
    return model, tokenizer


def read_model(folder: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A saved model and its tokenizer, from JSON and safetensors alone: no code that comes with them is run.

    Args:
        folder: or the name of a model of the Hub.
        options: of `from_pretrained`, fields of the config among them.

    Raises:
        UserError: there is no model of that name, its files are damaged, or they are not those of one model.
    """
    try:
        kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if kind != VanillaTransformerConfig.model_type:
            raise ValueError(
                f"config.json is that of a model_type {kind!r}, and {VanillaTransformerConfig.model_type!r} is needed: "
                "`vanilla-transformer convert` converts some others"
            )
        # Sizes that differ are told below, with what else differs, in place of a table.
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = AutoModelForSeq2SeqLM.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, **told, **options
        )
        refuse_other_weights(report)
        refuse_nonfinite_weights(model)
        tokenizer = load_tokenizer(folder)
        refuse_other_tokenizer(tokenizer, model.config)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"cannot load the model {folder!r}: {' '.join(str(error).split())}") from error
    # What a JSON file of another form makes of transformers' loaders is anybody's guess.
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the model {folder!r}: one of its JSON files is odd: {error!r}") from error
    return model, tokenizer


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a folder, or of a name of the Hub. No code that comes with it is run.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # The library tokenizers raises plain Exceptions.
    except Exception as error:
        raise UserError(f"tokenizer={folder} cannot be loaded: {' '.join(str(error).split())}") from error


def refuse_other_weights(report: dict[str, Any]) -> None:
    """
    Looks at the `loading_info` of `from_pretrained`, which fills with random numbers what a folder does not hold, and
    passes over what the network has no place for.

    Raises:
        ValueError: the weights are not those of the network that config.json describes.
    """
    wrong = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    wrong += [f"there is no place for {name}" for name in sorted(report["unexpected_keys"])]
    for name, stored, expected in sorted(report["mismatched_keys"]):
        wrong.append(f"{name} is {list(stored)}, where {list(expected)} is expected")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"the weights are not those of config.json: {'; '.join(wrong[:SHOWN])}{more}")

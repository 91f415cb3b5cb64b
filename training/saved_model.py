"""Loads a saved model and its tokenizer, and refuses folders whose files do not match each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from vanilla_transformer import VanillaTransformerConfig  # importing it registers the Auto classes
from vanilla_transformer.conversion.sentencepiece_model import from_sentencepiece
from vanilla_transformer.engine_program import load_if_possible
from vanilla_transformer.loading import refuse_nonfinite_weights, refuse_other_tokenizer

from .errors import UserError, message_of
from .model_names import find_folder_or_repository, find_model


# How many differences between weights and config.json a message lists at most.
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
    A saved model and its tokenizer, read from JSON and safetensors only: no code in the folder is run.

    Args:
        folder: a folder, or the Hub name of a model.
        options: arguments of `from_pretrained`, such as fields of the config.

    Raises:
        UserError: the model does not exist, its files are damaged, or they do not belong to one model.
    """
    folder = find_model(folder)
    try:
        refuse_other_type(folder, AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type)
        # refuse_other_weights reports wrong sizes with all other differences; transformers would print a table.
        report_all = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = AutoModelForSeq2SeqLM.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, **report_all, **options
        )
        refuse_other_weights(report)
        refuse_nonfinite_weights(model)
        tokenizer = _tokenizer_in(folder)
        refuse_other_tokenizer(tokenizer, model.config)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"cannot load the model {folder!r}: {message_of(error)}") from error
    # A JSON file of unexpected structure can raise almost anything in transformers' loaders.
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the model {folder!r}: one of its JSON files is malformed: {error!r}") from error
    return model, tokenizer


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a folder, of a Hub name, or of a SentencePiece model (a file `.model`). No code in the folder is
    run.

    Raises:
        UserError: the tokenizer is missing or damaged.
    """
    if folder.endswith(".model") and Path(folder).is_file():
        return _tokenizer_in(folder, from_sentencepiece)
    return _tokenizer_in(find_folder_or_repository(folder, TOKENIZER_CONFIG_FILE, "tokenizer="))


def _from_folder(folder: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _tokenizer_in(
    folder: str, load: Callable[[str], PreTrainedTokenizerBase] = _from_folder
) -> PreTrainedTokenizerBase:
    try:
        return load(folder)
    # The library tokenizers raises plain Exceptions.
    except Exception as error:
        raise UserError(f"tokenizer={folder} cannot be loaded: {message_of(error)}") from error


def refuse_other_type(folder: str, model_type: str) -> None:
    """
    Args:
        folder: a folder, or the Hub name of a model.
        model_type: what its config.json says.

    Raises:
        ValueError: it is not a model of this package. The message says how to use it.
    """
    if model_type == VanillaTransformerConfig.model_type:
        return
    from vanilla_transformer.conversion.checkpoints import OF_TRANSFORMERS

    path, needed = Path(folder), OF_TRANSFORMERS.get(model_type)
    if needed is None:
        advice = f"{', '.join(OF_TRANSFORMERS)} can be converted (`vanilla-transformer convert`)"
    elif not path.is_dir():
        advice = (
            f"download it (`hf download {folder} --local-dir {path.name}`), then `{_convert(path.name, model_type)}`"
        )
    elif all((path / name).is_file() for name in needed):
        advice = f"convert it first (`{_convert(folder, model_type)}`)"
    else:
        advice = (
            "it looks like an export (`vanilla-transformer export`): give the model that was exported, or load this "
            "one by transformers' AutoModelForSeq2SeqLM"
        )
    raise ValueError(
        f"config.json has model_type={model_type!r}, but {VanillaTransformerConfig.model_type!r} is needed: {advice}"
    )


def _convert(folder: str, model_type: str) -> str:
    return f"vanilla-transformer convert {folder} --format {model_type} --output NEW_FOLDER"


def refuse_other_weights(report: dict[str, Any]) -> None:
    """
    Checks the `loading_info` of `from_pretrained`, which initialises missing tensors at random and ignores unexpected
    ones.

    Raises:
        ValueError: the weights do not fit the network that config.json describes.
    """
    wrong = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    wrong += [f"{name} is unexpected" for name in sorted(report["unexpected_keys"])]
    for name, stored, expected in sorted(report["mismatched_keys"]):
        wrong.append(f"{name} is {list(stored)}, but {list(expected)} is expected")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"the weights do not fit config.json: {'; '.join(wrong[:SHOWN])}{more}")

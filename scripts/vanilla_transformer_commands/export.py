"""Writes a model for other runtimes: `vanilla-transformer export MODEL --format onnx --output FOLDER`.

`marian` writes a MarianMTModel, which transformers loads without this package. `ctranslate2`, `onnx` and `torch` are
for CTranslate2, ONNX runtimes and torch.export.load. Each folder includes the tokenizer. docs/interoperability.md says
what each format supports and how to use it.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from .parser import CommandParser


# The formats, and the extra package that each needs.
FORMATS = {"marian": None, "ctranslate2": "ctranslate2", "onnx": "onnxscript", "torch": None}


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(__doc__)
    parser.add_argument("model", help="folder or Hub name of the model")
    parser.add_argument("--format", choices=FORMATS, required=True, help="format to write")
    parser.add_argument("--output", type=Path, required=True, help="new folder to write into")
    parser.add_argument("--quantization", help="weight type for CTranslate2, such as int8 (default: float32)")
    return parser


def main(argv: list[str]) -> None:
    """Checks, loads, writes."""
    arguments = build_parser().parse_args(argv)
    # Imported here to keep --help fast.
    from vanilla_transformer.training.errors import UserError
    from vanilla_transformer.training.files import new_folder
    from vanilla_transformer.training.saved_model import load_model

    refuse(arguments)
    with new_folder("output", arguments.output) as folder:
        model, tokenizer = load_model(arguments.model)
        try:
            write(model, tokenizer, folder, arguments)
        except ValueError as error:
            raise UserError(str(error)) from error
        tokenizer.save_pretrained(folder)
    print(f"{arguments.model} for {arguments.format}, saved in {arguments.output}")


def refuse(arguments: argparse.Namespace) -> None:
    """
    Checks the options before the model is loaded.

    Raises:
        UserError: a package is missing, or an option does not apply to the format.
    """
    from vanilla_transformer.training.errors import UserError

    package = FORMATS[arguments.format]
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"--format {arguments.format} needs the package {package}: pip install {package}")
    if arguments.quantization is not None and arguments.format != "ctranslate2":
        raise UserError(f"--quantization {arguments.quantization} needs --format ctranslate2")


def write(model: Any, tokenizer: Any, folder: Path, arguments: argparse.Namespace) -> None:
    """
    Writes the model in the chosen format. ONNX and torch.export also get config.json, which has the special ids.

    Raises:
        ValueError: the format does not support a setting of the model.
    """
    if arguments.format == "marian":
        from vanilla_transformer.conversion.marian import to_marian

        to_marian(model).save_pretrained(folder)
    elif arguments.format == "ctranslate2":
        from vanilla_transformer.conversion.ctranslate2 import to_ctranslate2

        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        to_ctranslate2(model, tokens, folder, quantization=arguments.quantization, force=True)
    elif arguments.format == "onnx":
        from vanilla_transformer.conversion.onnx import to_onnx

        to_onnx(model, folder)
        model.config.save_pretrained(folder)
    else:
        from vanilla_transformer.conversion.export import to_torch_export

        to_torch_export(model, folder)
        model.config.save_pretrained(folder)

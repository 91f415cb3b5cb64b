"""Learns a tokenizer from the training split: `vanilla-transformer tokenizer --dataset phrasebook:en-de ...`.

Training learns a tokenizer by itself. Use this command to share one between runs: give them `--tokenizer FOLDER`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from vanilla_transformer.tokenization_units import kind_of_tokens
from vanilla_transformer.training.data.pairs import load_pairs
from vanilla_transformer.training.data.rows import extend_tokenizer, learn_tokenizer, training_split
from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.files import make_sure_of_folder
from vanilla_transformer.training.settings.arguments import DataArguments, TokenizerArguments
from vanilla_transformer.training.settings.options import OptionParser
from vanilla_transformer.training.words import counted


@dataclass
class OutputArguments:
    """Where the tokenizer goes."""

    output_dir: str = field(metadata={"help": "folder to save the tokenizer in; it must not contain a tokenizer"})


def build_parser() -> OptionParser:
    """The options."""
    groups = (OutputArguments, TokenizerArguments, DataArguments)
    return OptionParser(groups, usage="%(prog)s --output_dir FOLDER [--field value ...]", description=__doc__)


def main(argv: list[str]) -> None:
    """Learns, saves and shows one tokenizer."""
    # 1. what to do
    output, options, data = build_parser().parse_args_into_dataclasses(argv, look_for_args_file=False)
    check(output, options)

    # 2. the text
    train = training_split(load_pairs(data))

    # 3. its vocabulary
    tokenizer = learn_tokenizer(options, train)
    extend_tokenizer(tokenizer, options, data, train)

    # 4. a folder for AutoTokenizer
    tokenizer.save_pretrained(Path(output.output_dir))

    # 5. what came of it
    pairs = counted(len(train), "pair")
    print(f"{len(tokenizer)} {kind_of_tokens(tokenizer)} from {pairs}, saved in {output.output_dir}")
    print("  " + " | ".join(split_text(tokenizer, text=train[0]["source"])))
    print("  " + " | ".join(split_text(tokenizer, text_target=train[0]["target"])))


def check(output: OutputArguments, options: TokenizerArguments) -> None:
    """Raises UserError for an option that would be ignored, or a folder that would be overwritten."""
    make_sure_of_folder("output_dir", output.output_dir)
    if Path(output.output_dir, "tokenizer.json").exists():
        raise UserError(f"output_dir={output.output_dir} already holds a tokenizer: choose another, or delete it first")
    if options.tokenizer:
        raise UserError(
            f"tokenizer={options.tokenizer} exists already, but this command learns a new one: leave it out"
        )


def split_text(tokenizer: PreTrainedTokenizerBase, **text: str) -> list[str]:
    """Splits a text, which is the source or the target, at its tokens."""
    spans = tokenizer(**text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    (string,) = text.values()
    return [string[start:end].strip() for start, end in spans]

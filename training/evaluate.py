"""Scores a saved model: `vanilla-transformer evaluate MODEL --test_file SOURCE TARGET`.

It takes the same data as training: files, a Hub dataset, or `--dataset phrasebook:en-de`. Without data, it takes the
test data of the model's recipe.yaml.
"""

import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import cached_file

from .data.languages import direction_names, multilingual, target_languages
from .data.pairs import SPLITS, load_pairs
from .errors import DataError, UserError
from .files import make_sure_of_file, write_beside
from .metrics import format_groups, format_scores, score_groups, score_texts
from .model_names import find_model
from .program import run_program
from .saved_model import load_model
from .settings.arguments import DataArguments, DecodingArguments
from .settings.options import OptionParser, read_yaml
from .settings.recipe import read_recipe, recipe_parser
from .settings.rules import check_bleu_tokenizer, check_decoding
from .translator import translate
from .words import counted


@dataclass
class EvaluationArguments:
    """What to score, and how to translate. Decoding options default to the model's own."""

    split: str = field(default="test", metadata={"help": "train, validation or test"})
    batch_tokens: int = field(default=4096, metadata={"help": "maximum source tokens of a batch, padding included"})
    num_beams: int | None = field(default=None, metadata={"help": "beam size"})
    length_penalty: float | None = field(default=None, metadata={"help": "transformers' length_penalty"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "maximum length of a translation in tokens"})
    bleu_tokenize: str | None = field(
        default=None,
        metadata={"help": "sacrebleu's tokenizer for BLEU (default: from the model's recipe.yaml, else 13a)"},
    )
    output_file: str | None = field(default=None, metadata={"help": "write the scores here as JSON"})

    def __post_init__(self):
        check_decoding(self)

    def generation_options(self) -> dict:
        """The arguments of `generate()` that were given."""
        options = {name: getattr(self, name) for name in ("num_beams", "length_penalty", "max_new_tokens")}
        return {name: value for name, value in options.items() if value is not None}


def recipe_of(model: str) -> Path | None:
    """
    The recipe.yaml of a model's run, or None if there is none.

    Args:
        model: folder or Hub name. For a checkpoint, its run's folder is searched.
    """
    folder = Path(model).absolute()
    if folder.is_dir() and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
        model = str(folder.parent)
    path = cached_file(
        model,
        "recipe.yaml",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def data_of_run(parser: OptionParser, argv: list[str], model: str, split: str) -> DataArguments | None:
    """
    The data on which the recipe.yaml of a model's run has this split; None if it has no such data. Other fields of
    `argv` override the recipe.

    Args:
        parser: from `build_parser`.
        argv: the command line.
        model: folder or Hub name.
        split: "train", "validation" or "test".

    Raises:
        RecipeError: the recipe cannot be read.
    """
    recipe = recipe_of(model)
    if recipe is None:
        return None
    given = read_recipe(str(recipe), None, recipe_parser())
    name = next((name for name in ("dataset", f"{split}_file") if given.get(name)), None)
    if name is None:
        return None
    value = " ".join(given[name]) if isinstance(given[name], list) else given[name]
    print(f"no data was given, so {name}={value} is read, as in {recipe}")
    # Not the files of other splits.
    wanted = {option.name for option in fields(DataArguments)} - {f"{other}_file" for other in SPLITS if other != split}
    parser.set_defaults(**{name: value for name, value in given.items() if name in wanted})
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[1]


def bleu_tokenizer_of(model: str) -> tuple[str, str]:
    """
    The sacrebleu tokenizer with which a model's run was scored. BLEU with another is not comparable.

    Args:
        model: folder or Hub name. For a checkpoint, its run's folder is read.

    Returns:
        The name, and its origin in words: the run's recipe.yaml or, if there is none, the default.

    Raises:
        UserError: the recipe.yaml cannot be read, or names a tokenizer that cannot be used here.
    """
    name, origin = DecodingArguments.bleu_tokenize, "the default"
    path = recipe_of(model)
    if path is not None:
        recipe = read_yaml(path)
        name, origin = str(recipe.get("bleu_tokenize", name)), "as its recipe.yaml says"
    check_bleu_tokenizer(name)
    return name, origin


def build_parser() -> OptionParser:
    """The options."""
    usage = "%(prog)s MODEL [--field value ...]"
    parser = OptionParser((EvaluationArguments, DataArguments), usage=usage, description=__doc__)
    parser.add_argument("model", help="folder or Hub name of the model")
    return parser


def main(argv: list[str]) -> None:
    """Scores one split of the data that the command line or the model's recipe.yaml names."""
    parser = build_parser()
    arguments, data, options = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if arguments.output_file:
        make_sure_of_file("output_file", arguments.output_file)
    elif sys.__stdout__ is None:
        raise UserError("the standard output is closed, so the scores would be lost: name a file by --output_file")
    model_name = find_model(options.model)

    if not (data.dataset or data.train_file or data.validation_file or data.test_file):
        data = data_of_run(parser, argv, model_name, arguments.split) or data
    pairs = load_pairs(data)
    if arguments.split not in pairs:
        raise DataError(f"the data has no {arguments.split} split, only {', '.join(pairs)}: name one by --split")
    pairs = pairs[arguments.split]
    model, tokenizer = load_model(model_name)
    bleu_tokenize, origin = arguments.bleu_tokenize, "as told"
    if bleu_tokenize is None:
        bleu_tokenize, origin = bleu_tokenizer_of(model_name)
    decoding = arguments.generation_options()
    languages = target_languages(pairs) or ({"tgt_lang": data.direction[1]} if multilingual(tokenizer) else {})
    predictions = translate(model, tokenizer, list(pairs["source"]), arguments.batch_tokens, **languages, **decoding)
    references = list(pairs["target"])
    scores = score_texts(predictions, references, bleu_tokenize)
    groups = score_groups(predictions, references, names, bleu_tokenize) if (names := direction_names(pairs)) else {}
    used = model.generation_config.to_dict() | decoding | {"bleu_tokenize": f"{bleu_tokenize} ({origin})"}
    print(f"{options.model} on {counted(len(pairs), 'pair')} of the {arguments.split} split")
    told = ("num_beams", "length_penalty", "max_new_tokens", "bleu_tokenize")
    print(", ".join(f"{name}={used[name]}" for name in told if used.get(name) is not None))
    print(format_scores(scores))
    if groups:
        print(format_groups(groups))
        scores["groups"] = groups
    if arguments.output_file:
        write_beside(arguments.output_file, json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main, sys.argv[1:])

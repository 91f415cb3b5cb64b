"""Scores a saved model: `vanilla-transformer evaluate MODEL --test_file SOURCE TARGET`.

It takes the same data as training: files, a Hub dataset, or `--dataset phrasebook:en-de`. Without data, it takes the
test data of the model's recipe.yaml. `--compare OTHER` tests whether another model is better or worse. Each model may
also be a file of translations.
"""

import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import cached_file

from vanilla_transformer.tokenization_languages import multilingual

from .data.languages import target_languages
from .data.pairs import SPLITS, load_pairs, references_of
from .data.reading.lines import read_lines
from .differences import SUFFIXES, Difference, find_differences, format_differences, write_differences
from .errors import DataError, UserError
from .files import make_sure_of_file, write_beside
from .metric_names import DEFAULT_METRICS, METRICS
from .metrics import format_scores
from .model_names import find_model
from .program import run_program
from .saved_model import load_model
from .scores import format_groups, score_rows
from .settings.arguments import DataArguments, DecodingArguments
from .settings.options import OptionParser, read_yaml
from .settings.recipe import read_recipe, recipe_parser
from .settings.rules import check_bleu_tokenizer, check_decoding, check_metrics
from .significance import compare, format_comparison, refuse_too_many
from .translator import translate
from .words import counted


@dataclass
class EvaluationArguments:
    """What to score, and how to translate. Decoding options default to each model's own."""

    split: str = field(default="test", metadata={"help": "train, validation or test"})
    batch_tokens: int = field(default=4096, metadata={"help": "maximum source tokens of a batch, padding included"})
    num_beams: int | None = field(default=None, metadata={"help": "beam size"})
    length_penalty: float | None = field(default=None, metadata={"help": "transformers' length_penalty"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "maximum length of a translation in tokens"})
    bleu_tokenize: str | None = field(
        default=None,
        metadata={"help": "sacrebleu's tokenizer for BLEU (default: from the model's recipe.yaml, else 13a)"},
    )
    metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": f"scores to compute: {', '.join(METRICS)} (default: from the model's recipe.yaml, else "
            f"{' '.join(DEFAULT_METRICS)})"
        },
    )
    compare: list[str] | None = field(
        default=None,
        metadata={"help": "test for significant differences from these: folders or Hub names of models, or text files"},
    )
    differences_file: str | None = field(
        default=None,
        metadata={"help": "write the rows that the compared models translate differently here, as .tsv or .md"},
    )
    output_file: str | None = field(
        default=None, metadata={"help": "write the scores, intervals and comparisons here as JSON"}
    )

    def __post_init__(self):
        check_decoding(self)
        if self.differences_file and not self.compare:
            raise UserError(f"differences_file={self.differences_file} needs another model: name it by compare")
        if self.differences_file and not self.differences_file.endswith(SUFFIXES):
            raise UserError(f"differences_file={self.differences_file} must end in {' or '.join(SUFFIXES)}")

    def generation_options(self) -> dict:
        """The arguments of `generate()` that were given."""
        options = {name: getattr(self, name) for name in ("num_beams", "length_penalty", "max_new_tokens")}
        return {name: value for name, value in options.items() if value is not None}


class System(NamedTuple):
    """What is scored: a model with its tokenizer, or `texts`, translations from a file."""

    name: str
    texts: list[str] | None
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None

    def translate(self, pairs: Dataset, data: DataArguments, batch_tokens: int, **decoding) -> list[str]:
        """One translation for each row, into the language that the row names, or else `data`."""
        if self.texts is not None:
            return self.texts
        assert self.model is not None
        assert self.tokenizer is not None
        languages: dict = target_languages(pairs)
        if not languages and multilingual(self.tokenizer):
            languages = {"tgt_lang": data.direction[1]}
        return translate(self.model, self.tokenizer, list(pairs["source"]), batch_tokens, **languages, **decoding)


def open_system(name: str, rows: int) -> System:
    """
    Loads what a name stands for: a file of translations, if there is one, or a model.

    Args:
        name: path of a text file (plain or compressed), or folder or Hub name of a model.
        rows: the number of rows of the test set.

    Raises:
        DataError: the file has fewer or more lines than the test set has rows.
        UserError: the model cannot be loaded.
    """
    if not is_text(name):
        return System(name, None, *load_model(name))
    texts = list(read_lines(name))
    if len(texts) != rows:
        raise DataError(
            f"{name} has {counted(len(texts), 'line')}, but {counted(rows, 'row')} are scored: line N must translate "
            "row N"
        )
    return System(name, texts, None, None)


def is_text(name: str) -> bool:
    """Whether a name is that of a file of translations, and not of a model."""
    return Path(name).is_file()


class Scoring(NamedTuple):
    """The sacrebleu tokenizer for BLEU, where its name comes from, and the names of the metrics."""

    bleu_tokenize: str
    origin: str
    metrics: list[str]


def scoring_of(model: str, arguments: EvaluationArguments) -> Scoring:
    """
    How a model is scored: as the command line says, else as its run was scored, since other BLEU is not comparable.

    Args:
        model: folder or Hub name, or a file of translations. For a checkpoint, its run's folder is read.

    Raises:
        UserError: the recipe.yaml cannot be read, or names what cannot be used here.
    """
    recipe = recipe_of(model)
    try:
        found = read_yaml(recipe) if recipe else {}
    except UserError:
        # If the command line says how to score, the recipe is not needed.
        if not arguments.bleu_tokenize:
            raise
        found = {}
    tokenizer = str(found.get("bleu_tokenize", DecodingArguments.bleu_tokenize))
    origin = "as its recipe.yaml says" if recipe else "the default"
    metrics = found.get("metrics", list(DEFAULT_METRICS))
    scoring = Scoring(tokenizer, origin, metrics if isinstance(metrics, list) else [str(metrics)])
    if arguments.bleu_tokenize:
        scoring = scoring._replace(bleu_tokenize=arguments.bleu_tokenize, origin="as told")
    if arguments.metrics:
        scoring = scoring._replace(metrics=arguments.metrics)
    check_bleu_tokenizer(scoring.bleu_tokenize)
    check_metrics(scoring.metrics)
    return scoring


def recipe_of(model: str) -> Path | None:
    """
    The recipe.yaml of a model's run, or None if there is none.

    Args:
        model: folder or Hub name, or a file of translations. For a checkpoint, its run's folder is searched.
    """
    if is_text(model):
        return None
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


def build_parser() -> OptionParser:
    """The options."""
    usage = "%(prog)s MODEL [--field value ...]"
    parser = OptionParser((EvaluationArguments, DataArguments), usage=usage, description=__doc__)
    parser.add_argument("model", help="folder or Hub name of the model, or a file of translations")
    return parser


def main(argv: list[str]) -> None:
    """Scores one split of the data that the command line or the model's recipe.yaml names."""
    # 1. what to do; all that can be wrong is found before anything is translated
    parser = build_parser()
    arguments, data, options = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    check_outputs(arguments)
    model = options.model if is_text(options.model) else find_model(options.model)
    if not (data.dataset or data.train_file or data.validation_file or data.test_file):
        data = data_of_run(parser, argv, model, arguments.split) or data
    pairs = load_split(data, arguments.split)
    others = list(dict.fromkeys(arguments.compare or []))
    if others:
        refuse_too_many(len(pairs))
    systems = [open_system(name, len(pairs)) for name in (options.model, *others)]
    scoring = scoring_of(model, arguments)

    # 2. translations
    decoding = arguments.generation_options()
    ours, *theirs = (system.translate(pairs, data, arguments.batch_tokens, **decoding) for system in systems)

    # 3. scores
    results = score_rows(ours, pairs, scoring.bleu_tokenize, scoring.metrics)
    print(f"{options.model} on {counted(len(pairs), 'pair')} of the {arguments.split} split")
    print_settings(systems[0], decoding, scoring)
    print(format_scores(results["scores"], results.get("confidence")))
    if "groups" in results:
        print(f"\n{format_groups(results['groups'])}")

    # 4. comparisons
    if others:
        compare_all(options.model, ours, dict(zip(others, theirs, strict=True)), pairs, scoring, results, arguments)
    if arguments.output_file:
        flat = results["scores"] | {name: part for name, part in results.items() if name != "scores"}
        write_beside(arguments.output_file, json.dumps(flat, indent=2, ensure_ascii=False) + "\n")


def check_outputs(arguments: EvaluationArguments) -> None:
    """
    Raises:
        UserError: a file cannot be written, or the scores would be lost.
    """
    for option in ("output_file", "differences_file"):
        if path := getattr(arguments, option):
            make_sure_of_file(option, path)
    if not arguments.output_file and sys.__stdout__ is None:
        raise UserError("the standard output is closed, so the scores would be lost: name a file by --output_file")


def load_split(data: DataArguments, split: str) -> Dataset:
    """
    The rows to score.

    Raises:
        DataError: the data cannot be read, or has no such split.
    """
    pairs = load_pairs(data)
    if split not in pairs:
        raise DataError(f"the data has no {split} split, only {', '.join(pairs)}: name one by --split")
    return pairs[split]


def print_settings(system: System, decoding: dict, scoring: Scoring) -> None:
    """Prints how a system translates, and how BLEU is computed."""
    used = (system.model.generation_config.to_dict() | decoding) if system.model else {}
    used["bleu_tokenize"] = f"{scoring.bleu_tokenize} ({scoring.origin})"
    told = ("num_beams", "length_penalty", "max_new_tokens", "bleu_tokenize")
    print(", ".join(f"{name}={used[name]}" for name in told if used.get(name) is not None))


def compare_all(
    name: str,
    ours: list[str],
    others: dict[str, list[str]],
    pairs: Dataset,
    scoring: Scoring,
    results: dict,
    arguments: EvaluationArguments,
) -> None:
    """
    Compares our translations with those of each other system: prints tables, writes `differences_file`, and adds the
    `comparisons` (significance.py) to the results.
    """
    references = references_of(pairs)
    results["comparisons"] = compare(ours, others, references, scoring.bleu_tokenize, scoring.metrics)
    differences: dict[str, list[Difference]] = {}
    for other, comparison in results["comparisons"].items():
        differences[other] = find_differences(list(pairs["source"]), references, ours, others[other])
        table = format_comparison(name, other, len(pairs), results["scores"], results["confidence"], comparison)
        print(f"\n{table}\n\n{format_differences(name, other, differences[other])}")
    if arguments.differences_file:
        write_differences(arguments.differences_file, name, differences)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])

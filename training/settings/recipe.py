"""Reads recipes and command lines: `[RECIPE.yaml] [--variant NAME] [--field value ...]`. Later values override."""

import argparse
import logging
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import is_torch_bf16_gpu_available

from vanilla_transformer import VanillaTransformerConfig
from vanilla_transformer.engine_products import is_native

from ..errors import RecipeError, message_of
from ..files import likely_names
from . import rules
from .arguments import (
    DataArguments,
    DecodingArguments,
    MixtureArguments,
    ModelArguments,
    TokenizerArguments,
    TrainingArguments,
)
from .corpora import Corpus, Stage, check_corpora, read_corpora, read_stages
from .options import OptionParser, as_yaml, mapping, plain, read_yaml, true_or_false, truth_or_text


logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parents[1] / "recipes"
# Fields that hold paths, and fields that hold a path or a Hub name.
PATHS = ("output_dir", "data_dir", "train_file", "validation_file", "test_file", "fsdp_config", "deepspeed")
PATHS_OR_NAMES = ("model", "tokenizer", "dataset")


class Recipe(NamedTuple):
    """All settings of a run. `given` holds those that differ from the defaults; it is a recipe of its own."""

    model: ModelArguments
    tokenizer: TokenizerArguments
    data: DataArguments
    mixture: MixtureArguments
    decoding: DecodingArguments
    training: TrainingArguments
    given: dict[str, Any]

    @property
    def corpora(self) -> list[Corpus]:
        """The training corpora."""
        return read_corpora(self.data, self.mixture)

    @property
    def stages(self) -> list[Stage]:
        """The stages of the run, in order."""
        return read_stages(self.mixture, self.corpora, self.training)


ABOUT = """\
Trains a model from a recipe: a YAML file whose fields are these options. Give its path, or the name of an installed
recipe, such as quickstart.yaml. Options on the command line override the recipe. docs/training.md explains them all."""


def recipe_parser() -> OptionParser:
    """The parser of recipes and command lines."""
    groups = (
        ModelArguments,
        TokenizerArguments,
        DataArguments,
        MixtureArguments,
        DecodingArguments,
        TrainingArguments,
    )
    usage = "%(prog)s [RECIPE.yaml] [--variant NAME] [--field value ...]"
    # The config's defaults for the fields of the network.
    defaults = {option.name: getattr(VanillaTransformerConfig, option.name, None) for option in fields(ModelArguments)}
    parser = OptionParser(
        groups, hidden=rules.REFUSED, defaults=defaults, usage=usage, description=ABOUT, conflict_handler="resolve"
    )
    parser.add_argument("--variant", help="one of the recipe's variants, e.g. a row of table3.yaml")
    # transformers' option takes only true and false.
    help_bf16 = "mixed precision in bfloat16: true, false, or auto (true if the hardware supports bfloat16)"
    parser.add_argument("--bf16", type=_true_false_or_auto, nargs="?", const=True, default=False, help=help_bf16)
    # transformers reads true and false as text here.
    helps = {option.name: option.metadata["help"] for option in fields(TrainingArguments)}
    parser.add_argument("--fsdp", type=truth_or_text, nargs="?", const=True, help=helps["fsdp"])
    trackio = ("--trackio_static_space_id", "--trackio-static-space-id")
    parser.add_argument(*trackio, type=truth_or_text, help=helps["trackio_static_space_id"])
    # transformers' parser would make a dict of the letters.
    for option in fields(MixtureArguments):
        if option.default is None:
            several: dict[str, Any] = {"nargs": "+"} if option.name == "stages" else {}
            parser.add_argument(f"--{option.name}", type=mapping, help=option.metadata["help"], **several)
    return parser


def parse_recipe(argv: list[str]) -> Recipe:
    """
    Reads `[RECIPE.yaml] [--variant NAME] [--field value ...]`. Later values override.

    Args:
        argv: the command line. A recipe is a path, or the name of one that is installed with the package.

    Raises:
        RecipeError: the recipe cannot be read, a field does not exist, or its value is invalid.
        SystemExit: after `--help`.
    """
    parser = recipe_parser()
    defaults = vars(parser.parse_args([]))
    name = argv[0] if argv and not argv[0].startswith("-") else None
    argv = argv[1:] if name else argv
    variant = parser.parse_args(argv).variant
    if name:
        parser.set_defaults(**read_recipe(name, variant, parser))
    elif variant:
        raise RecipeError(f"--variant {variant} needs a recipe that has it, as the first argument")
    told = vars(parser.parse_args(argv))
    given = {field: plain(told[field]) for field in parser.hints if told[field] != defaults[field]}
    if given.get("bf16") == "auto":
        given["bf16"] = resolve_bf16(parser.parse_args(argv), parser)
        argv = [*argv, "--bf16", str(given["bf16"])]
    try:
        model, tokenizer, data, mixture, decoding, training, _ = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False
        )
    except (ValueError, OSError, ImportError) as error:  # a file or a package that an argument asks for is not there
        raise RecipeError(message_of(error)) from error
    recipe = Recipe(model, tokenizer, data, mixture, decoding, training, given)
    rules.check_recipe(recipe)
    # Reads both, so that their faults are raised here.
    if recipe.stages and mixture.corpora is not None:
        check_corpora(recipe.corpora, training)
    # A model comes with its tokenizer.
    tokenizer.tokenizer = model.model or tokenizer.tokenizer
    return recipe


def _true_false_or_auto(value: str) -> bool | str:
    return value if value == "auto" else true_or_false(value)


def recipe_of_run(arguments: Any) -> Path | None:
    """
    The recipe.yaml of the run that these arguments resume, or None if there is none.

    Args:
        arguments: anything with `resume_from_checkpoint` and `output_dir`.
    """
    asked = arguments.resume_from_checkpoint
    if asked is None:
        return None
    recipe = Path(arguments.output_dir or "" if asked == "last" else Path(asked).parent, "recipe.yaml")
    return recipe if recipe.is_file() else None


def resolve_bf16(arguments: argparse.Namespace, parser: OptionParser) -> bool:
    """
    The value of `bf16: auto`: for a resumed run the value it began with, else whether the hardware supports bfloat16.
    """
    if recipe := recipe_of_run(arguments):
        began = bool(read_recipe(str(recipe), None, parser).get("bf16"))
        logger.info("bf16=auto is %s, as this run began", began)
        return began
    if arguments.use_cpu or not torch.accelerator.is_available():
        fast = is_native("bfloat16", torch.device("cpu"))
    elif torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = is_torch_bf16_gpu_available()
    logger.info("bf16=auto is %s: this machine has %s for bfloat16", fast, "instructions" if fast else "none")
    return fast


def read_recipe(name: str, variant: str | None, parser: OptionParser) -> dict[str, Any]:
    """
    The fields that a recipe sets, overridden by those of one of its `variants`.

    Raises:
        RecipeError: the file or variant does not exist, the file is not a YAML mapping, a field does not exist, or a
            value does not have its field's type.
    """
    path = next((p for p in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        raise RecipeError(_no_recipe(name))
    recipe = read_yaml(path)
    variants = recipe.pop("variants", None) or {}
    if not (isinstance(variants, dict) and all(isinstance(fields, dict) for fields in variants.values())):
        raise RecipeError(f"{path}: variants must hold lines of the form `name: {{field: value}}`")
    if variant is not None:
        if variant not in variants:
            raise RecipeError(f"{path} has no variant {variant!r}: choose one of {', '.join(variants) or 'none'}")
        recipe |= variants[variant]
    elif variants:
        raise RecipeError(f"{path} holds variants: choose one by --variant {'|'.join(variants)}")
    for field_name in recipe:
        if field_name not in parser.hints:
            likely = parser.likely(field_name)
            hint = f"did you mean {likely}?" if likely else "--help lists the fields"
            raise RecipeError(f"{path} sets the unknown field {field_name!r}: {hint}")
    try:
        return {field_name: parser.typed(field_name, value) for field_name, value in recipe.items()}
    except RecipeError as error:
        raise RecipeError(f"{path}, {error}") from error


def _no_recipe(name: str) -> str:
    """The message about a recipe that does not exist."""
    installed = sorted(path.name for path in RECIPES.glob("*.yaml"))
    likely = likely_names(name, "file") or " or ".join(get_close_matches(name, installed, n=1))
    if Path(name, "recipe.yaml").is_file():
        likely = str(Path(name, "recipe.yaml"))
    hint = f"did you mean {likely}?" if likely else f"give the path of a YAML file, or one of {', '.join(installed)}"
    return f"no recipe {name!r}: {hint}"


def lasting(given: dict[str, Any]) -> str:
    """A recipe, as YAML, that repeats the run with the changes of its command line."""
    return as_yaml({name: value for name, value in given.items() if name != "resume_from_checkpoint"})


def public(recipe: dict[str, Any]) -> dict[str, Any]:
    """
    A recipe to publish: only the last part of each path, since folder names may reveal who made the model, and from
    what.
    """

    def last(value: Any) -> Any:
        if isinstance(value, list):
            return [last(part) for part in value]
        return value if str(value).startswith("{") else Path(value).name

    local = {
        name
        for name in PATHS_OR_NAMES
        if (value := recipe.get(name)) and (value.startswith(("/", ".", "~", "$")) or Path(value).exists())
    }
    published = {
        name: last(value) if value and (name in PATHS or name in local) else value for name, value in recipe.items()
    }
    if corpora := recipe.get("corpora"):
        published["corpora"] = {name: public(fields) for name, fields in corpora.items()}
    return published

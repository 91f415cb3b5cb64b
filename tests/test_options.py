"""Every option that `train --help` lists, and every field of a recipe: its type says what a value means, and no value
ends a run by a traceback.

The values are made from the parser's own list: of a wrong type, out of range, null, and the default.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed

from vanilla_transformer.training import train
from vanilla_transformer.training.arguments import (
    REFUSED_BY_SYSTEM,
    DataArguments,
    RecipeError,
    TokenizerArguments,
    UserError,
    parse_recipe,
    read_recipe,
    recipe_parser,
)
from vanilla_transformer.training.preflight import check_inputs, check_plan, require


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
RECIPE = """
train_file: [{folder}/train.en, {folder}/train.de]
validation_file: [{folder}/train.en, {folder}/train.de]
vocab_size: 270
d_model: 16
encoder_layers: 1
decoder_layers: 1
encoder_attention_heads: 2
decoder_attention_heads: 2
encoder_ffn_dim: 16
decoder_ffn_dim: 16
per_device_train_batch_tokens: 100
warmup_steps: 1
learning_rate: 0.01
max_steps: 2
max_new_tokens: 3
num_beams: 1
eval_strategy: steps
eval_steps: 2
save_strategy: steps
save_steps: 2
metric_for_best_model: loss
report_to: none
disable_tqdm: true
output_dir: {folder}/run
"""


PARSER = recipe_parser()
HINTS = PARSER.hints
ACTIONS = {action.dest: action for action in reversed(PARSER._actions) if action.dest in HINTS}
DEFAULTS = vars(PARSER.parse_args([]))
# What decides which data there are, and which ids.
OF_DATA = {option.name for group in (DataArguments, TokenizerArguments) for option in fields(group)} | {"model", "bf16"}

# What the Trainer may or may not do, each in a way of its own. torch.compile takes minutes.
CHOICES = {name for name in ACTIONS if ACTIONS[name].choices or bool in get_args(HINTS[name]) or HINTS[name] is bool}
CHOICES -= {"torch_compile", "log_level", "log_level_replica", "hub_strategy", "hub_always_push", "hub_private_repo"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple:
    """The data of the recipe, for fields that have no part in it."""
    folder = tmp_path_factory.mktemp("prepared")
    write_data(folder)
    return train.prepare_data(parse_recipe(recipe_with(folder)))


def write_data(folder: Path) -> None:
    for side, words in (("en", WORDS), ("de", WORDS[::-1])):
        lines = [" ".join(words[:n]) for n in range(1, 11)] * 2
        (folder / f"train.{side}").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Twenty rows, and nothing outside; what a run changes of the process is changed back."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name, value in list(os.environ.items()):
        monkeypatch.setenv(name, value)
    write_data(tmp_path)
    level = logging.getLogger("transformers").level
    yield tmp_path
    logging.getLogger("transformers").setLevel(level)
    torch.use_deterministic_algorithms(False)
    set_seed(0)


def recipe_with(folder: Path, **fields: Any) -> list[str]:
    """A recipe of a tiny run with some fields changed; text as it stands."""
    told = yaml.safe_load(RECIPE.format(folder=folder)) | fields
    (folder / "recipe.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    return [str(folder / "recipe.yaml")]


@pytest.fixture
def refusal(folder, prepared, monkeypatch) -> Callable[..., str | None]:
    """
    Does all that a run does before its first update, and trains it where that can make a difference; tells what the
    run is refused with, if it is.
    """

    def start(name: str, value: Any) -> str | None:
        try:
            recipe = parse_recipe(recipe_with(folder, **{name: value}))
            with monkeypatch.context() as patch:
                if name not in OF_DATA:
                    patch.setattr(train, "prepare_data", lambda _: prepared)
                run = train.prepare(recipe)
            require(check_inputs(run))
            trainer = train.build_trainer(recipe, run.model, run.tokenizer, run.rows)
            require(check_plan(run, trainer))
            if name in CHOICES:
                trainer.train()
        except (UserError, StrictDataclassError) as error:
            return str(error)
        except OSError as error:
            if error.errno not in REFUSED_BY_SYSTEM:
                raise
            return str(error)
        return None

    return start


def kinds_of(name: str) -> set[Any]:
    hint = HINTS[name]
    return {get_origin(kind) or kind for kind in (hint, *get_args(hint))}


def wrong_type(name: str) -> list[str]:
    """Text that a field's type does not have."""
    if ACTIONS[name].choices:
        return ["nothing", "3"]
    text = {
        bool: ["maybe", "2", ""],
        int: ["many", "1.5", "4.0", "1e3", "", "true"],
        float: ["many", "", "true", "1,5"],
    }
    return next((text[kind] for kind in text if kind in kinds_of(name)), [])


def out_of_range(name: str) -> list[str]:
    """Values that a field's type has, and few fields a use for."""
    kinds = kinds_of(name)
    if ACTIONS[name].choices:
        return list(ACTIONS[name].choices)
    if bool in kinds:
        return ["true", "false"]
    if int in kinds:
        return ["-7", "0", "99"]
    if float in kinds:
        return ["-7", "0", "nan", "inf", "99"]
    return ["", "no/such/name", "~nobody/$UNSET", '{"a": 1}', "n" * 300]


@pytest.mark.parametrize("name", [name for name in ACTIONS if wrong_type(name)])
def test_a_value_of_a_wrong_type_is_refused_by_name_in_a_recipe_and_on_the_command_line(name, folder):
    for value in wrong_type(name):
        with pytest.raises(RecipeError, match=rf"^argument --{name}\b"):
            PARSER.parse_args([f"--{name}={value}"])
        (path,) = recipe_with(folder, **{name: value})
        with pytest.raises(RecipeError, match=rf"^{path}: argument --{name}\b"):
            read_recipe(path, None, PARSER)


@pytest.mark.parametrize("name", ACTIONS)
def test_null_is_a_value_where_the_type_has_it_and_a_default_that_is_written_down_is_the_default(name, folder):
    (path,) = recipe_with(folder, **{name: None})
    if NoneType in kinds_of(name):
        assert read_recipe(path, None, PARSER)[name] is None
    else:
        with pytest.raises(RecipeError, match=f"^{path}: argument --{name}: null is no value of it"):
            read_recipe(path, None, PARSER)
    if DEFAULTS[name] is not None:
        recipe_with(folder, **{name: DEFAULTS[name]})
        assert read_recipe(path, None, PARSER)[name] == DEFAULTS[name]


@pytest.mark.parametrize("name", ACTIONS)
def test_no_value_ends_a_run_by_a_traceback(name, refusal):
    """Some are refused, before the first update."""
    nothing = [None] if NoneType in kinds_of(name) and DEFAULTS[name] is not None else []
    for value in out_of_range(name) + nothing:
        assert refusal(name, value) != ""

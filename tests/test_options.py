"""Every option that `train --help` lists, and every field of a recipe: its type says what a value means, and no value
ends a run by a traceback.

The values are made from the parser's own list: of a wrong type, out of range, null, and the default.
"""

import functools
import logging
import os
import re
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
from vanilla_transformer.training.checks.inputs import check_inputs
from vanilla_transformer.training.checks.plan import check_plan
from vanilla_transformer.training.data.rows import prepare_data
from vanilla_transformer.training.errors import RecipeError, UserError
from vanilla_transformer.training.findings import require
from vanilla_transformer.training.program import REFUSED_BY_SYSTEM
from vanilla_transformer.training.settings.arguments import DataArguments, TokenizerArguments
from vanilla_transformer.training.settings.options import as_yaml, plain
from vanilla_transformer.training.settings.recipe import parse_recipe, read_recipe, recipe_parser
from vanilla_transformer.training.settings.rules import REFUSED


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

# Switches of the Trainer, each tested in its own way. torch.compile takes minutes.
CHOICES = {name for name in ACTIONS if ACTIONS[name].choices or bool in get_args(HINTS[name]) or HINTS[name] is bool}
CHOICES -= {"torch_compile", "log_level", "log_level_replica", "hub_strategy", "hub_always_push", "hub_private_repo"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple:
    """The recipe's data, for fields that do not concern data."""
    folder = tmp_path_factory.mktemp("prepared")
    write_data(folder)
    return prepare_data(parse_recipe(recipe_with(folder)))


def write_data(folder: Path) -> None:
    for side, words in (("en", WORDS), ("de", WORDS[::-1])):
        lines = [" ".join(words[:n]) for n in range(1, 11)] * 2
        (folder / f"train.{side}").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with twenty rows. Restores the state of the process that a run changes."""
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


@functools.cache
def recipe_in(folder: Path) -> dict[str, Any]:
    return yaml.safe_load(RECIPE.format(folder=folder))


def recipe_with(folder: Path, **fields: Any) -> list[str]:
    """A recipe of a tiny run with some fields changed; a text is written unchanged."""
    told = recipe_in(folder) | fields
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
    """Texts that are not values of a field's type."""
    if ACTIONS[name].choices:
        return ["nothing", "3"]
    text = {
        bool: ["maybe", "2", ""],
        int: ["many", "1.5", "4.0", "1e3", "", "true"],
        float: ["many", "", "true", "1,5"],
    }
    return next((text[kind] for kind in text if kind in kinds_of(name)), [])


def out_of_range(name: str) -> list[str]:
    """Values of a field's type that few fields accept."""
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
        with pytest.raises(RecipeError, match=rf"^{path}, field {name}:"):
            read_recipe(path, None, PARSER)


@pytest.mark.parametrize("name", ACTIONS)
def test_null_is_a_value_where_the_type_has_it_and_a_default_that_is_written_down_is_the_default(name, folder):
    (path,) = recipe_with(folder, **{name: None})
    if NoneType in kinds_of(name):
        assert read_recipe(path, None, PARSER)[name] is None
    else:
        with pytest.raises(RecipeError, match=f"^{path}, field {name}: it cannot be null"):
            read_recipe(path, None, PARSER)
    if DEFAULTS[name] is not None:
        recipe_with(folder, **{name: DEFAULTS[name]})
        assert read_recipe(path, None, PARSER)[name] == DEFAULTS[name]


@pytest.mark.parametrize("name", ACTIONS)
def test_no_value_ends_a_run_by_a_traceback(name, refusal):
    """Some values are refused, before the first update."""
    nothing = [None] if NoneType in kinds_of(name) and DEFAULTS[name] is not None else []
    for value in out_of_range(name) + nothing:
        assert refusal(name, value) != ""


# A line of YAML -> its meaning here, with YAML's own meaning in a comment where it differs.
LINES = {
    "target_lang: no": "no",  # false
    "source_lang: on": "on",  # true
    "data_name: 2014": "2014",  # a number
    "data_name: 2014-01-02": "2014-01-02",  # a date
    "data_name: 1_000": "1_000",
    "data_name: 0x10": "0x10",
    "data_name: 'null'": "null",
    "data_name: ~": None,
    "data_name:": None,
    "output_dir: 2026": "2026",
    "learning_rate: 1e-3": 0.001,  # text
    "learning_rate: 5": 5.0,
    "weight_decay: .5": 0.5,
    "num_beams: 010": 10,  # 8
    "num_beams: '7'": 7,
    "max_new_tokens: null": None,
    "save_total_limit: NULL": None,
    "normalize_before: on": True,
    "normalize_before: off": False,
    "normalize_before: yes": True,
    "tie_word_embeddings: no": False,
    "pretokenized: True": True,
    "bf16: auto": "auto",
    "bf16: off": False,
    "fsdp: true": True,
    "fsdp: full_shard": "full_shard",
    "trackio_static_space_id: false": False,
    "eval_strategy: no": "no",  # false
    "include_num_input_tokens_seen: non_padding": "non_padding",
    "train_file: 5": ["5"],
    "train_file: a.jsonl": ["a.jsonl"],
    "train_file: [no, 1e-3, -x]": ["no", "1e-3", "-x"],
    "report_to: [tensorboard, wandb]": ["tensorboard", "wandb"],
    "report_to: wandb": "wandb",
    "lr_scheduler_kwargs: {min_lr: 1e-7, deep: {on: true, off: no}, none: null, list: [1, a]}": (
        '{"min_lr": 1e-07, "deep": {"on": true, "off": "no"}, "none": null, "list": [1, "a"]}'
    ),
    "deepspeed: zero.json": "zero.json",
}
NOT_READ = {
    "num_beams: 4.0": "field num_beams: invalid int value: '4.0'",
    "max_new_tokens: 20.0": "field max_new_tokens: invalid int value: '20.0'",
    "average_checkpoints: 2.0": "field average_checkpoints: invalid int value: '2.0'",
    "vocab_size: 300.0": "field vocab_size: invalid int value: '300.0'",
    "vocab_size: [300]": "field vocab_size: expected one value, not the list ['300']",
    "vocab_size: {a: 1}": "invalid int value: '{\"a\": 1}'",
    "dropout: much": "field dropout: invalid float value: 'much'",
    "eval_strategy: off": "field eval_strategy: invalid choice: 'off'",
    "vocab_size: null": "field vocab_size: it cannot be null: leave it out to get the default",
    "dropout: 0.1\nseed: 1\ndropout: 0.2": "a.yaml, line 3: the key dropout is given twice",
    "variants: {a: {seed: 1, seed: 2}}": "a.yaml, line 1: the key seed is given twice",
    "lr_scheduler_kwargs: {a: 1, a: 1}": "a.yaml, line 1: the key a is given twice",
    "variants: [a]": "variants must hold lines of the form `name: {field: value}`",
    "variants: {a: }": "variants must hold lines of the form `name: {field: value}`",
    "1: 2": "sets the unknown field '1'",
    "~: 2": "sets the unknown field 'None'",
}


@pytest.mark.parametrize("line", LINES)
def test_a_value_is_what_the_fields_type_says(line, tmp_path):
    (tmp_path / "a.yaml").write_text(line)
    name = line.partition(":")[0]
    read = read_recipe(str(tmp_path / "a.yaml"), None, PARSER)
    assert read == {name: LINES[line]}
    assert type(read[name]) is type(LINES[line])
    # As the run's own recipe has it, which repeats the run.
    (tmp_path / "b.yaml").write_text(as_yaml({name: plain(read[name])}))
    assert read_recipe(str(tmp_path / "b.yaml"), None, PARSER) == read


@pytest.mark.parametrize("line", NOT_READ)
def test_a_value_that_a_type_does_not_have_and_a_key_twice_are_refused_with_the_file(line, tmp_path):
    (tmp_path / "a.yaml").write_text(line)
    with pytest.raises(RecipeError) as refused:
        read_recipe(str(tmp_path / "a.yaml"), None, PARSER)
    assert str(refused.value).startswith(f"{tmp_path / 'a.yaml'}")
    assert NOT_READ[line] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_keys_are_merged_as_yaml_has_it(tmp_path):
    text = "seed: 1\nvariants:\n  a: &a {seed: 2, vocab_size: 300}\n  b:\n    <<: *a\n    seed: 3\n"
    (tmp_path / "a.yaml").write_text(text)
    assert read_recipe(str(tmp_path / "a.yaml"), "b", PARSER) == {"seed": 3, "vocab_size": 300}


def test_a_run_writes_whole_numbers_as_it_was_told_and_languages_as_text(folder):
    argv = recipe_with(folder, warmup_steps=600, eval_steps=2, num_train_epochs=3, target_lang="no", weight_decay=0.5)
    recipe = parse_recipe([*argv, "--logging_steps", "100", "--debug", "underflow_overflow"])
    text = as_yaml(recipe.given)
    for line in ("warmup_steps: 600", "eval_steps: 2", "logging_steps: 100", "target_lang: 'no'", "weight_decay: 0.5"):
        assert f"\n{line}\n" in f"\n{text}"
    (folder / "again.yaml").write_text(text)
    assert parse_recipe([str(folder / "again.yaml")])[:5] == recipe[:5]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_do_nothing_is_refused_by_name_before_anything_is_read(name, folder):
    values = {"accelerator_config": '{"split_batches": true}', "generation_config": "nowhere", "label_names": "x",
              "include_for_metrics": "inputs", "length_column_name": "x", "label_smoothing_factor": "0.1"}  # fmt: skip
    value = values.get(name, str(not DEFAULTS[name]))
    if name in ("parallelism_config", "liger_kernel_config"):
        with pytest.raises(RecipeError, match=f"recipe.yaml, field {name}: "):
            parse_recipe(recipe_with(folder, **{name: {"a": "1"}}))
        return
    with pytest.raises(RecipeError, match=f"^{name}=.* {re.escape(REFUSED[name])}$"):
        parse_recipe(recipe_with(folder, train_file="nowhere", **{name: value}))


ALSO_REFUSED = {
    "per_device_eval_batch_size=4": {},
    "dataloader_drop_last=True": {},
    "dataloader_persistent_workers=True": {},
    "dataloader_multiprocessing_context=spawn": {},
    "ddp_backend=gloo": {},
    "debug=['tpu_metrics_debug']": {"debug": "tpu_metrics_debug"},
    "fp16=True": {},
    "fsdp_config=x.json": {},
    "torch_compile_backend=nothing": {},
    "torch_compile_mode=nothing": {},
    "lr_scheduler_kwargs=text must be JSON": {"lr_scheduler_kwargs": "text"},
    "activation_checkpointing_kwargs: offload=True": {"activation_checkpointing_kwargs": {"offload": True}},
    "activation_checkpointing_kwargs: debug=True": {"activation_checkpointing_kwargs": {"debug": True}},
    "activation_checkpointing_kwargs: every_n_layers=0": {"activation_checkpointing_kwargs": {"every_n_layers": 0}},
}


@pytest.mark.parametrize("message", ALSO_REFUSED)
def test_what_does_not_go_with_the_run_or_the_machine_is_refused_likewise(message, folder):
    name, _, value = message.partition("=")
    given = ALSO_REFUSED[message] or {name: value}
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}"):
        parse_recipe(recipe_with(folder, train_file="nowhere", use_cpu="true", **given))


@pytest.mark.parametrize(("metric", "mode"), [("bleu", "max"), ("ter", "min"), ("loss", "min")])
@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_the_metric_knows_which_way_is_better(schedule, metric, mode, folder):
    told = parse_recipe(recipe_with(folder, lr_scheduler_type=schedule, metric_for_best_model=metric))
    assert told.training.lr_scheduler_kwargs == {"mode": mode}


def test_a_schedule_whose_options_fail_at_the_last_update_is_refused_at_the_first(folder):
    for given in (
        {"lr_scheduler_type": "polynomial", "warmup_steps": 2},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}},
    ):
        with pytest.raises(RecipeError, match="lr_scheduler_type=polynomial does not work with lr_scheduler_kwargs="):
            train.main(recipe_with(folder, **given))
        assert not list((folder / "run").glob("checkpoint-*"))

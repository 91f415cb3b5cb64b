"""The recipes that the contenders share."""

import argparse
import shlex
from typing import Any

import torch
from transformers.trainer_utils import SaveStrategy

from vanilla_transformer.training.settings.recipe import parse_recipe

from .cells import CELLS, GPU_FACTOR, LENGTH, SENTENCES


# Turns off everything but the updates, so that only they are measured.
TRAINING_ALONE = shlex.split(
    "--gradient_accumulation_steps 1 --eval_strategy no --load_best_model_at_end false "
    "--report_to none --disable_tqdm true --logging_steps 10"
)
MULTI30K = "Multi30k (https://github.com/multi30k/dataset): give its folder with --multi30k_dir or MULTI30K_DIR"


def recipe_of(name: str, options: argparse.Namespace) -> list[str]:
    """The cell's command line for `training.train`, then the user's fields. Raises UserError for invalid fields."""
    recipe = [*CELLS[name].recipe, *TRAINING_ALONE]
    if name == "tiny":
        recipe += ["--data_dir", options.multi30k_dir]
    elif torch.cuda.is_available():
        recipe += ["--per_device_train_batch_tokens", str(GPU_FACTOR * SENTENCES * LENGTH)]
    recipe += options.fields
    parse(recipe)
    return recipe


def parse(argv: list[str]) -> Any:
    """The recipe, without checkpoints and without features that the peer's Trainer does not have."""
    recipe = parse_recipe(argv)
    # Set here and not with --save_strategy, which is an error in recipes that average checkpoints.
    recipe.training.save_strategy = SaveStrategy.NO
    recipe.training.ema_decay, recipe.training.r_drop_alpha, recipe.data.bpe_dropout = None, 0.0, 0.0
    return recipe

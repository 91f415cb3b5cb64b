"""Callbacks of the Trainer: they log the minutes, stop early, and write the recipe to the run's folder."""

import time
from pathlib import Path

from transformers import EarlyStoppingCallback, TrainerCallback

from ..files import write_beside
from ..settings.arguments import TrainingArguments
from ..settings.recipe import Recipe, lasting


class Clock(TrainerCallback):
    """Adds the minutes of training so far to each log entry, so that curves can be drawn over time."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the clock. A resumed run continues at its logged minutes."""
        before = max((entry.get("minutes", 0) for entry in state.log_history), default=0)
        self.started = time.monotonic() - 60 * before

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Adds the minutes to the last entry."""
        if state.log_history:
            state.log_history[-1]["minutes"] = round((time.monotonic() - self.started) / 60, 3)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, except that a resumed run keeps its count. The stock one restarts at 0."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Counts the evaluations since the best one."""
        metric = f"eval_{args.deciding_metric}"
        evaluated = [entry["step"] for entry in state.log_history if metric in entry]
        self.early_stopping_patience_counter = sum(step > (state.best_global_step or 0) for step in evaluated)
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


class RecipeWriter(TrainerCallback):
    """Writes recipe.yaml after all checks and before the first update. The file marks the folder of a run."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def on_train_begin(self, args, state, control, **kwargs):
        """Writes the file. Any checkpoint has been loaded before this event, and the first update follows."""
        if state.is_world_process_zero:
            write_beside(Path(args.output_dir, "recipe.yaml"), lasting(self.recipe.given))


def callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """The callbacks that the arguments ask for."""
    patience = args.early_stopping_patience
    return [Clock()] + ([EarlyStopping(patience)] if patience is not None else [])

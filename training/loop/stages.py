"""The part of the Trainer that knows corpora: it goes from stage to stage, and counts what each corpus gave.

A stage is a mixture with an end. The end of a stage ends the epoch, so every epoch has one mixture; epochs of different
stages may have different numbers of updates. A checkpoint says where the run stands: the stage, and where stage and
epoch began.
"""

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from vanilla_transformer.network_loss import IGNORE_INDEX

from ..data.streamed_mixture import MixedBatches
from ..settings.corpora import Stage
from .trainer import TranslationTrainer


logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Position:
    """
    Where a run stands in its stages.

    Args:
        stage: the index of the stage of the next update.
        stage_began: the update after which it began.
        stage_epochs: how many of its epochs are done.
        epoch: the number of the epoch of the next update.
        epoch_began: the update after which it began.
        over: whether the last stage has ended.
    """

    stage: int = 0
    stage_began: int = 0
    stage_epochs: int = 0
    epoch: int = 0
    epoch_began: int = 0
    over: bool = False


class MixtureTrainer(TranslationTrainer):
    """
    `TranslationTrainer` for several corpora.

    Args:
        names: the corpora, by number.
        stages: the stages of the run.
        stage_rows: the training rows of each stage; each row says the number of its `corpus`.
    """

    def __init__(self, *args, names: Sequence[str], stages: Sequence[Stage], stage_rows: Sequence[Any], **kwargs):
        super().__init__(*args, train_dataset=stage_rows[0], **kwargs)
        self.names, self.stages, self.stage_rows = list(names), list(stages), list(stage_rows)
        #: Whether the run has more than one mixture, or an end of its own.
        self.staged = any(stage.until for stage in stages)
        self.position = Position()
        # For each corpus: rows, source tokens, and target tokens that this process has trained on.
        self._given = torch.zeros(len(names), 3, dtype=torch.int64)
        #: What each corpus has given to the whole run, once it has ended.
        self.given_in_all: dict[str, dict[str, int]] = {}
        if self.staged:
            self.add_callback(StageEnds(self))

    def train(self, *args, **kwargs):
        """Trains, and logs what each corpus gave."""
        self.train_dataset, self._loader = self.stage_rows[0], None
        self._given.zero_()
        output = super().train(*args, **kwargs)
        self.given_in_all = self.given()
        for name, counts in self.given_in_all.items():
            logger.info("%s gave %s", name, ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in counts.items()))
        return output

    # 1. what each corpus gave

    def _set_signature_columns_if_needed(self):
        """Keeps the corpus of each row in the batch."""
        super()._set_signature_columns_if_needed()
        if "corpus" not in self._signature_columns:
            self._signature_columns.append("corpus")

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The stock method, except that it counts the rows and tokens of each corpus."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            # The longest batch of `--check` is of no corpus.
            if (corpus := batch.pop("corpus", None)) is None:
                continue
            sides = batch["attention_mask"].sum(dim=1), batch["labels"].ne(IGNORE_INDEX).sum(dim=1)
            counts = torch.stack([torch.ones_like(corpus), *sides], dim=1).cpu()
            self._given.index_add_(0, corpus.cpu(), counts.to(torch.int64))
        return batches, count

    def given(self) -> dict[str, dict[str, int]]:
        """What each corpus has given so far, to all processes: rows, source tokens and target tokens."""
        counts = torch.stack(gather_object([self._given])).sum(dim=0).tolist()
        kinds = ("rows", "source_tokens", "target_tokens")
        return {name: dict(zip(kinds, row, strict=True)) for name, row in zip(self.names, counts, strict=True)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what each corpus has given to the entries of the training loss."""
        if "loss" in logs:
            for name, counts in self.given().items():
                tokens = counts["source_tokens"] + counts["target_tokens"]
                logs |= {f"rows/{name}": counts["rows"], f"tokens/{name}": tokens}
            if self.staged:
                logs["stage"] = self.position.stage + 1
        super().log(logs, start_time)

    def _progress(self) -> dict[str, Any]:
        return super()._progress() | {"given": self._given.tolist(), "position": dataclasses.asdict(self.position)}

    def _restore(self, progress: dict[str, Any]) -> None:
        super()._restore(progress)
        self._given = torch.tensor(progress["given"])

    # 2. from stage to stage

    def set_initial_training_values(self, args, dataloader):
        """With stages the number of epochs is unknown: the run ends at max_steps."""
        values = super().set_initial_training_values(args, dataloader)
        return (sys.maxsize, *values[1:]) if self.staged else values

    def _init_training_state(self, max_steps, updates_per_epoch, epochs, resume_from_checkpoint, trial):
        """Finds the epoch in which a run resumes: with stages, epochs differ in their numbers of updates."""
        begin = super()._init_training_state(max_steps, updates_per_epoch, epochs, resume_from_checkpoint, trial)
        self.position = Position()
        if not (self.staged and resume_from_checkpoint):
            return begin
        # With more processes than before, this one may have no file.
        path = Path(resume_from_checkpoint, f"progress_{self.args.process_index}.json")
        path = path if path.exists() else path.with_name("progress_0.json")
        self.position = Position(**json.loads(path.read_text(encoding="utf-8"))["position"])
        done = self.state.global_step - self.position.epoch_began
        return self.position.epoch, done * self.args.gradient_accumulation_steps

    def _run_epoch(self, *, epoch: int, **kwargs):
        """Trains an epoch on the mixture of the stage."""
        if self.staged and not self.control.should_training_stop:
            loader = self._enter_stage(kwargs["train_dataloader"])
            self._updates_per_epoch = math.ceil(len(loader) / self.args.gradient_accumulation_steps)
            sizes = {"steps_in_epoch": len(loader), "num_update_steps_per_epoch": self._updates_per_epoch}
            kwargs |= {"train_dataloader": loader, **sizes}
        super()._run_epoch(epoch=epoch, **kwargs)

    def _enter_stage(self, loader: DataLoader) -> DataLoader:
        """The loader of the current stage's rows, where `loader` is that of the run's first epoch."""
        rows = self.stage_rows[self.position.stage]
        begins = self.position.stage > 0 and self.position.stage_began == self.state.global_step
        if begins and isinstance(rows, MixedBatches):
            rows.next_stage(self._position or self._read_position(self._resumed_from))
        if self.train_dataset is not rows:
            self.train_dataset = rows
            self._loader = self.get_train_dataloader()
        return loader if self._loader is None else self._loader

    def _is_last_of_epoch(self) -> bool:
        """Whether the update that is done is the epoch's last."""
        if not self.staged:
            return super()._is_last_of_epoch()
        return self.state.global_step - self.position.epoch_began == self._updates_per_epoch

    def end_stage(self, control) -> None:
        """Goes to the next stage, or ends the run after the last one."""
        update = self.state.global_step
        if self.position.stage + 1 == len(self.stages):
            logger.info("the last stage ends after update %d", update)
            self.position.over = control.should_training_stop = True
            return
        self.position.stage += 1
        self.position.stage_began, self.position.stage_epochs = update, 0
        logger.info("stage %d begins after update %d", self.position.stage + 1, update)


class StageEnds(TrainerCallback):
    """Notices where a stage ends."""

    def __init__(self, trainer: MixtureTrainer):
        self.trainer = trainer
        self.stalled = False

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.trainer.stages[self.trainer.position.stage]

    def on_train_begin(self, args, state, control, **kwargs):
        """A run whose last stage has ended makes no update."""
        self.stalled = False
        control.should_training_stop = control.should_training_stop or self.trainer.position.over

    def on_step_end(self, args, state, control, **kwargs):
        """Ends the epoch at the stage's last update."""
        if self.stage.until == "steps" and state.global_step >= self.stage.number:
            control.should_epoch_stop = True

    def on_evaluate(self, args, state, control, **kwargs):
        """Ends the epoch, and so the stage, if the score has stalled."""
        if self.stage.until != "stalls" or self._stalls(args, state) < self.stage.number:
            return
        if self.trainer.bookkeeping.epoch_ended:
            self.trainer.end_stage(control)
        else:
            self.stalled = control.should_epoch_stop = True

    def _stalls(self, args, state) -> int:
        """How many evaluations of this stage came after its best."""
        metric, began = f"eval_{args.deciding_metric}", self.trainer.position.stage_began
        scores = [entry[metric] for entry in state.log_history if metric in entry and entry["step"] > began]
        # The evaluation at the end of the stage before is not counted.
        if not scores:
            return 0
        best = (max if args.greater_is_better else min)(scores)
        return len(scores) - 1 - scores.index(best)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Begins the next epoch; and the next stage, if this one has ended."""
        position, stage = self.trainer.position, self.stage
        # A stream has no epochs.
        whole = self.trainer.stream is None and self.trainer._is_last_of_epoch()
        ended = {
            "steps": state.global_step >= stage.number,
            "epochs": whole and position.stage_epochs + 1 >= stage.number,
            "stalls": self.stalled,
            None: False,
        }[stage.until]
        self.stalled = False
        # Otherwise max_steps ends the run in the middle of an epoch, and a later run may continue it.
        if whole or ended:
            position.epoch, position.epoch_began = position.epoch + 1, state.global_step
            position.stage_epochs += 1
        if ended:
            self.trainer.end_stage(control)

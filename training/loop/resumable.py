"""The part of the Trainer that saves checkpoints and resumes from them with bit-identical results."""

import json
import logging
import math
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Seq2SeqTrainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from ..errors import UserError
from .checkpoints import DATA_NAME, UNFINISHED, newest_checkpoint, publish, seal, writing
from .signals import StopSignal


logger = logging.getLogger(__name__)


class DivergenceError(UserError):
    """A run whose weights contain NaN or infinity."""


class ResumableTrainer(Seq2SeqTrainer):
    """
    `Seq2SeqTrainer` with atomic checkpoints. A resumed run continues as if it had never stopped: on a CPU, with the
    same number of processes, weights, optimizer and log are bit-identical.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        #: Identifies the data of each split (`resuming.fingerprint`): a run can only resume with the same data.
        self.data: dict[str, str] = {}
        self.bookkeeping = Bookkeeping(self)
        self.add_callback(self.bookkeeping)

    def train(self, *args, **kwargs):
        """
        Trains. SIGTERM or SIGINT saves a checkpoint at the end of the current update and its evaluation, and stops.

        Raises:
            SystemExit: with status 143 or 130, after such a signal.
            CheckpointError: a checkpoint could not be written.
            DivergenceError: the run has diverged. Earlier checkpoints are intact.
        """
        self._saved_at = -1
        self.stop = StopSignal(self.args.world_size, speaks=self.is_world_process_zero())
        with self.stop.listening():
            output = super().train(*args, **kwargs)
        self.stop.finish()
        return output

    def _init_training_state(self, max_steps, updates_per_epoch, epochs, resume_from_checkpoint, trial):
        """Takes the intervals of logging, evaluating and saving from the arguments, not from the checkpoint."""
        begin = super()._init_training_state(max_steps, updates_per_epoch, epochs, resume_from_checkpoint, trial)
        self.state.compute_steps(self.args, max_steps)
        self._find_best_checkpoint()
        self._updates_per_epoch = updates_per_epoch
        self._resumed_from = resume_from_checkpoint
        return begin

    def _find_best_checkpoint(self) -> None:
        """Updates the path of the best checkpoint, since the run's folder may have been moved."""
        best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _load_progress(self) -> None:
        """Loads what the stock loop does not restore: the loss since the last log, the total loss and the time."""
        self._began = time.time()
        path = Path(self._resumed_from or "", f"progress_{self.args.process_index}.json")
        # With more processes than before, this one may have no file.
        if self._resumed_from is None or not path.exists():
            return
        self._restore(json.loads(path.read_text(encoding="utf-8")))

    def _restore(self, progress: dict[str, Any]) -> None:
        self._tr_loss += progress["loss"]
        self._total_loss_scalar = progress["logged_loss"]
        self._globalstep_last_logged = progress["logged_step"]
        self._began -= progress["seconds"]
        self._initial_global_step = 0

    def _progress(self) -> dict[str, Any]:
        """What `_restore` restores."""
        return {
            "loss": self._tr_loss.item(),
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "seconds": time.time() - self._began,
        }

    def _save_progress(self, folder: Path) -> None:
        path = folder / f"progress_{self.args.process_index}.json"
        path.write_text(json.dumps(self._progress()), encoding="utf-8")

    def _run_epoch(self, *, epoch: int, **kwargs):
        """Makes no update if the run has already ended."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(epoch=epoch, **kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        """Reports the time of the whole run, not only since it was resumed."""
        return super()._finalize_training(trial, num_train_samples, self._began)

    def _refuse_divergence(self) -> None:
        """Ends a run that has diverged. The stock loop would log a loss of 0, continue, and delete good checkpoints."""
        largest = nn.utils.get_total_norm(self.model.parameters(), norm_type=math.inf)
        if isinstance(largest, DTensor):
            largest = largest.full_tensor()
        if largest.isfinite():
            return
        args, saved = self.args, newest_checkpoint(Path(self.args.output_dir))
        raise DivergenceError(
            f"{args.output_dir}: the run has diverged: after update {self.state.global_step} the weights contain "
            f"NaN or infinity (newest checkpoint: {saved.name if saved else 'none'}). Start a new run with less than "
            f"learning_rate={args.learning_rate:g}, more than warmup_steps={args.warmup_steps:g}, or max_grad_norm=1"
        )

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        """Stops after a signal, with a checkpoint. Also stops if the run has diverged, without a checkpoint."""
        if self.control.should_log or self.control.should_evaluate:
            self._refuse_divergence()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        number = self.stop.agreed()
        if not number or self._epoch_is_ending():
            return
        if self._saved_at != self.state.global_step:
            self._save_checkpoint(model, trial, kind="interrupted")
        if self.is_world_process_zero():
            name = signal.Signals(number).name
            logger.warning(
                "%s: stopped after update %d, which is saved in %s: continue with the same command and "
                "--resume_from_checkpoint last", name, self.state.global_step, self.args.output_dir,
            )  # fmt: skip
        raise SystemExit(128 + number)

    def _epoch_is_ending(self) -> bool:
        """Whether the epoch's last update is done, but its evaluation and log are not."""
        stops = self.control.should_training_stop or self.control.should_epoch_stop
        return not self.bookkeeping.epoch_ended and (stops or self._is_last_of_epoch())

    def _is_last_of_epoch(self) -> bool:
        """Whether the update that is done is the epoch's last."""
        return self.state.global_step % self._updates_per_epoch == 0

    def _save_checkpoint(self, model, trial, kind: str = "checkpoint") -> None:
        """
        Writes a checkpoint, renames it when it is complete, then deletes older ones.

        At an epoch's last update this waits until the epoch has ended; a run resumed before that would skip the epoch's
        evaluation.
        """
        if self._epoch_is_ending():
            self.bookkeeping.save_is_due = True
            return
        self._refuse_divergence()
        run, name = self.args.output_dir, f"{kind}-{self.state.global_step}"
        folder = Path(run, UNFINISHED + name)
        with writing(run, name, self._checkpoint_size()):
            self._write_checkpoint(folder, kind)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(folder)
        if self.args.should_save:
            checkpoint = publish(folder)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(checkpoint))
            if kind == "checkpoint":
                self._remove_older()
        self.accelerator.wait_for_everyone()
        self._saved_at = self.state.global_step

    def _write_checkpoint(self, folder: Path, kind: str) -> None:
        """Writes the same files as the stock method, by the same methods, and the progress."""
        self.store_flos()
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self._save_progress(folder)
        self._find_best_checkpoint()
        if kind == "checkpoint" and self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder.with_name(folder.name.removeprefix(UNFINISHED)))
        exported = [
            part for part in [*self.callback_handler.callbacks, self.control] if isinstance(part, ExportableState)
        ]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=exported).stateful_callbacks
        if self.args.should_save:
            (folder / DATA_NAME).write_text(json.dumps(self.data, indent=2) + "\n", encoding="utf-8")
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _remove_older(self) -> None:
        """Deletes the oldest checkpoints over `save_total_limit`. The best and the newest are kept."""
        for interrupted in Path(self.args.output_dir).glob("interrupted-*"):
            shutil.rmtree(interrupted, ignore_errors=True)
        # Oldest by time, since a run that resumed from an older checkpoint may find checkpoints with higher numbers.
        best = self.state.best_model_checkpoint
        rotate_checkpoints(self.args.output_dir, self.args.save_total_limit, best, use_mtime=True)

    def _checkpoint_size(self) -> int:
        """The approximate size in bytes of this process's weights and optimizer state."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        return sum(part.nbytes for part in [*self.model.parameters(), *state] if isinstance(part, torch.Tensor))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the model for `from_pretrained`.

        Raises:
            CheckpointError: the write failed.
            DivergenceError: the weights contain NaN or infinity.
        """
        if not _internal_call:
            self._refuse_divergence()
        size = sum(parameter.nbytes for parameter in self.model.parameters())
        with nullcontext() if _internal_call else writing(output_dir or self.args.output_dir, "the model", size):
            # An internal call, because otherwise the stock method would push before scores and card are written.
            super().save_model(output_dir, _internal_call=True)


class Bookkeeping(TrainerCallback):
    """Reports to the Trainer the events that its loop sends only to callbacks."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer
        self.epoch_ended = False
        self.save_is_due = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Restores the progress, since the loop has just reset its sums of losses to 0."""
        self.trainer._load_progress()

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Records that an epoch has begun."""
        self.epoch_ended = False

    def on_epoch_end(self, args, state, control, **kwargs):
        """Records that the epoch has ended. Its evaluation follows, then a checkpoint that waited for it."""
        self.epoch_ended = True
        control.should_save = control.should_save or self.save_is_due
        self.save_is_due = False

"""Never lose a run: checkpoints that are whole or not there, signals that save, and a resume that repeats to the bit.

A checkpoint is written into `tmp-checkpoint-N` in the run's folder, by every process. Its manifest comes last, with the
size and the checksum of each file; when all of it is on the disk the folder is renamed to `checkpoint-N`. What a signal
makes the run save is called `interrupted-N`: it is for resuming only, so that it counts neither among the checkpoints
that are kept, nor among those of which the mean is taken, and goes when the next checkpoint is there.
"""

import json
import logging
import math
import os
import re
import shutil
import signal
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Seq2SeqTrainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import rotate_checkpoints

from vanilla_transformer.loading_vanilla_transformer import refuse_strange_shards

from .errors import UserError


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# What data the run reads.
DATA_NAME = "data.json"
UNFINISHED = "tmp-"
TORN = "torn-"
KINDS = ("checkpoint", "interrupted")
# A launcher passes a signal on to processes that may have received it themselves.
ECHO_SECONDS = 1.0


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or not be resumed from."""


class DivergenceError(UserError):
    """A run whose weights are no finite numbers any more."""


def damage(checkpoint: Path) -> str | None:
    """
    What is wrong with a checkpoint, in words; None if every file is there as it was written, and none holds what a run
    should not load.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no whole {MANIFEST}, which is written last"
    for name, (size, checksum) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if _checksum(path) != checksum:
            return f"{name} is not what was written: its checksum differs"
    return _danger(checkpoint)


def _danger(checkpoint: Path) -> str | None:
    """
    Looks into what the Trainer will load of a checkpoint, which somebody else may have made. As the Trainer does, it
    takes only tensors and plain values from a pickle; but it says which file holds more.
    """
    try:
        refuse_strange_shards(checkpoint)
    except ValueError as error:
        return str(error)
    pickles = [path for kind in ("pt", "pth", "bin") for path in checkpoint.glob(f"*.{kind}")]
    for path in sorted(pickles):
        # That of the arguments is written for people, and never read.
        if path.name == TRAINING_ARGS_NAME:
            continue
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        # Garbage raises whatever it comes upon first.
        except Exception as error:
            called = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it would run {called[1]}" if called else "it is not what torch.save writes of these"
            return f"{path.name} holds more than tensors and numbers: {reason}"
    return None


def seal(folder: Path) -> None:
    """Writes the manifest of a checkpoint, and returns when all of it is on the disk."""
    paths = sorted(folder.rglob("*"))
    files = {str(path.relative_to(folder)): (path.stat().st_size, _checksum(path)) for path in paths if path.is_file()}
    for path in paths:
        _to_disk(path)
    (folder / MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
    _to_disk(folder / MANIFEST)
    _to_disk(folder)


def publish(folder: Path) -> Path:
    """Gives a sealed checkpoint its name."""
    checkpoint = folder.with_name(folder.name.removeprefix(UNFINISHED))
    # Of the same update, where a run went on from an older one. A crash after this line loses nothing (see `settle`).
    shutil.rmtree(checkpoint, ignore_errors=True)
    os.replace(folder, checkpoint)
    _to_disk(checkpoint.parent)
    return checkpoint


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _to_disk(path: Path) -> None:
    """Returns when a file or a folder would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most updates in a run's folder, whole or not."""
    return next(_newest_first(run), None)


def _newest_first(run: Path) -> Iterator[Path]:
    found = [path for kind in KINDS for path in run.glob(f"{kind}-*") if _updates(path).isdigit()]
    yield from sorted(found, key=lambda path: int(_updates(path)), reverse=True)


def _updates(checkpoint: Path) -> str:
    return checkpoint.name.rpartition("-")[2]


def settle(run: Path) -> None:
    """
    Makes the newest checkpoint of a run's folder a whole one, after whatever has happened: finishes or removes what was
    being written, and sets aside newer checkpoints that are torn.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    for folder in run.glob(f"{UNFINISHED}*-*"):
        if damage(folder) is None:
            publish(folder)
        else:
            shutil.rmtree(folder)
    torn: dict[Path, str] = {}
    for checkpoint in _newest_first(run):
        wrong = damage(checkpoint)
        if wrong is None:
            break
        torn[checkpoint] = wrong
    else:
        if torn:
            listed = "; ".join(f"{path.name}: {wrong}" for path, wrong in torn.items())
            raise CheckpointError(f"{run}: no checkpoint is whole ({listed}): begin a new run in another output_dir")
    for path, wrong in torn.items():
        aside = path.with_name(TORN + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning("%s is torn: %s. It is now %s, and %s is used", path, wrong, aside.name, checkpoint.name)


@contextmanager
def writing(run: str, what: str, size: int) -> Iterator[None]:
    """
    Turns a failure to write into words.

    Args:
        run: the folder.
        what: is written there.
        size: about how many bytes it takes.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # So torch.save tells of a full disk (caffe2/serialize/inline_container.cc).
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        shutil.rmtree(Path(run, UNFINISHED + what), ignore_errors=True)
        free = shutil.disk_usage(run).free
        raise CheckpointError(
            f"{what} could not be written into {run}: {str(error).splitlines()[0]}. It takes about {size / 1e6:,.0f} "
            f"MB, and {free / 1e6:,.0f} MB are free there. What was saved before is whole: make room, then go on by "
            "--resume_from_checkpoint last"
        ) from error


class StopSignal:
    """
    SIGTERM or SIGINT, received by one of the processes and heard by all of them after the same update.

    The first makes the run save and stop, a second one ends the process at once.

    Args:
        processes: of the run.
        speaks: whether this process tells what it does.
    """

    def __init__(self, processes: int, speaks: bool):
        self.received = 0
        self.speaks = speaks
        self.process = os.getpid()
        # gloo: it takes no turn on the accelerator, and nobody waits for it.
        self.group = dist.new_group(backend="gloo") if processes > 1 else None
        self.shared = torch.tensor(0)
        self.pending: dist.Work | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the signals are caught."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if not self.received:
            self.received, self.at = number, time.monotonic()
            # The processes that load data inherit this handler. `print` must not be used in one.
            if self.speaks and os.getpid() == self.process:
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: saving after this update. Once more ends the run at once.\n".encode())
        elif time.monotonic() - self.at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def finish(self) -> None:
        """Hears the last of the others: a process that exits while it is being told something is aborted by gloo."""
        if self.pending is not None:
            self.pending.wait()
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def agreed(self) -> int:
        """
        The signal, or 0; the same in every process. To be called after each update, by all of them.

        Each call begins to tell the others what has been received, and hears what they told at the call before.
        """
        if self.group is None:
            return self.received
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        if not (number := int(self.shared)):
            self.shared = torch.tensor(self.received)
            self.pending = dist.all_reduce(self.shared, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return number


class ResumableTrainer(Seq2SeqTrainer):
    """
    `Seq2SeqTrainer` with checkpoints that are whole or not there, from which a run goes on as if it had never stopped:
    on a CPU, with as many processes, to the bit in weights, optimizer and log.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        #: What is read, by split, in words (`resuming.fingerprint`): a run goes on with the same.
        self.data: dict[str, str] = {}
        self.bookkeeping = Bookkeeping(self)
        self.add_callback(self.bookkeeping)

    def train(self, *args, **kwargs):
        """
        Trains; SIGTERM or SIGINT saves a checkpoint at the end of the running update, and of its evaluation.

        Raises:
            SystemExit: with status 143 or 130, after such a signal.
            CheckpointError: a checkpoint could not be written.
            DivergenceError: the run has diverged. What was saved before is whole.
        """
        self._saved_at = -1
        self.stop = StopSignal(self.args.world_size, speaks=self.is_world_process_zero())
        with self.stop.listening():
            output = super().train(*args, **kwargs)
        self.stop.finish()
        return output

    def _init_training_state(self, max_steps, updates_per_epoch, epochs, resume_from_checkpoint, trial):
        """Keeps to this call's arguments, where the stock loop logs, evaluates and saves as the checkpoint says."""
        begin = super()._init_training_state(max_steps, updates_per_epoch, epochs, resume_from_checkpoint, trial)
        self.state.compute_steps(self.args, max_steps)
        self._find_best_checkpoint()
        self._updates_per_epoch = updates_per_epoch
        self._resumed_from = resume_from_checkpoint
        return begin

    def _find_best_checkpoint(self) -> None:
        """The run's folder may have been moved since the path was noted."""
        best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _load_progress(self) -> None:
        """Goes on with what the stock loop forgets: the loss that is not logged yet, and that of the whole run."""
        self._began = time.time()
        path = Path(self._resumed_from or "", f"progress_{self.args.process_index}.json")
        # Another number of processes has other files.
        if self._resumed_from is None or not path.exists():
            return
        progress = json.loads(path.read_text(encoding="utf-8"))
        self._tr_loss += progress["loss"]
        self._total_loss_scalar = progress["logged_loss"]
        self._globalstep_last_logged = progress["logged_step"]
        self._began -= progress["seconds"]
        self._initial_global_step = 0

    def _save_progress(self, folder: Path) -> None:
        progress = {
            "loss": self._tr_loss.item(),
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "seconds": time.time() - self._began,
        }
        (folder / f"progress_{self.args.process_index}.json").write_text(json.dumps(progress), encoding="utf-8")

    def _run_epoch(self, *, epoch: int, **kwargs):
        """Makes no update where the run has ended."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(epoch=epoch, **kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        """Reports the whole run, not what was left of it."""
        return super()._finalize_training(trial, num_train_samples, self._began)

    def _refuse_divergence(self) -> None:
        """Where the stock loop would log a loss of 0, go on, and push out the checkpoints that are worth something."""
        largest = nn.utils.get_total_norm(self.model.parameters(), norm_type=math.inf)
        if isinstance(largest, DTensor):
            largest = largest.full_tensor()
        if largest.isfinite():
            return
        args, saved = self.args, newest_checkpoint(Path(self.args.output_dir))
        raise DivergenceError(
            f"{args.output_dir}: the run has diverged: after update {self.state.global_step} there are weights that "
            f"are no finite numbers (newest checkpoint: {saved.name if saved else 'none'}). Begin anew with less than "
            f"learning_rate={args.learning_rate:g}, more than warmup_steps={args.warmup_steps:g}, or max_grad_norm=1"
        )

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        """Stops where a signal asks for it, with a checkpoint, and where the run has diverged, without one."""
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
                "%s: stopped after update %d, which is saved in %s: go on by the same command and "
                "--resume_from_checkpoint last", name, self.state.global_step, self.args.output_dir,
            )  # fmt: skip
        raise SystemExit(128 + number)

    def _epoch_is_ending(self) -> bool:
        """Whether the epoch's last update is made, and what is evaluated and logged at its end is still to come."""
        stops = self.control.should_training_stop or self.control.should_epoch_stop
        return not self.bookkeeping.epoch_ended and (stops or self.state.global_step % self._updates_per_epoch == 0)

    def _save_checkpoint(self, model, trial, kind: str = "checkpoint") -> None:
        """
        Writes all of a checkpoint before it has its name, and removes older ones after that.

        At an epoch's last update it waits for the epoch's end: who resumed from here would begin the next epoch.
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
        """What the stock method writes, by the same methods, and the progress."""
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
        """Keeps `save_total_limit` checkpoints, the best and the newest among them."""
        for interrupted in Path(self.args.output_dir).glob("interrupted-*"):
            shutil.rmtree(interrupted, ignore_errors=True)
        # By the time of writing: a run that went on from an older checkpoint has names of higher numbers beside it.
        best = self.state.best_model_checkpoint
        rotate_checkpoints(self.args.output_dir, self.args.save_total_limit, best, use_mtime=True)

    def _checkpoint_size(self) -> int:
        """About as many bytes as the weights and the optimizer's state of this process take."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        return sum(part.nbytes for part in [*self.model.parameters(), *state] if isinstance(part, torch.Tensor))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the model for `from_pretrained`.

        Raises:
            CheckpointError: it could not be written.
            DivergenceError: it is worth nothing.
        """
        if not _internal_call:
            self._refuse_divergence()
        size = sum(parameter.nbytes for parameter in self.model.parameters())
        with nullcontext() if _internal_call else writing(output_dir or self.args.output_dir, "the model", size):
            # By an internal call only, or the stock method would push here, before the run has its scores and its card.
            super().save_model(output_dir, _internal_call=True)


class Bookkeeping(TrainerCallback):
    """What the Trainer needs to know of its loop, and is told to callbacks only."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer
        self.epoch_ended = False
        self.save_is_due = False

    def on_train_begin(self, args, state, control, **kwargs):
        """The loop has just set its sums of losses to 0."""
        self.trainer._load_progress()

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Its updates come."""
        self.epoch_ended = False

    def on_epoch_end(self, args, state, control, **kwargs):
        """Its evaluation comes, and then the checkpoint that waited for it."""
        self.epoch_ended = True
        control.should_save = control.should_save or self.save_is_due
        self.save_is_due = False

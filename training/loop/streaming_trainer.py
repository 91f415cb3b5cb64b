"""The part of the Trainer that reads a stream: its loader, and saving and restoring the position in it."""

import json
from pathlib import Path
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from ..data.streaming import StreamedBatches
from ..errors import RecipeError
from .resumable import ResumableTrainer


class StreamingTrainer(ResumableTrainer):
    """A `ResumableTrainer` that can also train on a stream. A resumed run continues with the next batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._position: dict[str, Any] = {}

    @property
    def stream(self) -> StreamedBatches | None:
        """The training data, if it is a stream."""
        return self.train_dataset if isinstance(self.train_dataset, StreamedBatches) else None

    def get_train_dataloader(self):
        """Keeps accelerate from dividing a stream among the processes: it yields only this process's batches."""
        if self.stream is None:
            return super().get_train_dataloader()

        def collate(batch: dict[str, Any] | None) -> dict[str, Any] | None:
            return batch and {**self.data_collator(batch["rows"]), "position": batch["position"]}

        loader = DataLoader(
            self.stream, batch_size=None, collate_fn=collate, pin_memory=self.args.dataloader_pin_memory
        )
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The stock method; it also stores the position in the stream for the next checkpoint."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.stream is not None:
            for batch in batches:
                # The longest batch, made by `--check`, has no position.
                self._position = batch.pop("position", self._position)
        return batches, count

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves the states of this process's random generators, and its position in the stream."""
        super()._save_rng_state(output_dir)
        if self.stream is not None:
            position = self._position | {"processes": self.args.world_size}
            self._position_file(output_dir).write_text(json.dumps(position), encoding="utf-8")

    def _position_file(self, checkpoint: str) -> Path:
        return Path(checkpoint, f"stream_{self.args.process_index}.json")

    def _resume(self, stream: StreamedBatches, checkpoint: str | None, skipped: int) -> None:
        """
        Continues the stream at the checkpoint's position.

        Raises:
            RecipeError: the checkpoint is from a run with another number of processes, or without streaming.
        """
        if checkpoint is not None and skipped:
            stream.resume(self._read_position(checkpoint), skipped)

    def _read_position(self, checkpoint: str) -> dict[str, Any]:
        path = self._position_file(checkpoint)
        position = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"processes": 0}
        if position["processes"] != self.args.world_size:
            raise RecipeError(
                f"{checkpoint} was written by {position['processes']} streaming processes, but this run has "
                f"{self.args.world_size}: a stream resumes only with the same number"
            )
        return position

    def _run_epoch(self, *, epoch: int, **kwargs):
        """Moves the stream to its position. The stock loop would read and discard all earlier batches."""
        if self.stream is not None and epoch == kwargs["epochs_trained"]:
            self._resume(self.stream, kwargs["resume_from_checkpoint"], kwargs["steps_trained_in_current_epoch"])
        super()._run_epoch(epoch=epoch, **kwargs)

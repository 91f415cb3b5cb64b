"""Averages weights over a run's last checkpoints (Vaswani et al., 2017, section 6.1) or over all updates (EMA)."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..errors import UserError
from ..files import missing
from ..model_names import models_in


EMA_NAME = "ema.safetensors"


class AveragingError(UserError):
    """Checkpoints that cannot be averaged."""


def last_checkpoints(folder: str | Path, count: int) -> list[Path]:
    """
    The last `count` checkpoints in a run's folder, the oldest first; all of them if there are fewer.

    Raises:
        AveragingError: there is no such folder.
    """
    steps = {path: path.name.removeprefix("checkpoint-") for path in Path(folder).glob("checkpoint-*")}
    if not Path(folder).is_dir():
        raise AveragingError(missing(folder))
    # A name without a number belongs to a checkpoint that is still being written.
    return sorted((path for path in steps if steps[path].isdigit()), key=lambda path: int(steps[path]))[-count:]


def load_average(model: PreTrainedModel, checkpoints: Sequence[Path]) -> None:
    """
    Replaces the weights of `model` with the mean of the checkpoints' weights. It sums in float64, one tensor at a time,
    to keep memory low.

    Args:
        model: a model of the checkpoints' architecture. It keeps its dtypes.
        checkpoints: folders of saved models.

    Raises:
        AveragingError: as `refuse_different` does.
    """
    refuse_different(checkpoints)
    # state_dict lists a shared tensor under each of its names; a checkpoint stores it once.
    weights = model.state_dict()
    with ExitStack() as stack:
        files = [stack.enter_context(_open(path)) for path in checkpoints]
        for name in files[0].offset_keys():
            weights[name].copy_(torch.stack([file.get_tensor(name).double() for file in files]).mean(dim=0))


def refuse_different(checkpoints: Sequence[Path]) -> None:
    """
    Compares the checkpoints without reading their weights.

    Raises:
        AveragingError: a folder is not a checkpoint, is damaged, or has a different model than the first.
    """
    kinds = [_kind(path) for path in checkpoints]
    for path, kind in zip(checkpoints, kinds, strict=True):
        for name in sorted(kinds[0].keys() | kind.keys()):
            first, other = kinds[0].get(name, "absent"), kind.get(name, "absent")
            if first != other:
                raise AveragingError(
                    f"{checkpoints[0]} and {path} are from different models: {name} is {first} in the first and "
                    f"{other} in the second"
                )


def _kind(checkpoint: Path) -> dict[str, Any]:
    """The configuration and the shapes of the tensors. They are the same in all checkpoints of a run."""
    with _open(checkpoint) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.offset_keys()}
    try:
        config = json.loads((checkpoint / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AveragingError(f"{checkpoint / CONFIG_NAME} cannot be read: {error}") from error
    config.pop("transformers_version", None)
    return shapes | config


def _open(checkpoint: Path) -> safe_open:
    try:
        return safe_open(checkpoint / SAFE_WEIGHTS_NAME, framework="pt")
    except FileNotFoundError:
        if not checkpoint.exists():
            raise AveragingError(missing(checkpoint)) from None
        there = models_in(checkpoint)
        hint = f"; {there}" if there else ""
        raise AveragingError(f"{checkpoint} is not a checkpoint: it has no {SAFE_WEIGHTS_NAME}{hint}") from None
    except SafetensorError as error:
        raise AveragingError(f"{checkpoint / SAFE_WEIGHTS_NAME} is damaged: {error}") from error


class ExponentialMean(TrainerCallback):
    """
    The exponential moving average of the weights: after update t, the weights of update s have a factor proportional to
    decay^(t - s). The factors sum to 1 from the first update on, as in bias-corrected Adam (Kingma & Ba, 2015, section
    3), so the random initial weights have no influence.

    At the end of training the model gets the mean as its weights.

    Args:
        decay: between 0 and 1. The mean covers the last 1 / (1 - decay) updates or so.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.mean: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, model, **kwargs):
        """Collects the trained weights; a shared weight is listed once."""
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        # A resumed run has already loaded its mean.
        start = self.mean or self.weights
        self.mean = {name: start[name].detach().to(weight.device, copy=True) for name, weight in self.weights.items()}

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        """Moves the mean towards the new weights."""
        # 1 / (1 + decay + ... + decay^(t - 1)): the factor of update t in the mean.
        part = (1 - self.decay) / (1 - self.decay**state.global_step)
        torch._foreach_lerp_(list(self.mean.values()), list(self.weights.values()), part)

    @torch.no_grad()
    def on_train_end(self, args, state, control, **kwargs):
        """Replaces the weights with the mean."""
        for name, weight in self.weights.items():
            weight.copy_(self.mean[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the `with`, the model has the mean as its weights. Afterwards its own weights are restored exactly."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.weights.items():
            kept = weight.clone()
            weight.copy_(self.mean[name])
            self.mean[name].copy_(kept)

    def save(self, checkpoint: str) -> None:
        """Writes the mean to a checkpoint's folder."""
        save_file(self.mean, Path(checkpoint, EMA_NAME), metadata={"format": "pt"})

    def load(self, checkpoint: str) -> None:
        """
        Reads the mean from a checkpoint.

        Raises:
            AveragingError: the checkpoint has no mean.
        """
        path = Path(checkpoint, EMA_NAME)
        if not path.exists():
            raise AveragingError(
                f"ema_decay={self.decay}, but {checkpoint} is from a run without it and has no {EMA_NAME}: leave "
                "ema_decay out, or start a new run"
            )
        self.mean = load_file(path)

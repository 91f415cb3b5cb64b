"""Writes checkpoints atomically: each is complete or missing. Also cleans up a run's folder after a crash.

All processes write a checkpoint into `tmp-checkpoint-N` in the run's folder. The manifest, with size and checksum of
each file, is written last; when everything is on the disk, the folder is renamed to `checkpoint-N`. A checkpoint saved
after a signal is called `interrupted-N`. It serves only for resuming: it is neither kept nor averaged, and is deleted
at the next checkpoint.
"""

import json
import logging
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals

from vanilla_transformer.loading import refuse_strange_shards

from ..errors import UserError
from ..files import put_in_place, to_disk


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Identifies the data that the run reads.
DATA_NAME = "data.json"
UNFINISHED = "tmp-"
TORN = "torn-"
KINDS = ("checkpoint", "interrupted")


class CheckpointError(UserError):
    """A checkpoint that cannot be written or resumed from."""


def damage(checkpoint: Path) -> str | None:
    """
    Describes what is wrong with a checkpoint, or returns None if every file is intact and safe to load.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"its {MANIFEST}, which is written last, is missing or damaged"
    for name, (size, checksum) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if _checksum(path) != checksum:
            return f"{name} is damaged: its checksum differs"
    return _danger(checkpoint)


def _danger(checkpoint: Path) -> str | None:
    """
    Looks for code in the files that the Trainer will load, since a checkpoint may come from somebody else. The Trainer
    itself refuses anything but tensors and plain values in a pickle, but does not name the file.
    """
    try:
        refuse_strange_shards(checkpoint)
    except ValueError as error:
        return str(error)
    pickles = [path for kind in ("pt", "pth", "bin") for path in checkpoint.glob(f"*.{kind}")]
    for path in sorted(pickles):
        # The pickle of the arguments is never read.
        if path.name == TRAINING_ARGS_NAME:
            continue
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        # Damaged pickles raise errors of many kinds.
        except Exception as error:
            called = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it would run {called[1]}" if called else "torch.save does not write such a file"
            return f"{path.name} holds more than tensors and numbers: {reason}"
    return None


def seal(folder: Path) -> None:
    """Syncs all files of a checkpoint to disk, then writes its manifest."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): (path.stat().st_size, _checksum(path)) for path in paths}
    to_disk(folder)
    (folder / MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")


def publish(folder: Path) -> Path:
    """Renames a sealed checkpoint from `tmp-checkpoint-N` to `checkpoint-N`."""
    checkpoint = folder.with_name(folder.name.removeprefix(UNFINISHED))
    # A run that resumed from an older checkpoint may find one of the same update. A crash after this line is harmless:
    # `settle` publishes the new one.
    shutil.rmtree(checkpoint, ignore_errors=True)
    put_in_place(folder, checkpoint)
    return checkpoint


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most updates in a run's folder, intact or not."""
    return next(_newest_first(run), None)


def _newest_first(run: Path) -> Iterator[Path]:
    found = [path for kind in KINDS for path in run.glob(f"{kind}-*") if _updates(path).isdigit()]
    yield from sorted(found, key=lambda path: int(_updates(path)), reverse=True)


def _updates(checkpoint: Path) -> str:
    return checkpoint.name.rpartition("-")[2]


def settle(run: Path) -> None:
    """
    Cleans up a run's folder after a crash, so that its newest checkpoint is intact. An unfinished checkpoint is renamed
    if it is complete, else deleted. Damaged checkpoints that are newer than the newest intact one become `torn-...`.

    Raises:
        CheckpointError: there are checkpoints, but none is intact.
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
            raise CheckpointError(f"{run}: no checkpoint is intact ({listed}): start a new run in another output_dir")
    for path, wrong in torn.items():
        aside = path.with_name(TORN + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning("%s is damaged: %s. It is now %s, and %s is used", path, wrong, aside.name, checkpoint.name)


@contextmanager
def writing(run: str, what: str, size: int) -> Iterator[None]:
    """
    Turns a failed write into an error that says how much disk space is needed.

    Args:
        run: the run's folder.
        what: the name of what is written there.
        size: its approximate size in bytes.

    Raises:
        CheckpointError: the write failed.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a full disk by a RuntimeError (caffe2/serialize/inline_container.cc).
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        shutil.rmtree(Path(run, UNFINISHED + what), ignore_errors=True)
        free = shutil.disk_usage(run).free
        raise CheckpointError(
            f"{what} could not be written to {run}: {str(error).splitlines()[0]}. It takes about {size / 1e6:,.0f} "
            f"MB, and {free / 1e6:,.0f} MB are free there. Earlier checkpoints are intact: make room, then resume with "
            "--resume_from_checkpoint last"
        ) from error

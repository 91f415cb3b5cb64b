"""Runs that were killed, stopped, damaged or out of disk space are bit-identical with an undisturbed run.

`KILLS=12 pytest tests/test_checkpointing.py -k sigkill` kills more often, over a longer run.
"""

import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from processes import FORKS, place_of, start
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from vanilla_transformer import (
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
    train_tokenizer,
)
from vanilla_transformer.training.data.bpe_dropout import BpeDropoutRows
from vanilla_transformer.training.data.pairs import tokenize_pairs
from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.loop.callbacks import callbacks
from vanilla_transformer.training.loop.checkpoints import CheckpointError, damage, newest_checkpoint, settle
from vanilla_transformer.training.loop.resumable import DivergenceError
from vanilla_transformer.training.loop.resuming import checkpoint_to_resume
from vanilla_transformer.training.loop.trainer import TranslationTrainer
from vanilla_transformer.training.settings.arguments import DataArguments, TrainingArguments


KILLS = int(os.environ.get("KILLS", "3"))
# An epoch has 8 updates; the run ends in the middle of one.
UPDATES = 6 * KILLS + 4
# A checkpoint is made between two entries of the log, in the middle of an epoch and at its end.
INTERVALS = {"logging_steps": 3, "save_steps": 4, "eval_strategy": "epoch", "save_strategy": "steps"}
WORDS, VOCABULARY = ("red", "green", "blue", "white", "black", "grey"), 280
WALL_CLOCK = ("minutes", "runtime", "per_second")


def make_trainer(run: Path, config: dict, *watchers: TrainerCallback, **options) -> TranslationTrainer:
    """A trainer with dropout, BPE-dropout, accumulation and a mean of weights, on rows of uneven lengths."""
    dice = random.Random(1)
    texts = [[" ".join(dice.choices(WORDS, k=dice.randint(1, 5))) for _ in range(54)] for _ in range(2)]
    tokenizer, data = train_tokenizer(WORDS, VOCABULARY), DataArguments(bpe_dropout=0.3)
    pairs = Dataset.from_dict({"source": texts[0], "target": texts[1]})
    rows = tokenize_pairs(pairs, tokenizer, data, "train")
    options = {
        "learning_rate": 0.01, "warmup_steps": 5, "max_steps": UPDATES, "per_device_train_batch_tokens": 22,
        "gradient_accumulation_steps": 2, "predict_with_generate": False, "metric_for_best_model": "loss",
        "load_best_model_at_end": False, "ema_decay": 0.9, "report_to": "none", "disable_tqdm": True,
        "resume_from_checkpoint": "last", **INTERVALS, **options,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(run), **options)
    torch.manual_seed(args.seed)
    return TranslationTrainer(
        model=VanillaTransformerForConditionalGeneration(VanillaTransformerConfig(**config)),
        args=args,
        train_dataset=BpeDropoutRows(rows, tokenizer, data, args.seed),
        eval_dataset=rows.select(range(10)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[*callbacks(args), *watchers],
    )


def live(run: Path, config: dict, *watchers: TrainerCallback, **options) -> TranslationTrainer:
    """Starts or resumes a run, as the program does."""
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").touch()
    trainer = make_trainer(run, config, *watchers, **options)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args))
    return trainer


def left_by(run: Path) -> dict:
    """The newest checkpoint: its name, weights and states as bytes, and the log without times."""
    checkpoint = newest_checkpoint(run)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    log = [
        {k: v for k, v in entry.items() if not any(part in k for part in WALL_CLOCK)} for entry in state["log_history"]
    ]
    files = [path.name for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".pt", ".pth")]
    return {"name": checkpoint.name, "log": log} | {name: (checkpoint / name).read_bytes() for name in files}


@pytest.fixture(scope="module")
def config(tiny_config) -> dict:
    return tiny_config(encoder_layers=1, decoder_layers=1, vocab_size=VOCABULARY).to_dict()


@pytest.fixture(scope="module")
def unstopped(config, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    run = tmp_path_factory.mktemp("unstopped")
    live(run, config)
    return run


class Watch(TrainerCallback):
    """Tells another process how far the run is, and does something at one update."""

    def __init__(self, reached=None, at: int = 0, act=None):
        self.reached, self.at, self.act = reached, at, act

    def on_step_end(self, args, state, control, **kwargs):
        if self.reached is not None:
            self.reached.value = state.global_step
        if state.global_step == self.at:
            self.act()


def life(run: Path, config: dict, watch: Watch, rank=0, world=1, port=0, before=None, **options) -> None:
    """The work of one of `world` processes that train together."""
    if world > 1:
        os.environ.update(place_of(rank, world, port))
    if before is not None:
        before()
    output = os.open(run.with_suffix(f".{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    live(run, config, watch, **options)


def begin(*args, **options) -> multiprocessing.Process:
    return start(life, *args, **options)


def wait_until(condition, process) -> None:
    while not condition():
        assert process.is_alive(), process.exitcode
        time.sleep(0.001)


def die_writing(files: int, checkpoint: str = "") -> None:
    """SIGKILL for this process when it opens a file of the unfinished (or of any) checkpoint, to write or to check it,
    so often.
    """
    left = itertools.count(files, -1)

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and f"/tmp-checkpoint-{checkpoint}" in str(arguments[0]) and next(left) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def test_sigkill_at_any_moment_changes_nothing(config, unstopped, tmp_path):
    seed = time.time_ns()  # other moments in each run
    print(f"seed: {seed}")
    run, reached, dice = tmp_path / "run", FORKS.Value("i", 0), random.Random(seed)
    # It waits for its death, so that every life ends by it.
    watch = Watch(reached, at=UPDATES - 1, act=partial(time.sleep, 600))
    deaths = []
    for number in range(KILLS):
        last, reached.value = reached.value, 0
        if writing := number % 3 == 1:
            process = begin(run, config, Watch(reached), before=partial(die_writing, dice.randint(1, 40)))
        else:
            process = begin(run, config, watch)
            update = min(last + dice.randint(-2, 10), UPDATES - 1)
            wait_until(lambda until=update: reached.value >= until, process)
            time.sleep(dice.random() * 0.1)
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, run.with_suffix(".0.txt").read_text()[-3000:]
        assert any(run.glob("tmp-*")) or not writing
        deaths.append((reached.value, [path.name for path in run.glob("*-*")]))
    process = begin(run, config, Watch(reached))
    process.join()
    print(*deaths, sep="\n")
    assert process.exitcode == 0, run.with_suffix(".0.txt").read_text()[-3000:]
    assert left_by(run) == left_by(unstopped)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in unstopped.iterdir())


STOPS = {
    "in the middle of an epoch": (signal.SIGTERM, 13, 143, "interrupted-13"),
    "where a checkpoint is due": (signal.SIGTERM, 12, 143, "checkpoint-12"),
    "at the end of an epoch": (signal.SIGINT, 16, 130, "checkpoint-16"),
    "at the last update": (signal.SIGINT, UPDATES, 130, f"checkpoint-{UPDATES}"),
}


@pytest.mark.parametrize(("number", "update", "status", "saved"), STOPS.values(), ids=STOPS)
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(
    number, update, status, saved, config, unstopped, tmp_path, caplog
):
    run, handler = tmp_path / "run", signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        live(run, config, Watch(at=update, act=lambda: os.kill(os.getpid(), number)))
    assert stopped.value.code == status
    assert signal.getsignal(number) == handler
    assert f"stopped after update {update}" in caplog.text
    assert "--resume_from_checkpoint last" in caplog.text
    assert newest_checkpoint(run).name == saved
    live(run, config)
    assert left_by(run) == left_by(unstopped)
    # Saving after the signal did not cause the deletion of a checkpoint that the undisturbed run keeps.
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in unstopped.iterdir())


def test_an_epochs_end_is_evaluated_and_saved_after_a_signal_at_its_last_update(config, tmp_path):
    options = {"max_steps": 20, "save_strategy": "epoch", "logging_strategy": "epoch"}
    live(tmp_path / "unstopped", config, **options)
    with pytest.raises(SystemExit):
        live(tmp_path / "run", config, Watch(at=8, act=lambda: os.kill(os.getpid(), signal.SIGTERM)), **options)
    live(tmp_path / "run", config, **options)
    assert left_by(tmp_path / "run") == left_by(tmp_path / "unstopped")


def signal_twice(pause: float) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(pause)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("pause", "status", "left"),
    [(0.0, 143, ["interrupted-2"]), (1.2, -signal.SIGTERM, [])],
    ids=["an echo", "a second"],
)
def test_a_second_signal_ends_the_run_at_once(pause, status, left, config, tmp_path):
    process = begin(tmp_path / "run", config, Watch(at=2, act=partial(signal_twice, pause)))
    process.join()
    assert process.exitcode == status
    assert [path.name for path in (tmp_path / "run").glob("*-*")] == left


def begin_two(run: Path, config: dict, port: int, first=None, second=None, **options) -> list[multiprocessing.Process]:
    """Trains in two processes. The arguments: what the first does before it starts, and the second's callback."""
    return [
        begin(run, config, Watch(), 0, 2, port, before=first, **options),
        begin(run, config, second or Watch(), 1, 2, port, **options),
    ]


def test_two_processes_that_are_killed_and_stopped_end_as_two_that_were_not(config, tmp_path):
    """First one process is killed while a checkpoint is written; then only one process receives a signal."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    run, options = tmp_path / "run", {"max_steps": 14, "per_device_train_batch_tokens": 16}
    # 1. never stopped
    for process in (both := begin_two(tmp_path / "unstopped", config, port, **options)):
        process.join()
    assert [process.exitcode for process in both] == [0, 0], (tmp_path / "unstopped.0.txt").read_text()[-3000:]
    # 2. killed
    both = begin_two(run, config, port, first=partial(die_writing, 3, checkpoint="8"), **options)
    both[0].join()
    assert both[0].exitcode == -signal.SIGKILL, run.with_suffix(".0.txt").read_text()[-3000:]
    both[1].kill()  # if it has not noticed by itself that the other is gone
    both[1].join()
    assert sorted(path.name for path in run.glob("*-*")) == ["checkpoint-4", "tmp-checkpoint-8"]
    # 3. stopped
    both = begin_two(run, config, port, second=Watch(at=10, act=partial(signal_twice, 0.0)), **options)
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [143, 143], run.with_suffix(".0.txt").read_text()[-3000:]
    interrupted = newest_checkpoint(run)
    assert interrupted.name in ("interrupted-10", "interrupted-11")
    assert damage(interrupted) is None
    assert {"rng_state_0.pth", "rng_state_1.pth", "progress_1.json"} <= {path.name for path in interrupted.iterdir()}
    # 4. to the end
    for process in (both := begin_two(run, config, port, **options)):
        process.join()
    assert [process.exitcode for process in both] == [0, 0], run.with_suffix(".0.txt").read_text()[-3000:]
    assert left_by(run) == left_by(tmp_path / "unstopped")


def test_a_finished_run_that_is_resumed_makes_no_update(config, unstopped, tmp_path):
    run = shutil.copytree(unstopped, tmp_path / "run")
    before, updates = left_by(run), []
    trainer = live(run, config, Watch(at=UPDATES + 1, act=lambda: updates.append(1)))
    assert not updates
    assert trainer.state.global_step == UPDATES
    assert left_by(run) == before


def test_a_run_that_is_resumed_follows_its_new_arguments(config, unstopped, tmp_path):
    run = shutil.copytree(unstopped, tmp_path / "run")
    trainer = live(run, config, max_steps=UPDATES + 8, save_steps=5, logging_steps=2, save_total_limit=9)
    names = {path.name for path in run.glob("checkpoint-*")}
    assert names >= {f"checkpoint-{step}" for step in range(UPDATES + 1, UPDATES + 9) if step % 5 == 0}
    logged = [entry["step"] for entry in trainer.state.log_history if "loss" in entry and entry["step"] > UPDATES]
    assert logged == [step for step in range(UPDATES + 1, UPDATES + 9) if step % 2 == 0]


class LoseTheWeights(TrainerCallback):
    """Sets a weight to NaN, like an update with an overflowing gradient."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 5:
            model.lm_head.bias.data[7] = float("nan")


def test_a_run_that_diverges_ends_at_once_and_leaves_its_checkpoints(config, unstopped, tmp_path):
    run = tmp_path / "run"
    # Adam's updates are as large as the learning rate.
    with pytest.raises(DivergenceError, match=r"after update 3 .*newest checkpoint: none.*=1e\+38"):
        live(run, config, learning_rate=1e38, warmup_steps=0)
    noticed = {
        6: {},  # where it is logged
        5: {"logging_steps": 10, "save_steps": 5},
        8: {"logging_steps": 10, "save_steps": 10},  # where it is evaluated
        UPDATES: {"logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no"},
    }
    for number, options in noticed.items():
        with pytest.raises(DivergenceError, match=rf"after update {number} .*newest checkpoint: checkpoint-4\b"):
            live(run, config, LoseTheWeights(), **options).save_model()
        assert sorted(path.name for path in run.iterdir()) == ["checkpoint-4", "recipe.yaml"]
    live(run, config)
    assert left_by(run) == left_by(unstopped)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


TEARS = {
    "no manifest": ("manifest.json", Path.unlink),
    "half a manifest": ("manifest.json", cut),
    "no weights": ("model.safetensors", Path.unlink),
    "weights cut short": ("model.safetensors", cut),
    "a bit of the weights": ("model.safetensors", flip),
    "no optimizer": ("optimizer.pt", Path.unlink),
    "an empty optimizer": ("optimizer.pt", lambda path: os.truncate(path, 0)),
    "half a state": ("trainer_state.json", cut),
    "no random state": ("rng_state.pth", Path.unlink),
}


@pytest.mark.parametrize(("name", "tear"), TEARS.values(), ids=TEARS)
def test_a_torn_checkpoint_is_set_aside_and_the_one_before_it_is_used(name, tear, unstopped, tmp_path, caplog):
    run = shutil.copytree(unstopped, tmp_path / "run")
    newest = newest_checkpoint(run)
    (run / "tmp-checkpoint-99").mkdir()
    tear(newest / name)
    args = TrainingArguments(output_dir=str(run), resume_from_checkpoint="last", report_to="none")
    used = checkpoint_to_resume(args)
    assert used == str(run / f"checkpoint-{(UPDATES - 1) // 4 * 4}")
    assert damage(Path(used)) is None
    assert [path.name for path in run.glob("*-*") if path != Path(used)] == [f"torn-{newest.name}"]
    assert str(newest) in caplog.text
    assert name in caplog.text
    assert Path(used).name in caplog.text


def test_a_whole_checkpoint_without_its_name_is_given_it(unstopped, tmp_path):
    run = shutil.copytree(unstopped, tmp_path / "run")
    newest = newest_checkpoint(run)
    # Killed while it replaced one of the same update, half of which is still there.
    shutil.copytree(newest, run / f"tmp-{newest.name}")
    (newest / "optimizer.pt").unlink()
    settle(run)
    assert damage(newest) is None
    assert not [*run.glob("tmp-*"), *run.glob("torn-*")]


def test_no_run_begins_where_no_checkpoint_is_whole(unstopped, tmp_path):
    run = shutil.copytree(unstopped, tmp_path / "run")
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").unlink()
    args = TrainingArguments(output_dir=str(run), resume_from_checkpoint="last", report_to="none")
    with pytest.raises(CheckpointError, match=f"checkpoint-{UPDATES}: optimizer.pt is missing"):
        checkpoint_to_resume(args)
    args.resume_from_checkpoint = str(newest_checkpoint(run))
    with pytest.raises(UserError, match=r"optimizer\.pt is missing"):
        checkpoint_to_resume(args)
    assert len([*run.glob("checkpoint-*")]) == 2


def fill_disk(run: Path, name: str) -> None:
    """Simulates a full disk for one file of the checkpoint of update 8, with Linux's /dev/full."""
    (run / "tmp-checkpoint-8").mkdir()
    (run / "tmp-checkpoint-8" / name).symlink_to("/dev/full")


def limit_files() -> None:
    """No file may grow past 1000 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "manifest.json"])
def test_a_full_disk_ends_with_one_clear_error_and_the_last_checkpoint_whole(name, config, tmp_path):
    """safetensors, torch and Python report it by different errors."""
    run, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    # safetensors writes beside and renames, so that no link is followed.
    act = limit_files if name == "model.safetensors" else partial(fill_disk, run, name)
    try:
        with pytest.raises(CheckpointError) as error:
            live(run, config, Watch(at=7, act=act))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(run) in str(error.value)
    assert re.search(
        r"checkpoint-8 could not be written .* takes about \d+ MB, and [\d,]+ MB are free", str(error.value)
    )
    assert [path.name for path in run.glob("*-*")] == ["checkpoint-4"]
    assert damage(run / "checkpoint-4") is None

"""Every program refuses a damaged or hostile folder with a message, and runs no code from it."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_training import make_trainer, uneven_rows
from transformers import AutoModelForSeq2SeqLM, BertConfig, pipeline

from vanilla_transformer import VanillaTransformerForConditionalGeneration, train_tokenizer
from vanilla_transformer.training import evaluate, train
from vanilla_transformer.training.errors import RecipeError, UserError
from vanilla_transformer.training.loop.checkpoints import CheckpointError, damage, seal
from vanilla_transformer.training.loop.resuming import checkpoint_to_resume
from vanilla_transformer.training.program import run_program
from vanilla_transformer.training.saved_model import load_model
from vanilla_transformer.training.settings.arguments import TrainingArguments
from vanilla_transformer_commands import average


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYER = "model.decoder.layers.1.fc2.weight"
HEADER_LENGTH = 8
TEXT = ["what ever, what else, whichever"]


class Marker:
    """Unpickling it, with code allowed, creates this file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()\n"


def change(folder: Path, name: str, **fields) -> None:
    """Changes values in a JSON file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder: Path, changed: Callable[[dict], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    changed(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def change_header(folder: Path, changed: Callable[[dict], object]) -> None:
    """Replaces the header of the same data."""
    data = (folder / WEIGHTS).read_bytes()
    end = HEADER_LENGTH + struct.unpack("<Q", data[:HEADER_LENGTH])[0]
    header = json.loads(data[HEADER_LENGTH:end])
    changed(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def shard(folder: Path, place: str) -> None:
    """Renames the weights to a name that only an index has."""
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / place)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, place)}
    (folder / INDEX).write_text(json.dumps(index))


# What is done to a folder that was good, each by its own function.


def pickled_weights(folder: Path, marker: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save({**weights, "hook": Marker(marker)}, folder / "pytorch_model.bin")


def plain_pickle(folder: Path, marker: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(marker)))


def pickle_called_safetensors(folder: Path, marker: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Marker(marker)))


def pickled_shard(folder: Path, marker: Path) -> None:
    shard(folder, "shard.safetensors")
    (folder / "shard.safetensors").rename(folder / "shard.bin")
    torch.save({"hook": Marker(marker)}, folder / "shard.bin")
    (folder / INDEX).write_text((folder / INDEX).read_text().replace("shard.safetensors", "shard.bin"))


def shard_above(folder: Path, marker: Path) -> None:
    shard(folder, "../stolen.safetensors")


def shard_at_a_path(folder: Path, marker: Path) -> None:
    shard(folder, str(folder.parent / "stolen.safetensors"))


def index_that_is_a_list(folder: Path, marker: Path) -> None:
    shard(folder, "shard.safetensors")
    (folder / INDEX).write_text("[1, 2]")


def weights_named_by_the_config(folder: Path, marker: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder.parent / "stolen.safetensors")
    change(folder, "config.json", transformers_weights="../stolen.safetensors")


def huge_header(folder: Path, marker: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + data[HEADER_LENGTH:])


def offsets_out_of_the_file(folder: Path, marker: Path) -> None:
    def move(header: dict) -> None:
        last = max((value for name, value in header.items() if name != "__metadata__"), key=lambda v: v["data_offsets"])
        last["data_offsets"] = [offset + 2**20 for offset in last["data_offsets"]]

    change_header(folder, move)


def overlapping_tensors(folder: Path, marker: Path) -> None:
    def overlap(header: dict) -> None:
        header["model.decoder.layers.0.fc2.weight"]["data_offsets"] = header[LAYER]["data_offsets"]

    change_header(folder, overlap)


def shape_of_other_size_in_the_header(folder: Path, marker: Path) -> None:
    change_header(folder, lambda header: header[LAYER].update(shape=[10**6, 10**6]))


def truncated(folder: Path, marker: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def other_shape(folder: Path, marker: Path) -> None:
    change(folder, "config.json", decoder_ffn_dim=40)


def missing_tensor(folder: Path, marker: Path) -> None:
    change_weights(folder, lambda weights: weights.pop(LAYER))


def lost_weights(folder: Path, marker: Path) -> None:
    change_weights(folder, lambda weights: weights[LAYER].view(-1)[5:6].fill_(float("nan")))


def fewer_layers(folder: Path, marker: Path) -> None:
    change(folder, "config.json", decoder_layers=1)


def impossible_network(folder: Path, marker: Path) -> None:
    change(folder, "config.json", d_model=-16)


def larger_tokenizer(folder: Path, marker: Path) -> None:
    train_tokenizer(TEXT, 264).save_pretrained(folder)


def smaller_tokenizer(folder: Path, marker: Path) -> None:
    """The tokenizer has fewer tokens than the embeddings, by more than padding of the table explains."""
    model = VanillaTransformerForConditionalGeneration.from_pretrained(folder)
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)


def other_padding(folder: Path, marker: Path) -> None:
    change(folder, "tokenizer_config.json", pad_token="<unk>")


def other_end(folder: Path, marker: Path) -> None:
    change(folder, "config.json", eos_token_id=3)


def tokenizer_that_is_no_json(folder: Path, marker: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def config_that_is_no_json(folder: Path, marker: Path) -> None:
    (folder / "config.json").write_text("not json")


def config_that_is_a_list(folder: Path, marker: Path) -> None:
    (folder / "config.json").write_text("[1]")


def config_of_another_model(folder: Path, marker: Path) -> None:
    BertConfig().save_pretrained(folder)


def unknown_model_with_code(folder: Path, marker: Path) -> None:
    """Adds code: transformers asks on standard input whether to run it."""
    (folder / "evil.py").write_text(code(marker))
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForSeq2SeqLM": "evil.Model"}
    change(folder, "config.json", model_type="evil", auto_map=auto_map)


def tokenizer_with_code(folder: Path, marker: Path) -> None:
    (folder / "evil.py").write_text(code(marker))
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", None]}
    change(folder, "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto_map)


class Case(NamedTuple):
    """A way to damage a folder, our message, and the error of transformers (None if it loads the folder)."""

    ruin: Callable[[Path, Path], None]
    message: str
    by_transformers: type[Exception] | tuple[type[Exception], ...] | None


CASES = [
    Case(pickled_weights, "model.safetensors", pickle.UnpicklingError),
    Case(plain_pickle, "model.safetensors", pickle.UnpicklingError),
    Case(pickle_called_safetensors, "header", SafetensorError),
    Case(pickled_shard, "'shard.bin': shards must be .safetensors files", ValueError),
    Case(shard_above, "'../stolen.safetensors': shards must be .safetensors files in the same folder", ValueError),
    Case(shard_at_a_path, "stolen.safetensors': shards must be .safetensors files in the same folder", ValueError),
    Case(index_that_is_a_list, "is not a valid shard index", ValueError),
    Case(weights_named_by_the_config, "inside the model directory", ValueError),
    Case(huge_header, "header", SafetensorError),
    Case(offsets_out_of_the_file, "header", SafetensorError),
    Case(overlapping_tensors, "header", SafetensorError),
    Case(shape_of_other_size_in_the_header, "header", SafetensorError),
    Case(truncated, "incomplete", SafetensorError),
    Case(other_shape, "fc1.bias is [32], but [40] is expected", RuntimeError),
    Case(missing_tensor, f"{LAYER} is missing", None),
    Case(lost_weights, f"{LAYER} contains nan", None),
    Case(fewer_layers, "model.decoder.layers.1.", None),
    Case(impossible_network, "d_model=-16", Exception),
    Case(larger_tokenizer, "the tokenizer has 264 tokens, but the model has vocab_size=262", None),
    Case(smaller_tokenizer, "the tokenizer has 262 tokens, but the model has vocab_size=300", None),
    Case(other_padding, "the tokenizer has pad_token_id=3, but the model has pad_token_id=0", None),
    Case(other_end, "the tokenizer has eos_token_id=2, but the model has eos_token_id=3", None),
    Case(tokenizer_that_is_no_json, "cannot be loaded", None),
    Case(config_that_is_no_json, "not a valid JSON file", OSError),
    Case(config_that_is_a_list, "Unrecognized model", Exception),
    Case(config_of_another_model, "model_type='bert', but 'vanilla_transformer' is needed", ValueError),
    Case(unknown_model_with_code, "trust_remote_code=True", ValueError),
    Case(tokenizer_with_code, "trust_remote_code=True", None),
]


@pytest.fixture(scope="module")
def good(tiny_model, tmp_path_factory) -> Path:
    """The folder of a model with its tokenizer."""
    folder = tmp_path_factory.mktemp("good") / "model"
    tokenizer = train_tokenizer(TEXT, 262)
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    load_model(str(folder))
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """One to ruin."""
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture
def marker(tmp_path) -> Path:
    """The file that a folder's code would create. It must not exist when the test ends."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.ruin.__name__)
def test_our_programs_refuse_it_in_one_line(case, folder, marker):
    case.ruin(folder, marker)
    with pytest.raises(UserError) as refused:
        load_model(str(folder))
    message = str(refused.value)
    assert message.startswith(f"cannot load the model {str(folder)!r}: ")
    assert case.message in message
    assert "\n" not in message


@pytest.mark.parametrize("case", [case for case in CASES if case.by_transformers], ids=lambda case: case.ruin.__name__)
def test_transformers_refuses_it_with_our_classes(case, folder, marker, monkeypatch):
    # Who answers its question by "y" has said yes.
    monkeypatch.setattr("builtins.input", lambda question: "n")
    case.ruin(folder, marker)
    with pytest.raises(case.by_transformers):
        AutoModelForSeq2SeqLM.from_pretrained(folder)


@pytest.mark.parametrize("trust", [None, False, True])
def test_our_classes_come_before_those_that_a_folder_brings(trust, folder, marker):
    (folder / "evil.py").write_text(code(marker))
    change(folder, "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForSeq2SeqLM": "evil.Model"})
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=trust)
    assert type(model) is VanillaTransformerForConditionalGeneration


def test_the_code_of_these_folders_runs_where_it_is_trusted(folder, tmp_path):
    """Shows that the tests above would notice code that is run."""
    pickled_weights(folder, tmp_path / "pickle")
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    plain_pickle_folder = shutil.copytree(folder, tmp_path / "plain")
    (plain_pickle_folder / WEIGHTS).touch()
    plain_pickle(plain_pickle_folder, tmp_path / "plain pickle")
    pickle.loads((plain_pickle_folder / "pytorch_model.bin").read_bytes())
    unknown_model_with_code(folder, tmp_path / "module")
    with pytest.raises(AttributeError):
        AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
    for name in ("pickle", "plain pickle", "module"):
        assert (tmp_path / name).exists()


def test_a_table_that_is_padded_for_the_gpu_is_not_hostile(folder):
    model = VanillaTransformerForConditionalGeneration.from_pretrained(folder)
    model.resize_token_embeddings(pad_to_multiple_of=64)
    model.save_pretrained(folder)
    model, tokenizer = load_model(str(folder))
    assert (len(tokenizer), model.config.vocab_size) == (262, 320)


def test_the_pipeline_refuses_the_tokenizer_of_another_model(folder, marker):
    larger_tokenizer(folder, marker)
    with pytest.raises(ValueError, match="the tokenizer has 264 tokens, but the model has vocab_size=262"):
        pipeline("translation", model=str(folder))


PROGRAMS = {
    "average": (average.main, ["MODEL", "MODEL", "--output_dir", "mean"]),
    "evaluate": (evaluate.main, ["MODEL", "--test_file", "a.txt", "a.txt"]),
    "train": (train.main, ["--output_dir", "run", "--model", "MODEL", "--train_file", "a.txt", "a.txt"]),
    "tokenizer": (train.main, ["--output_dir", "run", "--tokenizer", "MODEL", "--train_file", "a.txt", "a.txt"]),
}


@pytest.fixture
def folder_with_code(folder, marker, tmp_path) -> Path:
    """A folder with code that transformers would ask about, beside a text file."""
    unknown_model_with_code(folder, marker)
    tokenizer_with_code(folder, marker)
    (tmp_path / "a.txt").write_text("yes\n")
    return folder


@pytest.mark.parametrize(("program", "argv"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_ends_with_one_line_and_asks_nothing(program, argv, folder_with_code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(SystemExit) as ended:
        run_program(program, [str(folder_with_code) if word == "MODEL" else word for word in argv])
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(folder_with_code) in line


def test_a_yes_among_the_sentences_trusts_no_code(folder_with_code):
    """transformers would read its answer from standard input, which holds the sentences."""
    command = [sys.executable, "-m", "vanilla_transformer_commands", "translate", str(folder_with_code)]
    result = subprocess.run(command, input="y\ny\n", capture_output=True, text=True)
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: cannot load the model {str(folder_with_code)!r}")


@pytest.fixture(scope="module")
def whole_checkpoint(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(tiny_model(), uneven_rows(), folder, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    return folder / "checkpoint-1"


@pytest.fixture
def checkpoint(whole_checkpoint, tmp_path) -> Path:
    """One to ruin."""
    return shutil.copytree(whole_checkpoint, tmp_path / "run" / "checkpoint-1")


def pickled(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, marker: torch.save({"state": Marker(marker)}, folder / name)


def plainly_pickled(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, marker: (folder / name).write_bytes(pickle.dumps(Marker(marker), protocol=2))


RUN_BY_PICKLE = f"holds more than tensors and numbers: it would run {os.system.__module__}.system"
CHECKPOINTS = {
    "optimizer": (pickled("optimizer.pt"), f"optimizer.pt {RUN_BY_PICKLE}"),
    "plain pickle": (plainly_pickled("optimizer.pt"), f"optimizer.pt {RUN_BY_PICKLE}"),
    "scheduler": (pickled("scheduler.pt"), f"scheduler.pt {RUN_BY_PICKLE}"),
    "generators": (pickled("rng_state.pth"), f"rng_state.pth {RUN_BY_PICKLE}"),
    "scaler": (pickled("scaler.pt"), f"scaler.pt {RUN_BY_PICKLE}"),
    "weights": (pickled_weights, f"pytorch_model.bin {RUN_BY_PICKLE}"),
    "garbage": (lambda folder, _: (folder / "optimizer.pt").write_bytes(b"PK"), "optimizer.pt holds more than tensors"),
    "a shard above": (shard_above, "shards must be .safetensors files in the same folder"),
}


@pytest.mark.parametrize(("ruin", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_hostile_checkpoint_is_not_resumed_from(ruin, message, checkpoint, marker, tiny_model):
    """It is refused although its manifest is right: an attacker can write that too."""
    ruin(checkpoint, marker)
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint)
    assert message in damage(checkpoint)
    # By path it is refused, and by "last" not chosen.
    args = TrainingArguments(output_dir=str(checkpoint.parent), resume_from_checkpoint=str(checkpoint))
    with pytest.raises(RecipeError, match="is not an intact checkpoint") as refused:
        checkpoint_to_resume(args)
    assert message in str(refused.value)
    args.resume_from_checkpoint = "last"
    with pytest.raises(CheckpointError, match="no checkpoint is intact") as refused:
        checkpoint_to_resume(args)
    assert message in str(refused.value)


def test_the_pickle_of_the_arguments_is_never_read(checkpoint, marker, tiny_model):
    pickled("training_args.bin")(checkpoint, marker)
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint)
    assert damage(checkpoint) is None
    trainer = make_trainer(tiny_model(), uneven_rows(), checkpoint.parent, max_steps=2)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(("ruin", "message"), [
    (lambda weights: weights.pop(LAYER), f"{LAYER} is missing"),
    (lambda weights: weights.update(more=torch.zeros(1)), "more is unexpected"),
], ids=["missing", "unexpected"])  # fmt: skip
def test_a_run_does_not_go_on_with_weights_that_it_has_not_trained(ruin, message, checkpoint, tiny_model):
    change_weights(checkpoint, ruin)
    trainer = make_trainer(tiny_model(), uneven_rows(), checkpoint.parent, max_steps=2)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        trainer.train(resume_from_checkpoint=str(checkpoint))

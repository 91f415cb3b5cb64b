"""What a model's name means: a folder, or a repository of the Hub; and what is said if it is neither."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, constants

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training import evaluate, train
from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.model_names import find_folder_or_repository, find_model
from vanilla_transformer.training.program import run_program
from vanilla_transformer.training.saved_model import load_tokenizer
from vanilla_transformer_commands import average, convert, export, info, push, translate


TEXTS = ["3 days ago", "1,234.50 euros"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub in which OWNER/other is a repository without a model, and an empty cache."""
    (tmp_path / "hub").mkdir()
    with HubServer(tmp_path / "hub", {"token": "OWNER"}) as server:
        use_hub(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def use_hub(monkeypatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def folder(tiny_model, tmp_path, monkeypatch) -> Path:
    """The current folder: runs/quickstart and runs/other hold models, and notes.txt does not."""
    place = tmp_path / "here"
    tokenizer = train_tokenizer(TEXTS, 290)
    model = tiny_model(vocab_size=len(tokenizer))
    for name in ("quickstart", "other"):
        model.save_pretrained(place / "runs" / name)
        tokenizer.save_pretrained(place / "runs" / name)
    (place / "alone" / "checkpoint-9").mkdir(parents=True)
    shutil.copy(place / "runs" / "other" / "config.json", place / "alone" / "checkpoint-9")
    (place / "empty").mkdir()
    (place / "notes.txt").write_text("a line\n")
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def home(folder, monkeypatch) -> Path:
    """The current folder, which is that of `~` too."""
    monkeypatch.setenv("HOME", str(folder))
    return folder


WANTED = "give the folder of a trained model, such as the output_dir of a run"
LOCAL = {
    "runs/foo": "runs/foo: no such folder",
    "runs/quickstrat": "runs/quickstrat: no such folder: did you mean runs/quickstart?",
    "./foo": "./foo: no such folder",
    "../here/run": "../here/run: no such folder: did you mean ../here/runs?",
    "/no/folder": "/no/folder: no such folder",
    "~/runs/othr": "{home}/runs/othr: no such folder: did you mean {home}/runs/other?",
    "foo/": "foo/: no such folder",
    "a/b/c": "a/b/c: no such folder",
    "runs": (
        "runs: holds no model (no config.json); it holds the models other, quickstart: name one of them, such as "
        "runs/other"
    ),
    "alone/": "alone/: holds no model (no config.json); it holds the model checkpoint-9: give alone/checkpoint-9",
    "empty": f"empty: holds no model (no config.json): {WANTED}",
    "notes.txt": "notes.txt: is a file, but a folder is needed, with config.json and its other files",
    "runs/other/model.safetensors": (
        "runs/other/model.safetensors: is a file, but a folder is needed: give runs/other, the folder that it is in"
    ),
}


@pytest.mark.parametrize("name", LOCAL)
def test_a_name_of_a_folder_is_looked_up_here_alone(name, home, hub):
    with pytest.raises(UserError) as refused:
        find_model(name)
    assert str(refused.value) == LOCAL[name].format(home=home)
    assert not hub.requests


def test_a_folder_with_a_model_is_found(home, hub):
    assert find_model("runs/other") == "runs/other"
    assert find_model("~/runs/other") == str(home / "runs" / "other")
    assert not hub.requests


HUB = {
    "OWNER/nothing": "has no model of this name, or it is private: `hf auth login` logs in",
    "a b": "has no such names: they have the form NAME or OWNER/NAME",
}


@pytest.mark.parametrize("name", HUB)
def test_the_hub_is_asked_for_other_names_and_its_answer_is_one_line(name, folder, hub):
    with pytest.raises(UserError) as refused:
        find_model(name, field="model=")
    assert str(refused.value) == f"model={name}: no such folder here, and {hub.url} {HUB[name]}"


def test_a_repository_of_the_hub_is_found(folder, hub):
    HfApi(endpoint=hub.url, token="token").create_repo("OWNER/other")
    # Its loader will say which file it lacks.
    assert find_folder_or_repository("OWNER/other", "config.json") == "OWNER/other"


def test_a_hub_that_cannot_be_reached_is_asked_once(folder, hub, monkeypatch, caplog):
    use_hub(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(UserError) as refused:
        find_model("quickstart")
    assert str(refused.value).startswith("quickstart: no such folder here, and http://127.0.0.1:9 cannot be reached (")
    assert "\n" not in str(refused.value)
    assert "Retrying" not in caplog.text


def test_a_hub_that_is_not_asked_is_said_to_be_off(folder, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir("runs")
    with pytest.raises(UserError) as refused:
        find_model("quikstart")
    expected = f"(did you mean quickstart?), and {hub.url} is not asked, because HF_HUB_OFFLINE is set"
    assert str(refused.value) == f"quikstart: no such folder here {expected}"
    assert not hub.requests


MISSING = "runs/quickstrat: no such folder: did you mean runs/quickstart?"
COMMANDS: dict[str, tuple[Callable[[list[str]], None], list[str], str]] = {
    "translate": (translate.main, ["runs/quickstrat", "--input", "notes.txt"], MISSING),
    "info": (info.main, ["runs/quickstrat"], MISSING),
    "evaluate": (evaluate.main, ["runs/quickstrat"], MISSING),
    "export": (export.main, ["runs/quickstrat", "--format", "marian", "--output", "new"], MISSING),
    "push": (push.main, ["runs/quickstrat", "OWNER/mine"], MISSING),
    "average": (average.main, ["runs/quickstrat", "--output_dir", "new"], MISSING),
    "average of a folder above": (
        average.main,
        ["runs", "--output_dir", "new"],
        "runs is not a checkpoint: it has no model.safetensors; it holds the models other, quickstart: name one of "
        "them, such as runs/other",
    ),
    "push of a folder above": (
        push.main,
        ["runs", "OWNER/mine"],
        "runs is not the folder of a finished run; it holds the models other, quickstart: name one of them, such as "
        "runs/other",
    ),
    "average of a run": (average.main, ["runs/quickstrat", "--last", "2", "--output_dir", "new"], MISSING),
    "convert": (
        convert.main,
        ["runs/quickstrat", "--format", "marian", "--output", "new"],
        "runs/quickstrat: no such file or folder: did you mean runs/quickstart?",
    ),
    "train from a model": (train.main, ["--model", "runs/quickstrat", "--output_dir", "new"], f"model={MISSING}"),
    "train from a checkpoint": (
        train.main,
        ["--dataset", "phrasebook:en-de", "--output_dir", "new", "--resume_from_checkpoint", "runs/quickstrat"],
        f"resume_from_checkpoint={MISSING}",
    ),
    "train on a data set": (
        train.main,
        ["--dataset", "runs/quickstrat", "--output_dir", "new"],
        f"dataset={MISSING}",
    ),
    "train by a recipe": (
        train.main,
        ["quickstrat.yaml"],
        "no recipe 'quickstrat.yaml': did you mean quickstart.yaml?",
    ),
    "train on text": (
        train.main,
        ["--train_file", "note.txt", "notes.txt", "--output_dir", "new"],
        "note.txt: no such file: did you mean notes.txt?",
    ),
}


@pytest.mark.parametrize(("program", "argv", "message"), COMMANDS.values(), ids=COMMANDS)
def test_each_command_says_in_one_line_that_there_is_no_such_folder(program, argv, message, folder, hub, capsys):
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as ended:
        run_program(program, argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not hub.requests
    assert sorted(set(os.listdir()) - {"new"}) == before


def test_a_tokenizer_that_is_not_there_is_named_with_its_field(folder, hub):
    with pytest.raises(UserError, match=r"^tokenizer=runs/foo: no such folder$"):
        load_tokenizer("runs/foo")


def test_a_run_given_as_a_recipe_is_answered_with_its_recipe(folder, capsys):
    Path("runs/other/recipe.yaml").write_text("seed: 1\n")
    with pytest.raises(SystemExit):
        run_program(train.main, ["runs/other"])
    assert capsys.readouterr().err == "error: no recipe 'runs/other': did you mean runs/other/recipe.yaml?\n"


def test_an_exported_model_is_not_sent_to_convert(folder, capsys):
    export.main(["runs/other", "--format", "marian", "--output", "marian"])
    with pytest.raises(SystemExit):
        run_program(info.main, ["marian"])
    line = capsys.readouterr().err
    assert "config.json has model_type='marian', but 'vanilla_transformer' is needed: it looks like an export" in line
    assert "vanilla-transformer convert" not in line
    # With the files of a MarianTokenizer, as OPUS-MT's folders have, it is.
    for name in ("vocab.json", "source.spm", "target.spm"):
        Path("marian", name).write_text("{}")
    with pytest.raises(SystemExit):
        run_program(info.main, ["marian"])
    assert "`vanilla-transformer convert marian --format marian --output NEW_FOLDER`" in capsys.readouterr().err

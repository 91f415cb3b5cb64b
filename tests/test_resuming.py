"""Resumes runs with changed fields: a change is used, or is an error that leaves the run's folder unchanged."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_training import write_recipe

from vanilla_transformer.training.errors import RecipeError, UserError
from vanilla_transformer.training.findings import PreflightError
from vanilla_transformer.training.loop import resuming
from vanilla_transformer.training.loop.checkpoints import DATA_NAME, damage
from vanilla_transformer.training.loop.resuming import MAY_CHANGE, fingerprint, refuse_changes
from vanilla_transformer.training.settings.recipe import parse_recipe, recipe_parser
from vanilla_transformer.training.train import main, prepare


SHORT = [
    "--save_steps", "2", "--eval_steps", "2", "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true",
    "--save_total_limit", "9", "--load_best_model_at_end", "false",
]  # fmt: skip
LAST = ["--resume_from_checkpoint", "last"]
STREAM = ["--streaming", "true", "--max_source_length", "40", "--max_target_length", "40"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """The folder of a recipe, and of a run of it that ended after 4 updates."""
    folder = tmp_path_factory.mktemp("begun")
    main([str(write_recipe(folder)), *SHORT, "--max_steps", "4"])
    return folder


@pytest.fixture(scope="module")
def whole(begun, tmp_path_factory) -> Path:
    """The same run, never stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    main([str(begun / "recipe.yaml"), *SHORT, "--max_steps", "6", "--output_dir", str(run)])
    return run


@pytest.fixture
def run(begun, tmp_path) -> Path:
    """A copy of the folder, with the run, that a test may change."""
    shutil.copytree(begun / "run", tmp_path / "run")
    return tmp_path / "run"


def command(run: Path, *argv: str) -> list[str]:
    return [str(run / "recipe.yaml"), "--output_dir", str(run), *LAST, *argv]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same_end(run: Path, whole: Path) -> bool:
    files = ("model.safetensors", "optimizer.pt", "scheduler.pt")
    return all((run / "checkpoint-6" / f).read_bytes() == (whole / "checkpoint-6" / f).read_bytes() for f in files)


# Changes that a user may make by mistake: the options, and the error.
CHANGED = {
    "the width": (["--d_model", "16"], "d_model=16, but the run to resume began with d_model=32"),
    "the learning rate": (["--learning_rate", "0.5"], "learning_rate=0.5, but .* began with learning_rate=0.01"),
    "the batches": (["--per_device_train_batch_tokens", "99"], "batch_tokens=99, but .* began with .*batch_tokens=150"),
    "the accumulation": (["--gradient_accumulation_steps", "2"], "steps=2, but .* gradient_accumulation_steps=1"),
    "the metric": (["--metric_for_best_model", "ter"], "metric_for_best_model=ter, but .*=exact_match"),
    "the optimizer": (["--optim", "adafactor"], "optim=adafactor, but .* began with optim=adamw"),
    "the warm-up": (["--warmup_steps", "3"], "warmup_steps=3, but .* began with warmup_steps=20"),
    "the schedule": (["--lr_scheduler_type", "linear"], "=linear, but .* began with lr_scheduler_type=inverse_sqrt"),
    "the seed": (["--seed", "7"], "seed=7, but .* began with seed=42"),
    "the dropout": (["--dropout", "0.3"], "dropout=0.3, but .* began with dropout=0.0"),
    "the vocabulary": (["--vocab_size", "400"], "vocab_size=400, but .* began with vocab_size=300"),
    "the lengths": (["--max_source_length", "9"], "max_source_length=9, but .* began with max_source_length=256"),
    "the mean of weights": (["--ema_decay", "0.9"], "ema_decay=0.9, but .* began with ema_decay=None"),
    "how BLEU is counted": (["--bleu_tokenize", "char"], "bleu_tokenize=char, but .* began with bleu_tokenize=13a"),
}


@pytest.mark.parametrize("check", [[], ["--check"]], ids=["a run", "a check"])
@pytest.mark.parametrize(("changed", "message"), CHANGED.values(), ids=CHANGED)
def test_what_was_decided_at_the_beginning_is_refused_by_name_and_nothing_is_overwritten(changed, message, check, run):
    before = contents(run)
    for asked in (LAST, ["--resume_from_checkpoint", str(run / "checkpoint-2")]):
        with pytest.raises(RecipeError, match=f"{message}.*another output_dir"):
            main([*command(run), *asked, *changed, *check])
    assert contents(run) == before


def test_after_a_mistake_the_right_command_goes_on_to_the_bit(run, whole):
    for wrong in (["--d_model", "16"], ["--train_file", "nowhere"], ["--torch_compile_backend", "nothing"]):
        with pytest.raises(UserError):
            main(command(run, "--max_steps", "6", *wrong))
    main(command(run, "--max_steps", "6"))
    assert same_end(run, whole)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["max_steps"] == 6


def test_a_run_that_its_first_update_would_end_leaves_its_folder_free(begun, tmp_path):
    argv = [str(begun / "recipe.yaml"), *SHORT, "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(RecipeError, match="optim=galore_adamw cannot be used here"):
        main([*argv, "--optim", "galore_adamw"])
    main(argv)
    assert (tmp_path / "run" / "metrics.json").exists()


def test_a_run_goes_on_wherever_its_folder_and_its_data_have_moved(begun, run, whole, tmp_path):
    data = tmp_path / "moved"
    data.mkdir()
    for name in ("train.en", "train.de", "valid.jsonl"):
        shutil.copy(begun / name, data / f"new-{name}")
    argv = ["--train_file", "new-train.en", "new-train.de", "--validation_file", "new-valid.jsonl"]
    main(command(run, "--max_steps", "6", *argv, "--data_dir", str(data)))
    assert same_end(run, whole)


def change_line(path: Path) -> None:
    first, *rest = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([first.replace("e", "a"), *rest]), encoding="utf-8")


def cut_line(path: Path) -> None:
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")


OTHER_DATA = {
    "another word": (change_line, ["train.de"], r"train: 30 rows with the checksum \w+, but .*with 30 rows"),
    "fewer rows": (cut_line, ["train.en", "train.de"], r"train: 29 rows with the checksum \w+, but .*with 30 rows"),
    "another validation set": (cut_line, ["valid.jsonl"], r"validation: 5 rows with the checksum \w+, but .*with 6"),
}


@pytest.mark.parametrize(("change", "names", "message"), OTHER_DATA.values(), ids=OTHER_DATA)
def test_other_data_is_refused_by_its_split(change, names, message, begun, run, tmp_path, capsys):
    for name in ("train.en", "train.de", "valid.jsonl"):
        shutil.copy(begun / name, tmp_path / name)
    for name in names:
        change(tmp_path / name)
    argv = ["--train_file", "train.en", "train.de", "--validation_file", "valid.jsonl", "--data_dir", str(tmp_path)]
    before = contents(run)
    with pytest.raises(PreflightError, match=f"{message}.*another output_dir"):
        main(command(run, "--max_steps", "6", *argv))
    assert contents(run) == before
    with pytest.raises(SystemExit) as status:
        main(command(run, "--max_steps", "6", *argv, "--check"))
    assert status.value.code == 2
    assert f"error    data        {message.split()[0]}" in capsys.readouterr().out


def test_a_stream_is_known_by_the_names_and_sizes_of_its_files(begun, tmp_path):
    recipe = parse_recipe([str(begun / "recipe.yaml"), *SHORT, *STREAM, "--output_dir", str(tmp_path)])
    told = fingerprint(recipe.corpora, {})
    sizes = [(begun / name).stat().st_size for name in ("train.en", "train.de")]
    assert told == {"train": f"train.en of {sizes[0]} bytes, train.de of {sizes[1]} bytes"}
    for name in ("train.en", "train.de"):
        shutil.copy(begun / name, tmp_path / name)
    data = dataclasses.replace(recipe.data, train_file=["train.en", "train.de"], data_dir=str(tmp_path))
    moved = recipe._replace(data=data).corpora
    assert fingerprint(moved, {}) == told
    cut_line(tmp_path / "train.en")
    assert fingerprint(moved, {}) != told


def test_a_stream_that_has_changed_is_refused(begun, tmp_path):
    for name in ("train.en", "train.de", "valid.jsonl"):
        shutil.copy(begun / name, tmp_path / name)
    files = ["--train_file", "train.en", "train.de", "--validation_file", "valid.jsonl", "--data_dir", str(tmp_path)]
    argv = [str(begun / "recipe.yaml"), *SHORT, *STREAM, *files, "--output_dir", str(tmp_path / "run")]
    main([*argv, "--max_steps", "2"])
    for name in ("train.en", "train.de"):
        cut_line(tmp_path / name)
    with pytest.raises(PreflightError, match=r"train: train.en of \d+ bytes, .* is from a run with train.en of \d+"):
        main([*argv, *LAST, "--max_steps", "4"])


def test_what_may_change_is_told(run, caplog):
    caplog.set_level(logging.INFO)
    refuse_changes(parse_recipe(command(run, "--max_steps", "9", "--num_beams", "3", "--output_dir", str(run))))
    told = [line for line in caplog.messages if line.startswith("from now on")]
    assert told == [
        "from now on num_beams=3; the run began with 2",
        "from now on max_steps=9; the run began with 4",
    ]


def test_every_field_is_compared(begun, monkeypatch):
    """A change of any field, whatever its type, is used or refused, never ignored."""
    parser, recipe = recipe_parser(), parse_recipe(command(begun / "run"))
    monkeypatch.setattr(resuming, "recipe_parser", lambda: parser)
    refuse_changes(recipe)
    for name in parser.hints:
        changed = recipe._replace(given=recipe.given | {name: "something else"})
        if name in MAY_CHANGE:
            refuse_changes(changed)
        else:
            with pytest.raises(RecipeError, match=f"^{name}=something else, but the run to resume began with {name}="):
                refuse_changes(changed)


def test_an_option_that_did_nothing_and_is_refused_today_does_not_end_an_older_run(begun, run):
    with (run / "recipe.yaml").open("a") as file:
        file.write("per_device_eval_batch_size: 4\nsortish_sampler: true\n")
    refuse_changes(parse_recipe([str(begun / "run" / "recipe.yaml"), "--output_dir", str(run), *LAST]))


def test_what_may_change_are_fields():
    assert set(recipe_parser().hints) > MAY_CHANGE


def test_a_beginning_without_a_checkpoint_begins_again(begun, run):
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert prepare(parse_recipe(command(run))).checkpoint is None


class TestTheModelAlone:
    @pytest.fixture
    def alone(self, begun, tmp_path) -> Path:
        argv = [str(begun / "recipe.yaml"), *SHORT, "--save_only_model", "true", "--max_steps", "2"]
        main([*argv, "--output_dir", str(tmp_path / "alone")])
        return tmp_path / "alone"

    def test_it_cannot_be_resumed_from(self, alone):
        """Otherwise it would restart Adam and the schedule without a message."""
        before = contents(alone)
        assert damage(alone / "checkpoint-2") is None
        for asked in ("last", str(alone / "checkpoint-2")):
            for check in ([], ["--check"]):
                with pytest.raises(RecipeError, match=r"checkpoint-2 has only the model .*save_only_model.*model="):
                    main([*command(alone), "--resume_from_checkpoint", asked, "--max_steps", "4", *check])
        assert contents(alone) == before

    def test_a_new_run_takes_its_weights(self, alone, begun, tmp_path):
        argv = ["--model", str(alone / "checkpoint-2"), "--max_steps", "0", "--output_dir", str(tmp_path / "further")]
        given = yaml.safe_load((begun / "recipe.yaml").read_text())
        for name in ("d_model", "vocab_size", "encoder_layers", "decoder_layers"):
            given.pop(name)
        (tmp_path / "further.yaml").write_text(yaml.safe_dump(given))
        argv[argv.index("--max_steps") + 1] = "1"
        model = prepare(parse_recipe([str(tmp_path / "further.yaml"), *SHORT, *argv])).model
        for name, weight in load_file(alone / "checkpoint-2" / "model.safetensors").items():
            assert torch.equal(model.state_dict()[name], weight)

    def test_a_check_says_so(self, begun, tmp_path, capsys):
        argv = [str(begun / "recipe.yaml"), *SHORT, "--save_only_model", "true", "--output_dir", str(tmp_path / "new")]
        main([*argv, "--check"])
        printed = " ".join(capsys.readouterr().out.split())
        assert "warning fields save_only_model=true saves checkpoints without the states of the optimizer" in printed
        assert "this run cannot be resumed" in printed


def test_a_checkpoint_notes_its_data(begun):
    noted = json.loads((begun / "run" / "checkpoint-4" / DATA_NAME).read_text())
    assert {split: text.split(" with")[0] for split, text in noted.items()} == {
        "train": "30 rows",
        "validation": "6 rows",
    }

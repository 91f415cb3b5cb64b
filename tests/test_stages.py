"""A run in stages: where each ends, what is refused, and that a run which is killed at any moment ends the same.

`KILLS=10 pytest tests/test_stages.py -k sigkill` kills more often, over a longer run.
"""

import json
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from processes import FORKS, forked, forked_ranks, start
from test_checkpointing import Watch, left_by, wait_until
from test_corpora import SIZES, write_corpora
from test_corpora import write_recipe as write_mixture

from vanilla_transformer.training import train
from vanilla_transformer.training.errors import RecipeError
from vanilla_transformer.training.loop.checkpoints import newest_checkpoint
from vanilla_transformer.training.settings.recipe import parse_recipe
from vanilla_transformer_commands.main import run as run_program


KILLS = int(os.environ.get("KILLS", "2"))
UPDATES = 18 + 8 * KILLS
STAGES = [
    {"weights": {"backtranslated": 3, "crawled": 1}, "until": {"steps": 7}},
    {"weights": {"crawled": 1, "clean": 1}, "until": {"epochs": 1}},
    {"weights": {"clean": 1}, "until": {"stalls": 2}},
    {"weights": {"clean": 1, "backtranslated": 1}},
]
FIELDS = {
    "max_steps": UPDATES, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 5,
    "logging_steps": 3, "per_device_train_batch_tokens": 400, "gradient_accumulation_steps": 2, "bpe_dropout": 0.1,
    "dropout": 0.1, "save_total_limit": 3, "load_best_model_at_end": False, "learning_rate": 0.05,
}  # fmt: skip


def write_recipe(folder: Path, **fields) -> list[str]:
    """The recipe of a run with three corpora, stages and transforms."""
    corpora = write_corpora(folder)
    corpora["backtranslated"]["transforms"] = {"tag": "<bt>", "typos": 0.3}
    corpora["crawled"]["transforms"] = {"uppercase": 0.2, "prefix": {"column": "domain", "rate": 0.5}}
    return write_mixture(folder, **FIELDS | {"corpora": corpora, "stages": STAGES} | fields)


STREAM = {
    "streaming": True, "shuffle_buffer": 50, "bpe_dropout": 0, "max_source_length": 60, "max_target_length": 60,
    "stages": [stage for stage in STAGES if "epochs" not in stage.get("until", {})],
}  # fmt: skip


def streamed(folder: Path) -> dict:
    (folder / "valid.tsv").write_text("source\ttarget\nclean word 3\tWort clean 3.\ncrawled word\tWort crawled\n")
    return STREAM | {"validation_file": str(folder / "valid.tsv")}


def live(argv: list[str], watch: Watch) -> None:
    """Begins or continues a run, as the program does."""
    build, run = train.build_trainer, Path(yaml.safe_load(Path(argv[0]).read_text())["output_dir"])

    def watched(*args):
        trainer = build(*args)
        trainer.add_callback(watch)
        return trainer

    train.build_trainer = watched
    try:
        train.main([*argv, *(["--resume_from_checkpoint", "last"] if (run / "recipe.yaml").exists() else [])])
    finally:
        train.build_trainer = build


def logged(run: Path) -> list[dict]:
    return json.loads((newest_checkpoint(run) / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module", params=[False, True], ids=["in memory", "streamed"])
def unstopped(request, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run that nothing happened to, and the fields of its recipe."""
    folder = tmp_path_factory.mktemp("unstopped")
    fields = streamed(folder) if request.param else {}
    live(write_recipe(folder, **fields), Watch())
    return folder, fields


def test_each_stage_has_its_corpora_and_its_end(unstopped):
    folder, _ = unstopped
    stages = parse_recipe([str(folder / "recipe.yaml")]).stages
    entries = [entry for entry in logged(folder / "run") if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(3, UPDATES + 1, 3))
    begins = {
        number: next((e["step"] for e in entries if e["stage"] == number), None) for number in range(1, len(stages) + 1)
    }
    assert begins[2] == 9, "the first entry after update 7"
    assert sorted(filter(None, begins.values())) == list(filter(None, begins.values()))
    before = dict.fromkeys(SIZES, 0)
    for earlier, entry in zip([None, *entries], entries, strict=False):
        given = {name: entry[f"rows/{name}"] - before[name] for name in SIZES}
        before = {name: entry[f"rows/{name}"] for name in SIZES}
        if earlier and earlier["stage"] == entry["stage"]:
            assert {name for name, rows in given.items() if rows} == set(stages[entry["stage"] - 1].weights)


def test_sigkill_at_any_moment_changes_nothing(unstopped, tmp_path):
    folder, fields = unstopped
    seed = time.time_ns()  # other moments in each run
    print(f"seed: {seed}")
    argv = write_recipe(tmp_path, **fields)
    run, reached, dice = tmp_path / "run", FORKS.Value("i", 0), random.Random(seed)
    for _ in range(KILLS):
        last, reached.value = reached.value, 0
        update = min(last + dice.randint(1, 16), UPDATES - 1)
        # It waits for its death, so that every life ends by it.
        process = start(live, argv, Watch(reached, at=UPDATES - 1, act=partial(time.sleep, 600)))
        wait_until(lambda until=update: reached.value >= until, process)
        time.sleep(dice.random() * 0.1)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        print(reached.value, [path.name for path in run.glob("*-*")])
    process = start(live, argv, Watch(reached))
    process.join()
    assert process.exitcode == 0
    assert left_by(run) == left_by(folder / "run")
    assert (run / "model.safetensors").read_bytes() == (folder / "run" / "model.safetensors").read_bytes()
    given = [json.loads((place / "run" / "metrics.json").read_text())["corpora"] for place in (folder, tmp_path)]
    assert given[0] == given[1]


@pytest.mark.parametrize("update", [7, 8])
def test_a_signal_at_and_around_a_stages_end_changes_nothing(update, unstopped, tmp_path):
    folder, fields = unstopped
    argv = write_recipe(tmp_path, **fields)
    with pytest.raises(SystemExit):
        live(argv, Watch(at=update, act=lambda: os.kill(os.getpid(), signal.SIGTERM)))
    live(argv, Watch())
    assert left_by(tmp_path / "run") == left_by(folder / "run")


def test_a_run_that_is_made_longer_goes_on_in_its_stage(unstopped, tmp_path):
    folder, fields = unstopped
    argv = write_recipe(tmp_path, **fields)
    # An evaluation is due there, so none is added that a stage would count.
    live([*argv, "--max_steps", "8"], Watch())
    live([*argv, "--max_steps", str(UPDATES)], Watch())
    kept = [{k: v for k, v in entry.items() if k in ("loss", "step", "stage")} for entry in logged(tmp_path / "run")]
    whole = [{k: v for k, v in entry.items() if k in ("loss", "step", "stage")} for entry in logged(folder / "run")]
    assert [entry for entry in kept if "loss" in entry] == [entry for entry in whole if "loss" in entry]


def test_the_end_of_the_last_stage_is_the_end_of_the_run(tmp_path):
    stages = [STAGES[0], {"weights": {"clean": 1}, "until": {"epochs": 2}}]
    argv = write_mixture(tmp_path, **FIELDS | {"stages": stages, "eval_strategy": "epoch"})
    live(argv, Watch())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 7 < metrics["training"]["updates"] < UPDATES
    # Two epochs, and the rows of the corpus that are not held out.
    assert metrics["corpora"]["clean"]["rows"] == 2 * 38
    before = left_by(tmp_path / "run")
    live(argv, Watch(at=metrics["training"]["updates"] + 1, act=partial(pytest.fail, "an update more")))
    assert left_by(tmp_path / "run") == before


def test_one_process_and_two_take_the_same_rows_of_each_corpus(tmp_path):
    given = []
    for number, train_in in enumerate((forked, forked_ranks)):
        (tmp_path / f"{number}").mkdir()
        # The last update of an epoch has fewer batches if their number is odd, so only whole epochs can be compared.
        stages = [STAGES[0] | {"until": {"epochs": 1}}, STAGES[1] | {"until": {"epochs": 2}}]
        # As many tokens in an update, whatever the number of processes.
        fields = {"gradient_accumulation_steps": 2 - number, "save_strategy": "no", "max_steps": 99}
        argv = write_recipe(tmp_path / f"{number}", stages=stages, **fields)
        train_in(run_program, "train", argv, CUDA_VISIBLE_DEVICES="")
        metrics = json.loads((tmp_path / f"{number}" / "run" / "metrics.json").read_text())
        given.append(metrics["corpora"])
    assert given[0] == given[1]
    assert all(counts["rows"] for counts in given[0].values())


def two(first: dict | None, **second) -> list[dict]:
    return [
        {"weights": dict.fromkeys(SIZES, 1)} | ({"until": first} if first else {}),
        {"weights": {"clean": 1}} | second,
    ]


# What a recipe says wrongly of its stages, other fields, and the message.
WRONG = {
    "an unknown corpus": ([{"weights": {"cleen": 1}}], {}, "stage 1: there is no corpus 'cleen': did you mean clean"),
    "a zero weight": ([{"weights": {"clean": 0}}], {}, "stage 1: weight of clean=0 must be above 0"),
    "no weights": ([{"until": {"steps": 3}}], {}, "stage 1: weights must name corpora, as `weights: {clean: 1}`"),
    "a misspelt field": ([{"wheights": {}}], {}, "stage 1 sets the unknown field 'wheights': did you mean weights"),
    "an unused corpus": ([{"weights": {"clean": 1}}], {}, "corpora: crawled is in no stage: name it in one"),
    "an unknown end": (two({"loss": 3}), {}, "stage 1: until must be one of {steps: 5000}, {epochs: 2}, {stalls: 3}"),
    "two ends": (two({"steps": 3, "epochs": 1}), {}, "stage 1: until must be one of"),
    "half an epoch": (two({"epochs": 0.5}), {}, "stage 1: until epochs=0.5 must be a whole number from 1 on"),
    "no end": (two(None), {}, "stage 2 never begins: stage 1 has no end (until)"),
    "an end after the run's": (two({"steps": 99999}), {}, "until update 99999, and the run ends at max_"),
    "ends that go back": (two({"steps": 20}, until={"steps": 20}), {}, "stage 2 never begins: it lasts until"),
    "no length": (two({"steps": 3}), {"max_steps": -1}, "stages need max_steps"),
    "no scores": (two({"stalls": 3}), {"eval_strategy": "no"}, "stage 1 never ends: it waits until the score stalls"),
    "no translations": (two({"stalls": 3}), {"metric_for_best_model": "bleu"}, "metric_for_best_model=bleu needs"),
    "weights twice": (
        two({"steps": 3}),
        {"corpora": lambda corpora: {name: corpus | {"weight": 1} for name, corpus in corpora.items()}},
        "corpora: clean has a weight, but the stages have weights of their own",
    ),
    "without corpora": (
        two({"steps": 3}),
        {"corpora": lambda corpora: None, "train_file": ["a", "b"]},
        "stages mix corpora, but this recipe has none",
    ),
    "epochs of a stream": (two({"epochs": 3}), STREAM | {"stages": None}, "stage 1: a stream has no epochs"),
}  # fmt: skip


@pytest.mark.parametrize(("stages", "fields", "message"), WRONG.values(), ids=WRONG)
def test_stages_that_cannot_be_are_refused(stages, fields, message, tmp_path):
    corpora = fields.get("corpora", dict)(write_corpora(tmp_path))
    argv = write_mixture(tmp_path, **FIELDS | fields | {"corpora": corpora, "stages": stages})
    with pytest.raises(RecipeError) as raised:
        parse_recipe(argv)
    assert message in str(raised.value)

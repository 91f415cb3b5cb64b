"""Several training corpora in a recipe: what is read of each, what is refused by name, and a whole run."""

import json
import logging
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from vanilla_transformer.training.data.pairs import load_pairs
from vanilla_transformer.training.errors import DataError, RecipeError, UserError
from vanilla_transformer.training.settings.corpora import Transform
from vanilla_transformer.training.settings.recipe import Recipe, parse_recipe, public
from vanilla_transformer.training.train import main, prepare


SMALL = {
    "vocab_size": 300, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "per_device_train_batch_tokens": 120,
    "warmup_steps": 2, "num_train_epochs": 2, "max_new_tokens": 3, "report_to": "none", "disable_tqdm": "true",
    "metric_for_best_model": "loss", "predict_with_generate": "false",
}  # fmt: skip
SIZES = {"clean": 40, "crawled": 120, "backtranslated": 80}


def write_corpora(folder: Path) -> dict[str, dict]:
    """Three corpora: two parallel files, a table with a column of its own, and rows of JSON."""
    rows = {
        name: [(f"{name} word {number} " * (1 + number % 3), f"Wort {name} {number}.") for number in range(size)]
        for name, size in SIZES.items()
    }
    for side, language in enumerate(("en", "de")):
        (folder / f"clean.{language}").write_text("".join(f"{row[side].strip()}\n" for row in rows["clean"]))
    table = [f"{source.strip()}\t{target}\tweb{len(source) % 2}" for source, target in rows["crawled"]]
    (folder / "crawled.tsv").write_text("\n".join(["en\tde\tdomain", *table]))
    lines = [json.dumps({"source": source.strip(), "target": target}) for source, target in rows["backtranslated"]]
    (folder / "backtranslated.jsonl").write_text("\n".join(lines))
    return {
        "clean": {"train_file": [str(folder / "clean.en"), str(folder / "clean.de")]},
        "crawled": {"train_file": str(folder / "crawled.tsv"), "source_lang": "en", "target_lang": "de"},
        "backtranslated": {"train_file": str(folder / "backtranslated.jsonl")},
    }


def write_recipe(folder: Path, **fields) -> list[str]:
    """A recipe of the three corpora, and the command line that names it."""
    corpora = {} if "corpora" in fields else {"corpora": write_corpora(folder)}
    recipe = SMALL | corpora | {"output_dir": str(folder / "run")} | fields
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return [str(folder / "recipe.yaml")]


def weighted(folder: Path, **weights) -> dict[str, dict]:
    return {name: corpus | {"weight": weights[name]} for name, corpus in write_corpora(folder).items()}


def read(folder: Path, **fields) -> Recipe:
    return parse_recipe(write_recipe(folder, **fields))


def test_a_corpus_has_its_own_fields_and_the_recipes_for_the_rest(tmp_path):
    corpora = write_corpora(tmp_path)
    corpora["clean"] |= {"weight": "2.5", "max_length_ratio": 3, "transforms": {"tag": "<clean>", "typos": 0.1}}
    corpora["crawled"] |= {"weight": 1, "drop_duplicates": True}
    corpora["backtranslated"] |= {"weight": 1, "target_lang": "no"}
    fields = {"max_length_ratio": 2, "transforms": {"uppercase": 0.05}, "source_lang": "en", "target_lang": "de"}
    recipe = read(tmp_path, corpora=corpora, **fields)
    clean, crawled, _ = recipe.corpora
    assert [corpus.name for corpus in recipe.corpora] == list(SIZES)
    assert [corpus.weight for corpus in recipe.corpora] == [2.5, 1, 1]
    assert [corpus.data.max_length_ratio for corpus in recipe.corpora] == [3, 2, 2]
    assert [corpus.data.drop_duplicates for corpus in recipe.corpora] == [False, True, False]
    assert [corpus.data.direction for corpus in recipe.corpora] == [("en", "de"), ("en", "de"), ("en", "no")]
    # In the order in which they are applied, whatever that of the recipe.
    assert clean.transforms == (Transform("typos", 0.1), Transform("tag", 1.0, "<clean>"))
    assert crawled.transforms == (Transform("uppercase", 0.05),)
    assert recipe.data.train_file is None


# What a recipe does wrong, and what is said: a change of `corpora`, other fields, the message.
WRONG = {
    "a misspelt field": ({"clean": {"weigth": 1}}, {}, "clean sets the unknown field 'weigth': did you mean weight"),
    "a field that is the run's": ({"clean": {"d_model": 1}}, {}, "corpora: clean sets the unknown field 'd_model'"),
    "a zero weight": ({"clean": {"weight": 0}}, {}, "corpora: clean: weight=0 must be above 0: leave the corpus out"),
    "a negative weight": ({"clean": {"weight": -1}}, {}, "corpora: clean: weight=-1 must be above 0"),
    "a weight in words": ({"clean": {"weight": "much"}}, {}, "corpora: clean: weight must be a number, not 'much'"),
    "one weight": ({"clean": {"weight": 2}}, {}, "corpora: crawled has no weight, but others have"),
    "no data": ({"clean": {"train_file": None}}, {}, "corpora: clean: no data: give it a train_file or a dataset"),
    "data twice": ({"clean": {"dataset": "a/b"}}, {}, "corpora: clean: dataset='a/b' and train_file are both given"),
    "a wrong value": ({"clean": {"max_source_length": "x"}}, {}, "corpora: clean: field max_source_length"),
    "a number out of range": ({"clean": {"max_source_length": 0}}, {}, "clean: max_source_length=0 must be at"),
    "a file besides": ({}, {"train_file": ["a", "b"]}, "train_file and corpora are both given"),
    "a temperature besides weights": (
        {name: {"weight": 1} for name in SIZES},
        {"mixing_temperature": 5},
        "mixing_temperature=5 derives the weights from the corpora's sizes, but they have weights",
    ),
    "a temperature of 0": ({}, {"mixing_temperature": 0}, "mixing_temperature=0.0 must be above 0"),
    "an unknown transform": ({"clean": {"transforms": {"typo": 1}}}, {}, "'typo' is unknown: did you mean typos"),
    "a rate above 1": ({"clean": {"transforms": {"typos": 5}}}, {}, "typos: rate=5 must be above 0, and at"),
    "no rate": ({"clean": {"transforms": {"typos": {}}}}, {}, "transforms: typos: no rate"),
    "no tag": ({"clean": {"transforms": {"tag": {"rate": 1}}}}, {}, "tag: no text: write it as `tag: <bt>`"),
    "a transform's misspelt option": (
        {"clean": {"transforms": {"prefix": {"colum": "x"}}}},
        {},
        "transforms: prefix: 'colum' is unknown: did you mean column",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "fields", "message"), WRONG.values(), ids=WRONG)
def test_what_a_recipe_says_wrongly_is_refused_by_the_name_of_the_corpus(changes, fields, message, tmp_path):
    corpora = write_corpora(tmp_path)
    for name, change in changes.items():
        corpora[name] |= change
    with pytest.raises(UserError) as raised:
        read(tmp_path, corpora=corpora, **fields)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("corpora", [{}, {"clean": "a.tsv"}, ["a.tsv"], "a.tsv"], ids=str)
def test_corpora_that_are_no_mapping_of_mappings_are_refused(corpora, tmp_path):
    with pytest.raises(RecipeError, match="corpora"):
        read(tmp_path, corpora=corpora)


def read_all(argv: list[str]) -> None:
    """Prepares a run, and reads a batch: a stream finds faults where it reaches them."""
    for rows in prepare(parse_recipe(argv)).rows["train"]:
        next(iter(rows))


@pytest.mark.parametrize("streaming", [False, True], ids=["in memory", "streamed"])
def test_faults_of_the_data_are_told_by_the_name_of_the_corpus(streaming, tmp_path):
    # Something to score the model on, without which a stream is refused.
    (tmp_path / "valid.tsv").write_text("source\ttarget\na\tb\n")
    stream = {"streaming": True, "max_steps": 2, "eval_strategy": "no", "save_strategy": "no"} if streaming else {}
    stream |= {"validation_file": str(tmp_path / "valid.tsv"), "max_source_length": 40, "max_target_length": 40}
    for name, content, message in (
        ("crawled.tsv", "en\tde\n", "corpora: crawled: train: "),
        ("crawled.tsv", "en\tde\nonly one\n", "corpora: crawled: .*crawled.tsv, line 2: 1 value"),
        ("crawled.tsv", "fr\tde\nun\tein\n", "corpora: crawled: .*there is no column 'en'"),
        ("backtranslated.jsonl", '{"source": "a", "target": ""}', "backtranslated: .*an empty side"),
    ):
        corpora = weighted(tmp_path, clean=1, crawled=1, backtranslated=1)
        argv = write_recipe(tmp_path, **stream, corpora=corpora, load_best_model_at_end=False)
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            read_all(argv)


def test_a_corpus_that_needs_a_column_it_has_not_is_refused(tmp_path):
    corpora = write_corpora(tmp_path)
    corpora["clean"]["transforms"] = {"prefix": "domain"}
    with pytest.raises(DataError, match=r"clean: train: there is no column 'domain' .*there are source, target"):
        prepare(read(tmp_path, corpora=corpora))


def test_each_corpus_is_filtered_by_its_own_fields_and_the_log_names_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    corpora = write_corpora(tmp_path)
    with (tmp_path / "crawled.tsv").open("a") as file:
        file.write("\nthe same\tthe same\tweb\nthe same\tthe same\tweb")
    corpora["crawled"] |= {"drop_duplicates": True, "drop_identical": True}
    run = prepare(read(tmp_path, corpora=corpora, eval_strategy="no", load_best_model_at_end=False))
    assert [int((run.rows["train"].with_format("numpy")["corpus"][:] == n).sum()) for n in range(3)] == [40, 120, 80]
    (said,) = [line for line in caplog.messages if line.startswith("crawled: kept 120 of 122 rows")]
    assert "identical sides" in said
    assert [line for line in caplog.messages if line.startswith("clean: kept 40 of 40 rows")]


def test_rows_that_are_held_out_come_from_every_corpus_and_are_not_transformed(tmp_path):
    corpora = write_corpora(tmp_path)
    corpora["clean"]["transforms"] = {"uppercase": 1, "tag": "<clean>"}
    run = prepare(read(tmp_path, corpora=corpora))
    held_out = run.pairs["validation"]
    assert len(held_out) == sum(SIZES.values()) / 20
    assert {source.split()[0] for source in held_out["source"]} == set(SIZES)
    decode = run.tokenizer.decode
    for split in ("train", "validation"):
        texts = [decode(ids, skip_special_tokens=True) for ids in run.rows[split]["labels"]]
        upper = [text.upper() if text.startswith("Wort clean") else text for text in run.pairs[split]["target"]]
        assert texts == (upper if split == "train" else run.pairs[split]["target"])
    trained = set(zip(run.pairs["train"]["source"], run.pairs["train"]["target"], strict=True))
    assert not trained & set(zip(held_out["source"], held_out["target"], strict=True))
    assert len(run.pairs["train"]) == len(run.rows["train"])


def test_validation_and_test_data_may_be_those_of_a_data_set_whose_training_split_is_not_used(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"source": f"{split} of the set", "target": "x"}))
    run = prepare(read(tmp_path, dataset=str(folder)))
    assert run.pairs["test"]["source"] == ["test of the set"]
    assert run.pairs["validation"]["source"] == ["validation of the set"]
    assert len(run.pairs["train"]) == sum(SIZES.values())


def test_one_corpus_under_a_name_has_the_rows_of_the_short_form(tmp_path):
    files = write_corpora(tmp_path)["clean"]["train_file"]
    short = prepare(read(tmp_path, corpora=None, train_file=files))
    named = prepare(read(tmp_path, corpora={"clean": {"train_file": files}}))
    for split in ("train", "validation"):
        assert named.rows[split].select_columns(["input_ids", "labels"]).to_list() == short.rows[split].to_list()
        assert named.pairs[split].to_list() == short.pairs[split].to_list()
    assert short.pairs["train"].to_list() != load_pairs(short.recipe.data)["train"].to_list()  # some are held out


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a recipe and its run, with weights, transforms and BPE-dropout."""
    folder = tmp_path_factory.mktemp("finished")
    corpora = weighted(folder, clean=2, crawled=1, backtranslated=1)
    corpora["backtranslated"]["transforms"] = {"tag": "<bt>", "typos": 0.5}
    corpora["crawled"]["transforms"] = {"prefix": "domain"}
    main(write_recipe(folder, corpora=corpora, bpe_dropout=0.1, logging_steps=3))
    return folder


def test_log_metrics_and_card_say_what_each_corpus_gave(finished):
    metrics = json.loads((finished / "run" / "metrics.json").read_text())
    given = metrics["corpora"]
    # Two epochs of the rows that are not held out.
    rows = 2 * metrics["rows"]["train"]
    assert sum(corpus["rows"] for corpus in given.values()) == rows == 2 * 228
    assert {name: corpus["rows"] for name, corpus in given.items()} == {
        "clean": rows / 2, "crawled": rows / 4, "backtranslated": rows / 4,
    }  # fmt: skip
    assert all(corpus["source_tokens"] > 3 * corpus["rows"] for corpus in given.values())
    card = ModelCard.load(finished / "run" / "README.md").text
    assert f"| clean | {rows // 2} | {given['clean']['source_tokens']:,} |" in card
    assert "clean, crawled, backtranslated: 228 train" in card
    state = json.loads(max((finished / "run").glob("checkpoint-*/trainer_state.json")).read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    counts = [[entry[f"rows/{name}"] for name in SIZES] for entry in logged]
    assert counts == sorted(counts)
    assert all(abs(clean / sum(row) - 0.5) < 0.2 for row in counts for clean in row[:1])
    assert 0 < logged[-1]["tokens/clean"] <= given["clean"]["source_tokens"] + given["clean"]["target_tokens"]


def test_the_runs_recipe_repeats_it_and_the_published_one_hides_folders(finished):
    path = finished / "run" / "recipe.yaml"
    recipe = parse_recipe([str(path)])
    assert recipe.corpora == parse_recipe([str(finished / "recipe.yaml")]).corpora
    shown = public(recipe.given)["corpora"]
    assert shown["clean"]["train_file"] == ["clean.en", "clean.de"]
    assert shown["crawled"] | {"train_file": "crawled.tsv"} == shown["crawled"]
    assert str(finished) not in yaml.safe_dump(shown)
    card = (finished / "run" / "README.md").read_text()
    assert "  clean:\n    train_file:\n    - clean.en\n" in card
    assert f"{finished}/clean.en" not in card


def test_a_check_shows_the_mixture_and_five_examples_of_each_transform(finished, tmp_path, capsys):
    main([str(finished / "recipe.yaml"), "--output_dir", str(tmp_path / "run"), "--check"])
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    assert "an epoch has 228 rows: clean: 114 rows, 50.0%; each of its 38 rows 3 times" in words
    parts = printed.split("The run can start.")[1].strip().split("\n\n")
    assert [part.splitlines()[0] for part in parts] == [
        "crawled: prefix, 100% of the rows, for example",
        "backtranslated: typos, 50% of the rows, for example",
        "backtranslated: tag, 100% of the rows, for example",
    ]
    for part in parts:
        examples = part.splitlines()[1:]
        assert len(examples) == 5
        for example in examples:
            before, after = example.split(" -> ")
            assert before.strip() != after.strip()
    assert all(" -> <bt> " in example for example in parts[2].splitlines()[1:])
    assert not (tmp_path / "run").exists()


CHANGED = {
    "a weight": ({"clean": {"weight": 3}}, "corpora=.* but the run to resume began with corpora="),
    "a transform": ({"clean": {"transforms": {"typos": 0.1}}}, "corpora=.* but the run to resume began with corpora="),
}


@pytest.mark.parametrize(("changes", "message"), CHANGED.values(), ids=CHANGED)
def test_a_run_resumes_only_with_the_same_mixture(changes, message, finished):
    recipe = yaml.safe_load((finished / "run" / "recipe.yaml").read_text())
    for name, change in changes.items():
        recipe["corpora"][name] |= change
    (finished / "changed.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.raises(RecipeError, match=message):
        main([str(finished / "changed.yaml"), "--resume_from_checkpoint", "last"])


def test_a_run_resumes_where_its_corpora_have_moved(finished, tmp_path):
    recipe = yaml.safe_load((finished / "run" / "recipe.yaml").read_text())
    moved = write_corpora(tmp_path)
    for name, corpus in recipe["corpora"].items():
        corpus["train_file"] = moved[name]["train_file"]
    (tmp_path / "moved.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert prepare(parse_recipe([str(tmp_path / "moved.yaml"), "--resume_from_checkpoint", "last"])).checkpoint

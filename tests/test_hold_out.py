"""A run with only a training file: some rows are held out, listed in the log, and not trained on."""

import json
import logging

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from vanilla_transformer.training.checks.inputs import check_inputs
from vanilla_transformer.training.data.pairs import ENCODED, hold_out
from vanilla_transformer.training.findings import PreflightError, require
from vanilla_transformer.training.settings.recipe import parse_recipe
from vanilla_transformer.training.train import main, prepare


SMALL = {
    "vocab_size": 300, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "per_device_train_batch_tokens": 900,
    "warmup_steps": 2, "num_train_epochs": 1, "max_new_tokens": 3, "report_to": "none", "disable_tqdm": "true",
}  # fmt: skip
# Rows 0 and 50 are left out by the filters: one has no text, one has too much.
ROWS = [(f"word {number}", f"Wort {number}") for number in range(100)]
ROWS[0], ROWS[50] = ("", "leer"), ("long " * 300, "lang")
LEFT = [row for row in ROWS if row not in (ROWS[0], ROWS[50])]


@pytest.fixture
def files(tmp_path) -> list[str]:
    """A command line with only training files."""
    for number, name in enumerate(("train.en", "train.de")):
        (tmp_path / name).write_text("".join(f"{row[number]}\n" for row in ROWS))
    names = [str(tmp_path / name) for name in ("train.en", "train.de")]
    small = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return ["--train_file", *names, "--output_dir", str(tmp_path / "run"), *small]


def rows_of(pairs: Dataset) -> list[tuple[str, str]]:
    return list(zip(pairs["source"], pairs["target"], strict=True))


@pytest.mark.parametrize("options", [[], ["--bpe_dropout", "0.1"], ["--seed", "7"]], ids=["plain", "dropout", "seed"])
def test_every_20th_row_that_passes_the_filters_is_held_out(options, files, caplog):
    caplog.set_level(logging.INFO)
    run = prepare(parse_recipe([*files, *options]))
    require(check_inputs(run))
    assert rows_of(run.pairs["validation"]) == LEFT[::20]
    assert rows_of(run.pairs["train"]) == [row for row in ROWS[1:] if row not in LEFT[::20]]
    trained, evaluated = run.rows["train"], run.rows["validation"]
    decode = run.tokenizer.decode
    texts = [decode(ids, skip_special_tokens=True) for ids in evaluated["labels"]]
    assert texts == [target for _, target in LEFT[::20]]
    assert evaluated.column_names == list(ENCODED)
    texts = [decode(row["input_ids"], skip_special_tokens=True) for row in trained]
    assert texts == [source for source, _ in LEFT if source not in dict(LEFT[::20])]
    (said,) = [line for line in caplog.messages if "held out" in line]
    assert "every 20th training row, 5 of 98, is held out" in said
    assert "validation_file" in said


@pytest.mark.parametrize("count", [2, 19, 20, 21, 999, 20_000, 20_001, 54_321])
def test_at_most_1000_rows_are_held_out_and_at_most_a_twentieth(count):
    text = DatasetDict({"train": Dataset.from_dict({"source": list(map(str, range(count)))})})
    rows = {
        "train": Dataset.from_dict({"input_ids": [[n] for n in range(count)], "labels": [[n] for n in range(count)]})
    }
    hold_out(text, rows, np.arange(count))
    held_out = [ids[0] for ids in rows["validation"]["input_ids"]]
    assert len(held_out) == min(-(-count // 20), len(held_out)) <= 1000
    assert len(held_out) > min(count / 20, 1000) * 0.9
    assert text["validation"]["source"] == list(map(str, held_out))
    both = held_out + [ids[0] for ids in rows["train"]["input_ids"]]
    assert sorted(both) == list(range(count))
    assert [*text["train"]["source"], *text["validation"]["source"]] == list(map(str, both[len(held_out) :] + held_out))


def test_a_training_file_alone_is_enough_and_the_run_resumes(files, tmp_path):
    main([*files, "--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["rows"] == {"train": 94, "validation": 5}
    assert metrics["scored_split"] == "validation"
    again = [str(tmp_path / "run" / "recipe.yaml"), "--resume_from_checkpoint", "last", "--num_train_epochs", "2"]
    main(again)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["training"]["epochs"] == 2


def test_nothing_is_held_out_where_nothing_is_evaluated(files):
    run = prepare(parse_recipe([*files, "--eval_strategy", "no", "--load_best_model_at_end", "false"]))
    assert rows_of(run.pairs["train"]) == ROWS[1:]
    assert "validation" not in run.rows


def test_a_test_set_is_not_what_chooses_the_checkpoint(files, tmp_path):
    run = prepare(parse_recipe([*files, "--test_file", str(tmp_path / "train.en"), str(tmp_path / "train.de")]))
    assert rows_of(run.pairs["validation"]) == LEFT[::20]
    assert len(run.pairs["test"]) == 100


def test_one_row_alone_and_a_stream_are_refused_in_words(files, tmp_path):
    for name in ("one.en", "one.de"):
        (tmp_path / name).write_text("one\n")
    one = [*files, "--train_file", str(tmp_path / "one.en"), str(tmp_path / "one.de")]
    test = ["--test_file", str(tmp_path / "one.en"), str(tmp_path / "one.de")]
    steps = ["--max_steps", "2", "--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "500"]
    for argv in (one, [*files, *test, "--streaming", "true", *steps]):
        with pytest.raises(PreflightError, match="needs a validation split: give validation_file"):
            require(check_inputs(prepare(parse_recipe(argv))))

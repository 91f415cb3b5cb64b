"""Test text with several references, and with a column by whose values it is scored."""

import json
from pathlib import Path

import pytest

from vanilla_transformer.training.data.pairs import groups_of, load_pairs, references_of
from vanilla_transformer.training.errors import DataError
from vanilla_transformer.training.settings.arguments import DataArguments


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(**files: list[str]) -> None:
    for name, lines in files.items():
        Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_rows(name: str, *rows: dict) -> None:
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def test_test_text_has_several_references_and_a_blank_one_is_missing():
    write(en=["a", "b", "c"], de=["x", "", "z"], at=["x x", "", " "], ch=["", "yy", "zz"])
    pairs = load_pairs(DataArguments(test_file=["en", "de", "at", "ch"]))["test"]
    assert pairs["target"][:] == ["x", "", "z"]
    assert references_of(pairs) == [["x", "x x", None], ["", None, "yy"], ["z", None, "zz"]]
    some = load_pairs(DataArguments(test_file=["en", "de", "at"], max_eval_samples=1))["test"]
    assert references_of(some) == [["x", "x x"]]
    one = load_pairs(DataArguments(test_file=["en", "de"]))["test"]
    assert references_of(one) == ["x", "", "z"]
    assert one.column_names == ["source", "target"]


def test_a_table_has_further_references_in_columns():
    write_rows("a.jsonl", {"source": "a", "target": "x", "reference_2": "y"}, {"source": "b", "target": "z"})
    data = DataArguments(test_file="a.jsonl", train_file="a.jsonl")
    assert references_of(load_pairs(data)["test"]) == [["x", "y"], ["z", None]]
    assert load_pairs(data)["train"].column_names == ["source", "target"]


def test_groups_are_the_values_of_one_column_or_of_several():
    rows = [{"s": "a", "t": "b", "corpus": "news", "year": 2014, "from": "en", "to": "de"}]
    rows += [{**rows[0], "corpus": "chat", "to": "cs"}, {**rows[0], "year": 2015}]
    write_rows("a.jsonl", *rows)
    sides = {"source_column": "s", "target_column": "t"}

    def groups(*columns, split="test", **options):
        data = DataArguments(**{f"{split}_file": ["a.jsonl"]}, group_column=list(columns), **sides, **options)
        return groups_of(load_pairs(data)[split])

    assert groups("corpus") == ["news", "chat", "news"]
    assert groups("year", split="validation") == ["2014", "2014", "2015"]
    assert groups("from", "to", max_eval_samples=2) == ["en-de", "en-cs"]
    assert groups() is None
    assert DataArguments(test_file="a.jsonl", group_column="corpus").group_column == ["corpus"]


def test_what_cannot_be_scored_is_named():
    write(en=["a", "b"], de=["x", "y"], at=["x"])
    write_rows("a.jsonl", {"source": "a", "target": "x", "corpus": "c"}, {"source": "a", "target": "x", "corpus": ""})
    write_rows("b.jsonl", {"source": "a", "target": "x", "reference_2": 7})
    for arguments, message in (
        ({"test_file": ["en", "de", "at"]}, "^en has 2 lines and at has 1"),
        ({"validation_file": ["en", "de", "de"]}, "^validation_file names 3 files: give one data file, or two"),
        ({"test_file": ["b.jsonl"]}, "^test, row 1: reference_2 "),
        (
            {"test_file": ["a.jsonl"], "group_column": ["copus"]},
            "^group_column=copus: the test table has no .* corpus$",
        ),
        ({"test_file": ["en", "de"], "group_column": ["corpus"]}, "^group_column=corpus: the test table has no such"),
        ({"test_file": ["a.jsonl"], "group_column": ["corpus"]}, "^test, row 2: corpus has no value"),
        ({"validation_file": ["en", "de"], "group_column": ["corpus"]}, "^group_column=corpus: the validation table"),
    ):
        with pytest.raises(DataError, match=message):
            load_pairs(DataArguments(**arguments))

"""Rows that JSON, CSV and parquet can hold and training cannot use: where they are, in a message of a line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vanilla_transformer.training.data.pairs import load_pairs
from vanilla_transformer.training.data.streaming import open_stream
from vanilla_transformer.training.errors import DataError
from vanilla_transformer.training.settings.arguments import DataArguments


ROWS = [{"source": f"s{number}", "target": f"t{number}"} for number in range(3)]
HALF = r'{"source": "ab", "target": "c\ud83d"}'


def message_of(path: Path, content: str | bytes, streaming: bool = False) -> str:
    """What the error says of a training file."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    data = DataArguments(train_file=[str(path)], streaming=streaming)
    with pytest.raises(DataError) as refused:
        list(open_stream(data) if streaming else load_pairs(data))
    assert len(str(refused.value).removeprefix(str(path))) < 500
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("before", ["\n", " ", "\n\n  \t", "\r\n", "\ufeff\n"], ids=ascii)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_may_begin_after_white_space(before, indent, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(before + json.dumps(ROWS, indent=indent), encoding="utf-8")
    assert load_pairs(DataArguments(train_file=[str(path)]))["train"].to_list() == ROWS
    assert "a list cannot be streamed" in message_of(path, path.read_bytes(), streaming=True)


def test_an_error_in_such_a_list_names_its_line(tmp_path):
    assert "rows.json, line 4: this is not JSON" in message_of(tmp_path / "rows.json", "\n\n[{},\n{,]")


MANY = "many words " * 999
LONG = json.dumps([f"text {number}" for number in range(5000)])
LONG_VALUES = {
    "a list on a line": ("rows.jsonl", f'{{"source": "a", "target": "b"}}\n{LONG}', "line 2: must be an object"),
    "a list in a list": (
        "rows.json",
        f"[{LONG}]",
        "row 1: must be an object with a source and a target, not ['text 0'",
    ),
    "a text on a line": ("rows.jsonl", json.dumps(MANY), "line 1: must be an object"),
    "a list in a row": ("rows.jsonl", f'{{"source": "a", "target": {LONG}}}', "row 1: the target is ['text 0'"),
    "no head": ("rows.csv", f"{MANY},{MANY}\n" * 2, "name one of many words"),
    "a number without an end": ("rows.jsonl", "1" * 5000, "line 1: this cannot be read"),
    "lists without an end": ("rows.jsonl", "{}\n" + '{"source":' * 99999, "line 2: this cannot be read"),
}


@pytest.mark.parametrize(("name", "content", "message"), LONG_VALUES.values(), ids=LONG_VALUES)
def test_a_message_shows_the_beginning_of_a_long_value(name, content, message, tmp_path):
    assert message in message_of(tmp_path / name, content)


FAULT = r"the target has half of a surrogate pair, '\ud83d', at character 2, and must be Unicode text"


def test_half_of_a_surrogate_pair_is_named_with_its_row(tmp_path):
    good = json.dumps(ROWS[0])
    assert message_of(tmp_path / "rows.jsonl", f"{good}\n{HALF}\n") == f"train, row 2: {FAULT}"
    assert message_of(tmp_path / "rows.json", f"[{good}, {HALF}]") == f"train, row 2: {FAULT}"
    path = tmp_path / "stream.jsonl"
    assert message_of(path, f"{good}\n\n{HALF}\n", streaming=True) == f"{path}, line 3: {FAULT}"
    # A whole pair is a character.
    path.write_text(HALF.replace("ud83d", r"ud83d\ude00"))
    assert load_pairs(DataArguments(train_file=[str(path)]))["train"]["target"][0] == "c\U0001f600"


def test_bytes_that_are_no_text_in_a_parquet_file_are_named(tmp_path):
    texts = pa.array([b"a"] * 1200 + [b"c\xed\xa0\xbd", b"d"]).view(pa.string())
    pq.write_table(pa.table({"source": texts, "target": ["b"] * 1202}), tmp_path / "rows.parquet")
    message = message_of(tmp_path / "rows.parquet", (tmp_path / "rows.parquet").read_bytes())
    assert message.startswith("train, row 1201: the source is not UTF-8 ('utf-8' codec can't decode byte 0xed")

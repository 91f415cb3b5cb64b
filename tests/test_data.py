"""What goes into training: every kind of source, and every kind of mistake with the message it gets."""

import gzip
import json
import logging
import os
from pathlib import Path

import pytest
from datasets import Dataset, Features, Translation

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training.data.filters import FilterReport
from vanilla_transformer.training.data.pairs import (
    load_pairs,
    tokenize_pairs,
    training_texts,
)
from vanilla_transformer.training.data.reading.lines import read_lines, warn_once
from vanilla_transformer.training.errors import DataError
from vanilla_transformer.training.settings.arguments import DataArguments


SOURCES = ['a "quoted" house', "NA", "007"]
TARGETS = ["ein Haus, dort", "2024-01-02", "null"]
PAIRS = [{"source": source, "target": target} for source, target in zip(SOURCES, TARGETS, strict=True)]
TRANSLATIONS = [{"translation": {"en": source, "de": target}} for source, target in zip(SOURCES, TARGETS, strict=True)]


def text(*lines: str) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


def json_lines(rows: list) -> bytes:
    return text(*(json.dumps(row) for row in rows))


def parquet(rows: list, features: Features | None = None) -> bytes:
    path = Path("table.parquet")
    Dataset.from_list(rows, features=features).to_parquet(path)
    return path.read_bytes()


CSV = text('source,ignored,"target"', '"a ""quoted"" house",1,"ein Haus, dort"', "NA,2,2024-01-02", "007,3,null")
TSV = text("en\tde", 'a "quoted" house\tein Haus, dort', "NA\t2024-01-02", "007\tnull")
ENGLISH_GERMAN = {"source_lang": "en", "target_lang": "de"}
TRANSLATION = Features({"translation": Translation(languages=["en", "de"])})

# file names -> contents, and the arguments that name the columns
GOOD_FILES = {
    "jsonl": ({"train.jsonl": lambda: json_lines(PAIRS)}, {}),
    "jsonl, gz": ({"train.jsonl.gz": lambda: gzip.compress(json_lines(PAIRS))}, {}),
    "json list": ({"train.json": lambda: json.dumps(PAIRS, indent=1).encode()}, {}),
    "translation": ({"train.jsonl": lambda: json_lines(TRANSLATIONS)}, ENGLISH_GERMAN),
    "csv": ({"train.csv": lambda: CSV}, {}),
    "csv with byte order mark": ({"train.csv": lambda: b"\xef\xbb\xbf" + CSV}, {}),
    "tsv by language": ({"train.tsv": lambda: TSV}, ENGLISH_GERMAN),
    "tsv by column": ({"train.tsv": lambda: TSV}, {"source_column": "en", "target_column": "de"}),
    "parquet": ({"train.parquet": lambda: parquet(PAIRS)}, {}),
    "translation parquet": ({"train.parquet": lambda: parquet(TRANSLATIONS, TRANSLATION)}, ENGLISH_GERMAN),
    "text": ({"train.en": lambda: text(*SOURCES), "train.de": lambda: text(*TARGETS)}, {}),
    "text of Windows": ({"en.txt": lambda: "\r\n".join(SOURCES).encode(), "de.txt": lambda: text(*TARGETS)}, {}),
    "text, gz": (
        {"en.gz": lambda: gzip.compress(text(*SOURCES)), "de.gz": lambda: gzip.compress(text(*TARGETS))},
        {},
    ),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in; the cache of `datasets` lies elsewhere."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(files: dict[str, bytes]) -> list[str]:
    for name, content in files.items():
        Path(name).write_bytes(content)
    return list(files)


def rows_of(pairs: Dataset) -> list[tuple[str, str]]:
    assert pairs.column_names == ["source", "target"]
    return list(zip(pairs["source"], pairs["target"], strict=True))


@pytest.mark.parametrize("kind", GOOD_FILES)
def test_every_kind_of_file_gives_the_same_pairs(kind, folder):
    files, arguments = GOOD_FILES[kind]
    names = write({name: content() for name, content in files.items()})
    before = sorted(folder.iterdir())
    pairs = load_pairs(DataArguments(train_file=names, **arguments))
    assert list(pairs) == ["train"]
    assert rows_of(pairs["train"]) == list(zip(SOURCES, TARGETS, strict=True))
    assert sorted(folder.iterdir()) == before, "nothing is left beside the user's files"


def test_a_folder_is_a_dataset_with_its_splits(folder):
    data = folder / "set"
    data.mkdir()
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        (data / f"{split}.jsonl").write_bytes(json_lines([{"en": f"{split} {n}", "de": "x"} for n in range(count)]))
    pairs = load_pairs(DataArguments(dataset=str(data), **ENGLISH_GERMAN))
    assert {split: len(rows) for split, rows in pairs.items()} == {"train": 3, "validation": 2, "test": 1}
    assert rows_of(pairs["test"]) == [("test 0", "x")]


def test_the_phrasebook_is_a_dataset():
    data = DataArguments(dataset="phrasebook:en-de", phrasebook_size=40, max_eval_samples=5)
    pairs = load_pairs(data)
    assert {split: len(rows) for split, rows in pairs.items()} == {"train": 40, "validation": 5, "test": 5}
    assert all(rows_of(rows) for rows in pairs.values())
    assert data.direction == ("en", "de")


def test_paths_take_environment_variables_and_the_home_folder(folder, monkeypatch):
    (folder / "sub").mkdir()
    write({"sub/a": text("a"), "sub/b": text("b")})
    monkeypatch.setenv("SOME_DIR", str(folder))
    monkeypatch.setenv("HOME", str(folder))
    for arguments in (
        {"train_file": ["$SOME_DIR/sub/a", "${SOME_DIR}/sub/b"]},
        {"train_file": ["~/sub/a", "~/sub/b"]},
        {"train_file": ["a", "b"], "data_dir": "$SOME_DIR/sub"},
        {"train_file": ["a", str(folder / "sub" / "b")], "data_dir": "~/sub"},
    ):
        assert rows_of(load_pairs(DataArguments(**arguments))["train"]) == [("a", "b")]


def test_only_a_line_feed_ends_a_line():
    lines = ["a\u2028b", "c\x0bd\x85e\x1cf", "", "g\rh", " i "]
    write({"a": text(*lines), "b.gz": gzip.compress(text(*lines)), "c": text(*lines)[:-1]})
    assert list(read_lines("a")) == list(read_lines(Path("b.gz"))) == list(read_lines("c")) == lines


BOTH = {"en": text("a", "b", "c"), "de": text("x", "y", "z")}
LATIN = "gut\nschön\n".encode("latin-1")
COMPRESSED = gzip.compress(text(*map(str, range(9000))))

# files, arguments, what the message must say
BAD_DATA = {
    "nothing": ({}, {}, "no data: give a dataset, or train_file"),
    "two sources": (BOTH, {"dataset": "x", "train_file": ["en", "de"]}, "dataset='x' and train_file are both given"),
    "missing": (BOTH, {"train_file": ["en", "fr"]}, "fr: no such file"),
    "missing, later": (BOTH, {"train_file": ["en", "de"], "test_file": ["fr", "de"]}, "fr: no such file"),
    "a folder": (BOTH, {"train_file": [".", "de"]}, "Is a directory"),
    "unset variable": ({}, {"train_file": ["$UNSET_DIR/en", "de"]}, "$UNSET_DIR is not set"),
    "unset data_dir": ({}, {"train_file": ["en", "de"], "data_dir": "${UNSET_DIR}"}, "$UNSET_DIR is not set"),
    "misaligned": (
        {"en": text("a", "b", "c"), "de": text("x", "y")},
        {"train_file": ["en", "de"]},
        "en has 3 lines and de has 2",
    ),
    "three files": (BOTH, {"train_file": ["en", "de", "en"]}, "train_file names 3 files"),
    "suffix": (
        {"a.txt": b"a"},
        {"train_file": ["a.txt"]},
        ".jsonl, .json, .csv, .tsv, .tmx, .xlf, .xliff, .po, .xml or .parquet",
    ),
    "not UTF-8": ({**BOTH, "de": LATIN}, {"train_file": ["en", "de"]}, "de, line 2: byte 0xf6 is not UTF-8"),
    "not UTF-8, gz": (
        {**BOTH, "de.gz": gzip.compress(LATIN)},
        {"train_file": ["en", "de.gz"]},
        "de.gz, line 2: byte 0xf6 is not UTF-8",
    ),
    "not UTF-8, csv": (
        {"a.csv": b"source,target\na,gut\nb,sch\xf6n\n"},
        {"train_file": ["a.csv"]},
        "a.csv, line 3: byte 0xf6 is not UTF-8",
    ),
    "not UTF-8, json": (
        {"a.jsonl": json_lines(PAIRS) + b'{"source": "\xf6"}\n'},
        {"train_file": ["a.jsonl"]},
        "a.jsonl, line 4: byte 0xf6 is not UTF-8",
    ),
    "truncated gz": ({**BOTH, "de.gz": COMPRESSED[:-20]}, {"train_file": ["en", "de.gz"]}, "damaged or cut off"),
    "no gz": ({**BOTH, "de.gz": BOTH["de"]}, {"train_file": ["en", "de.gz"]}, "damaged or cut off"),
    "empty text": ({"en": b"", "de": b""}, {"train_file": ["en", "de"]}, "train: the data is empty"),
    "empty json": ({"a.jsonl": b""}, {"validation_file": ["a.jsonl"]}, "validation: the data is empty"),
    "empty csv": ({"a.csv": b"source,target\n"}, {"train_file": ["a.csv"]}, "train: the data is empty"),
    "only blank": ({"en": text("", " "), "de": text("x", "y")}, {"train_file": ["en", "de"]}, "every row was left out"),
    "bad json": (
        {"a.jsonl": text('{"source": "a",')},
        {"train_file": ["a.jsonl"]},
        "a.jsonl, line 1: this is not JSON",
    ),
    "bad json list": ({"a.json": text("[{},", "{,]")}, {"train_file": ["a.json"]}, "a.json, line 2: this is not JSON"),
    "json of lists": (
        {"a.jsonl": text('["a", "b"]')},
        {"train_file": ["a.jsonl"]},
        "a.jsonl, row 1: must be an object",
    ),
    "bad csv": (
        {"a.csv": text("source,target", "a", "b,c")},
        {"train_file": ["a.csv"]},
        "a.csv, line 2: 1 value, under 2 column names",
    ),
    "open quote": (
        {"a.csv": text("source,target", 'a,"b')},
        {"train_file": ["a.csv"]},
        "a.csv, line 2: unexpected end",
    ),
    "bad parquet": ({"a.parquet": b"PAR"}, {"train_file": ["a.parquet"]}, "a.parquet: cannot be read"),
    "unknown column": (
        {"a.csv": CSV},
        {"train_file": ["a.csv"], "source_column": "src", "target_column": "target"},
        "train: there is no column 'src': name one of source, ignored, target by source_column",
    ),
    "one column named": (
        {"a.csv": CSV},
        {"train_file": ["a.csv"], "source_column": "source"},
        "the column of the target is not given",
    ),
    "no column named": (
        {"a.tsv": TSV},
        {"train_file": ["a.tsv"]},
        "the column of the source is not given: name one of en, de",
    ),
    "unknown language": (
        {"a.jsonl": json_lines(TRANSLATIONS)},
        {"train_file": ["a.jsonl"], "source_lang": "fr", "target_lang": "de"},
        "no column 'translation.fr': name one of translation.en, translation.de",
    ),
    "null": (
        {"a.jsonl": json_lines([*PAIRS, {"source": "a", "target": None}])},
        {"train_file": ["a.jsonl"]},
        "train, row 4: the target is None, and must be text",
    ),
    "missing value": (
        {"a.jsonl": json_lines([*PAIRS, {"source": "a"}])},
        {"train_file": ["a.jsonl"]},
        "train, row 4: the target is None",
    ),
    "number among text": (
        {"a.jsonl": json_lines([*PAIRS, {"source": "a", "target": 5}])},
        {"train_file": ["a.jsonl"]},
        "train, row 4: the target is 5, and must be text",
    ),
    "numbers": (
        {"a.jsonl": json_lines([{"source": 1, "target": "b"}])},
        {"test_file": ["a.jsonl"]},
        "test, row 1: the source is 1, and must be text",
    ),
    "half a character": (
        {"a.jsonl": text(r'{"source": "\ud800", "target": "b"}')},
        {"train_file": ["a.jsonl"]},
        "train, row 1: the source has half of a surrogate pair, '\\ud800', at character 1",
    ),
    "number in a translation": (
        {"a.jsonl": json_lines([*TRANSLATIONS, {"translation": {"en": "a", "de": 5}}])},
        {"train_file": ["a.jsonl"], **ENGLISH_GERMAN},
        "train, row 4: the target is 5, and must be text",
    ),
    "no samples": (
        BOTH,
        {"train_file": ["en", "de"], "max_train_samples": 0},
        "max_train_samples=0 must be at least 1",
    ),
    "ratio below 1": (
        BOTH,
        {"train_file": ["en", "de"], "max_length_ratio": 0.5},
        "max_length_ratio=0.5 must be at least 1",
    ),
    "unknown dataset": ({}, {"dataset": "./nowhere"}, "nowhere: no such folder"),
    "unknown locale": ({}, {"dataset": "phrasebook:en-xx"}, "phrasebook:en-xx: "),
}


@pytest.mark.parametrize("mistake", BAD_DATA)
def test_a_mistake_is_named(mistake, monkeypatch):
    files, arguments, message = BAD_DATA[mistake]
    monkeypatch.delenv("UNSET_DIR", raising=False)
    write(files)
    with pytest.raises(DataError) as caught:
        load_pairs(DataArguments(**arguments))
    assert message in str(caught.value)


def test_a_dataset_without_standard_splits_is_refused_with_a_list_of_those_it_has(folder):
    write(
        {"README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: dev, path: a.jsonl}\n---\n"}
    )
    write({"a.jsonl": json_lines(PAIRS)})
    with pytest.raises(DataError, match="no split is named train, validation, test: there are dev"):
        load_pairs(DataArguments(dataset=str(folder)))


def test_empty_sides_leave_training_and_stay_in_evaluation(caplog):
    warn_once.cache_clear()
    files = write({"en": text("a", "", "c", " \t"), "de": text("x", "y", "\u3000", "z")})
    pairs = load_pairs(DataArguments(train_file=files, test_file=files))
    assert rows_of(pairs["train"]) == [("a", "x")]
    assert rows_of(pairs["test"]) == [("a", "x"), ("", "y"), ("c", "\u3000"), (" \t", "z")]
    assert caplog.messages == [
        "en, line 2: blank, where de has text (2 such lines)",
        "de, line 3: blank, where en has text (1 such lines)",
        "test: 3 of 4 rows with an empty side, kept (first: row 2)",
        "train: kept 1 of 4 rows\n  left out  first row  because of\n         3          2  an empty side",
    ]


def test_filters_leave_out_training_rows_alone_and_are_reported_once_for_text_and_tokens(tokenizer, caplog):
    sources = ["a house", "a house", "", "same", "a dog", "seven letters, seven"]
    targets = ["ein Haus", "ein Haus", "x", "same", "ein gro\u00c3\u0178er Hund", "7"]
    files = write({"en": text(*sources), "de": text(*targets)})
    data = DataArguments(
        train_file=files, validation_file=files, drop_duplicates=True, drop_identical=True, drop_bad_encoding=True,
        max_length_ratio=2, bpe_dropout=0.1,
    )  # fmt: skip
    report = FilterReport()
    pairs = load_pairs(data, report)
    assert rows_of(pairs["train"]) == [(sources[row], targets[row]) for row in (0, 5)]
    assert rows_of(pairs["validation"]) == list(zip(sources, targets, strict=True))
    rows = tokenize_pairs(pairs["train"], tokenizer, data, "train", report)
    assert rows["input_ids"][:] == [tokenizer(sources[0])["input_ids"]]
    assert [sum(words) for words in rows["source_words"]] == [len(ids) for ids in rows["input_ids"]]
    validation = tokenize_pairs(pairs["validation"], tokenizer, data, "validation", report)
    assert (len(validation), validation.column_names) == (6, ["input_ids", "labels"])
    (table,) = (message for message in caplog.messages if message.startswith("train"))
    assert [line.split()[:3] for line in table.splitlines()] == [
        ["train:", "kept", "1"], ["left", "out", "first"],
        ["1", "2", "a"], ["1", "3", "an"], ["1", "4", "identical"], ["1", "5", "a"], ["1", "6", "a"],
    ]  # fmt: skip


def test_the_first_rows_can_be_asked_for():
    files = write(BOTH)
    data = DataArguments(train_file=files, test_file=files, max_train_samples=2, max_eval_samples=100)
    assert {split: len(rows) for split, rows in load_pairs(data).items()} == {"train": 2, "test": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SOURCES + TARGETS, 260)


def test_ids_are_those_of_the_tokenizer_with_eos(tokenizer):
    rows = tokenize_pairs(Dataset.from_list(PAIRS), tokenizer, DataArguments(), "train")
    assert rows.column_names == ["input_ids", "labels"]
    for row, pair in zip(rows, PAIRS, strict=True):
        assert row["input_ids"] == tokenizer(pair["source"])["input_ids"]
        assert row["labels"] == tokenizer(pair["target"])["input_ids"]
        assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id


# Every character is a token here, and with its space and its eos a text has two more.
@pytest.mark.parametrize(("field", "limit"), [("max_source_length", 5), ("max_target_length", 12)])
def test_overlong_rows_leave_training_and_stay_in_evaluation(tokenizer, caplog, field, limit):
    data = DataArguments(**{field: limit})
    pairs = Dataset.from_list(PAIRS)
    assert len(tokenize_pairs(pairs, tokenizer, data, "train")) == 2
    assert len(tokenize_pairs(pairs, tokenizer, data, "validation")) == 3
    assert caplog.messages[0] == (
        "train: kept 2 of 3 rows\n  left out  first row  because of\n"
        f"         1          1  more than {field}={limit} tokens"
    )
    assert "validation: 1 of 3 rows" in caplog.messages[1]
    assert "kept" in caplog.messages[1]


def test_no_row_short_enough_is_an_error(tokenizer):
    with pytest.raises(DataError, match="every row was left out, 3 for more than max_source_length=1 tokens"):
        tokenize_pairs(Dataset.from_list(PAIRS), tokenizer, DataArguments(max_source_length=1), "train")


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(DataError, match="must append its eos token '</s>' to every text"):
        tokenize_pairs(Dataset.from_list(PAIRS), bare, DataArguments(), "train")


def test_training_texts_are_both_sides():
    assert sorted(training_texts(Dataset.from_list(PAIRS))) == sorted(SOURCES + TARGETS)


def test_languages_are_told_by_the_arguments():
    assert DataArguments(source_lang="en", target_lang="fr").direction == ("en", "fr")
    assert DataArguments(dataset="some/set").direction == (None, None)


@pytest.mark.skipif("MULTI30K_DIR" not in os.environ, reason="MULTI30K_DIR does not name the folder of Multi30k")
def test_multi30k(caplog):
    names = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
    files = {
        f"{split}_file": [f"{name}.lc.norm.tok.{language}.gz" for language in ("en", "de")]
        for split, name in names.items()
    }
    with caplog.at_level(logging.WARNING):
        pairs = load_pairs(DataArguments(data_dir="$MULTI30K_DIR", **files))
    assert {split: len(rows) for split, rows in pairs.items()} == {"train": 29000, "validation": 1014, "test": 1000}
    assert caplog.messages == []

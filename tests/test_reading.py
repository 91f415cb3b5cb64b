"""Files as people publish them: the same lines and rows in training, in a stream, in evaluation and in translation."""

import bz2
import gzip
import json
import lzma
import os
import re
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from sacrebleu.dataset.wmt_xml import WMTXMLDataset

from vanilla_transformer.training.data.pairs import load_pairs
from vanilla_transformer.training.data.reading import lines as reading
from vanilla_transformer.training.data.reading.formats import read_sources
from vanilla_transformer.training.data.reading.lines import read_lines, read_parallel_lines
from vanilla_transformer.training.data.streaming import open_stream
from vanilla_transformer.training.errors import DataError
from vanilla_transformer.training.settings.arguments import DataArguments


AWKWARD = os.environ.get("AWKWARD_DIR")
# Characters at which str.splitlines and some readers break a line.
INNER_ENDS = ["\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
MARK = "\ufeff"


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reading.warn_once.cache_clear()


def write(files: dict[str, str | bytes]) -> list[str]:
    for name, content in files.items():
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return list(files)


def everywhere(files: list[str], **columns: str) -> list[tuple[str, str]]:
    """The pairs of files, which all ways of reading agree on."""
    loaded = load_pairs(DataArguments(test_file=files, **columns))["test"]
    pairs = list(zip(loaded["source"], loaded["target"], strict=True))
    streamed = open_stream(DataArguments(train_file=files, streaming=True, **columns))
    assert [(row["source"], row["target"]) for row in streamed] == pairs
    return pairs


class TestLines:
    @pytest.mark.parametrize("suffix", COMPRESSORS)
    @pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
    def test_only_a_line_feed_ends_a_line(self, suffix, end):
        texts = [f"a{inner}b {inner} c" for inner in INNER_ENDS] + ["", " d "]
        names = [f"source{suffix}", f"target{suffix}"]
        write({name: COMPRESSORS[suffix]((end.join(texts) + end).encode()) for name in names})
        assert list(read_lines(names[0])) == texts
        assert everywhere(names) == list(zip(texts, texts, strict=True))
        assert list(read_sources(names[0], None)) == texts

    @pytest.mark.parametrize("suffix", list(COMPRESSORS)[1:])
    def test_a_file_of_several_members_is_read_to_its_end(self, suffix):
        compress = COMPRESSORS[suffix]
        write({f"a{suffix}": compress(b"one\ntw") + compress(b"o\nthree")})
        assert list(read_lines(f"a{suffix}")) == ["one", "two", "three"]

    @pytest.mark.parametrize("suffix", list(COMPRESSORS)[1:])
    def test_a_damaged_file_is_refused(self, suffix):
        whole = COMPRESSORS[suffix](os.urandom(100_000).hex().encode())
        for content in (whole[:-9], b"no such format\n"):
            write({f"a{suffix}": content})
            with pytest.raises(DataError, match=rf"^a\{suffix}: the \w+ file is damaged or cut off"):
                list(read_lines(f"a{suffix}"))

    def test_a_byte_order_mark_is_dropped_at_the_start_and_counted_elsewhere(self, caplog):
        write({"a": f"{MARK}one\n{MARK}two\nth{MARK}r{MARK}ee\n", "b": f"{MARK}x\ny\nz\n"})
        for _ in range(2):
            assert list(read_lines("a")) == ["one", f"{MARK}two", f"th{MARK}r{MARK}ee"]
        assert everywhere(["a", "b"])[0] == ("one", "x")
        assert caplog.messages == ["a, line 2: a byte order mark (U+FEFF) inside the text, kept (3 in the file)"]

    def test_blank_lines_of_one_side_are_counted_and_named(self, caplog):
        write({"a": "1\n\n3\n \n5\n\n", "b": "1\n2\n\n4\n5\n\n"})
        assert len(list(read_parallel_lines("a", "b"))) == 6
        assert caplog.messages == [
            "a, line 2: blank, where b has text (2 such lines)",
            "b, line 3: blank, where a has text (1 such lines)",
        ]

    @pytest.mark.parametrize(("a", "b"), [(3, 5), (5, 3), (0, 1)])
    def test_other_counts_of_lines_are_refused_with_both(self, a, b):
        write({"a": "x\n" * a, "b": "x\n" * b})
        for read in (
            lambda: list(read_parallel_lines("a", "b")),
            lambda: load_pairs(DataArguments(train_file=["a", "b"])),
            lambda: list(open_stream(DataArguments(train_file=["a", "b"], streaming=True))),
        ):
            with pytest.raises(DataError, match=f"a has {a} lines and b has {b}"):
                read()


PAIRS = [("a", "x"), ("b\u2028b", "y\x85y"), ('"c"', "z\rz")]
NESTED = {
    "translation": lambda a, b: {"id": 1, "translation": {"en": a, "de": b}},
    "nested": lambda a, b: {"data": {"id": 1, "translation": {"en": a, "de": b}}},
    "deep": lambda a, b: {"data": {"row": {"translation": {"fr": "", "en": a, "de": b}}}},
}


class TestTables:
    @pytest.mark.parametrize("suffix", COMPRESSORS)
    @pytest.mark.parametrize("header", [True, False])
    def test_tsv_has_one_row_a_line(self, suffix, header):
        rows = [f"{a}\t{b}\t9\r\n" for a, b in PAIRS]
        content = ("en\tde\tn\r\n" if header else "") + "\r\n".join(rows)
        (name,) = write({f"a.tsv{suffix}": COMPRESSORS[suffix](content.encode())})
        columns = ("en", "de") if header else ("1", "2")
        assert everywhere([name], source_column=columns[0], target_column=columns[1]) == PAIRS
        assert list(read_sources(name, columns[0])) == [a for a, _ in PAIRS]

    def test_csv_without_a_header_has_columns_by_number(self):
        write({"a.csv": '1,"a, b",x\n2,c,"y\nz"\n'})
        assert everywhere(["a.csv"], source_column="2", target_column="3") == [("a, b", "x"), ("c", "y\nz")]

    def test_a_row_of_another_length_is_named(self):
        write({"a.tsv": "a\tb\n\nc\td\te\n"})
        with pytest.raises(DataError, match=r"a\.tsv, line 3: 3 values, but the first line has 2"):
            load_pairs(DataArguments(train_file=["a.tsv"], source_column="1", target_column="2"))
        with pytest.raises(DataError, match=r"a\.tsv, line 3: 3 values, under 2 column names"):
            load_pairs(DataArguments(train_file=["a.tsv"], source_column="a", target_column="b"))
        write({"b.tsv": "a\tb\n"})
        with pytest.raises(DataError, match="there is no column '3': name one of 1, 2"):
            load_pairs(DataArguments(train_file=["b.tsv"], source_column="1", target_column="3"))

    @pytest.mark.parametrize("nest", NESTED.values(), ids=NESTED)
    @pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "dataset"])
    def test_a_translation_is_found_in_any_nesting(self, nest, kind):
        rows = [nest(*pair) for pair in PAIRS]
        languages = {"source_lang": "en", "target_lang": "de"}
        if kind == "parquet":
            Dataset.from_list(rows).to_parquet("a.parquet")
        elif kind == "dataset":
            Path("set").mkdir()
            write({"set/test.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
            pairs = load_pairs(DataArguments(dataset="./set", **languages))["test"]
            assert list(zip(pairs["source"], pairs["target"], strict=True)) == PAIRS
            return
        else:
            text = json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
            write({f"a.{kind}": text})
        if kind == "json":
            pairs = load_pairs(DataArguments(test_file=["a.json"], **languages))["test"]
            assert list(zip(pairs["source"], pairs["target"], strict=True)) == PAIRS
        else:
            assert everywhere([f"a.{kind}"], **languages) == PAIRS

    def test_translate_names_the_columns_it_can_take(self):
        write({"a.jsonl": json.dumps(NESTED["nested"]("a", "b")) + "\n"})
        assert list(read_sources("a.jsonl", "data.translation.en")) == ["a"]
        with pytest.raises(DataError, match=r"a\.jsonl, line 1: there is no column 'en': name one of data\.id, data\."):
            list(read_sources("a.jsonl", "en"))


def xml(body: str) -> str:
    return f'<?xml version="1.0" encoding="utf-8"?>\n{body}'


TMX = xml(
    """<tmx version="1.4"><header srclang="en"/><body>
    <tu><tuv xml:lang="en"><seg>Hello <ph>code</ph><hi>you</hi> &amp; me</seg></tuv>
        <tuv xml:lang="de"><seg>Hallo</seg></tuv></tu>
    <tu><tuv xml:lang="de"><seg>B\u2028b</seg></tuv><tuv xml:lang="fr"><seg>c</seg></tuv>
        <tuv xml:lang="en"><seg>b</seg></tuv></tu>
    <tu><tuv xml:lang="fr"><seg>nur</seg></tuv></tu></body></tmx>"""
)
XLIFF = xml(
    """<xliff version="1.1" xmlns="urn:oasis:names:tc:xliff:document:1.1"><file source-language="en"
    original="x" datatype="plaintext"><body><trans-unit id="1">
    <source>This <g id="0">is</g> a<x id="1"/><ph id="2">code</ph> test</source><target>Ein Test</target></trans-unit>
    <trans-unit id="2"><source>one</source></trans-unit></body></file></xliff>"""
)
PO = """msgid ""
msgstr ""
"Content-Type: text/plain; charset=CHARSET\\n"

msgid "Save \\"as\\"..."
msgstr "Speichern "
"unter..."

#, fuzzy
msgid "Close"
msgstr "Öffnen"

msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei für dich"
msgstr[1] "%d Dateien"

msgid "Exit"
msgstr ""

#~ msgid "old"
#~ msgstr "alt"
"""
PO_PAIRS = [('Save "as"...', "Speichern unter..."), ("Close", ""), ("%d file", "%d Datei für dich"), ("Exit", "")]
WMT = xml(
    """<dataset id="newstest"><doc origlang="en" id="a"><src lang="en"><p><seg id="1">One.</seg><seg id="2">Two
    lines.</seg></p></src>
    <ref lang="de" translator="A"><p><seg id="1">Eins.</seg><seg id="2">Zwei Zeilen.</seg></p></ref>
    <ref lang="de" translator="B"><p><seg id="1">1.</seg><seg id="2">2.</seg></p></ref>
    <hyp system="x" lang="de"><p><seg id="1">hm</seg><seg id="2">hm</seg></p></hyp></doc>
    <doc origlang="en" id="b" testsuite="t"><src lang="en"><p><seg id="1">No.</seg></p></src></doc></dataset>"""
)


class TestDocuments:
    @pytest.mark.parametrize("suffix", COMPRESSORS)
    def test_a_translation_memory_has_a_column_for_each_language(self, suffix):
        (name,) = write({f"a.tmx{suffix}": COMPRESSORS[suffix](TMX.encode())})
        english, german = ["Hello you & me", "b", ""], ["Hallo", "B\u2028b", ""]
        for source, target, pairs in (
            ("en", "de", list(zip(english, german, strict=True))),
            ("de", "en", list(zip(german, english, strict=True))),
        ):
            assert everywhere([name], source_lang=source, target_lang=target) == pairs
        assert list(read_sources(name, "fr")) == ["", "c", "nur"]
        with pytest.raises(DataError, match=r"there is no column 'es': name one of en, de, fr"):
            load_pairs(DataArguments(train_file=[name], source_lang="es", target_lang="en"))

    def test_xliff_has_its_sources_and_those_targets_that_exist(self):
        write({"a.xlf": XLIFF})
        assert everywhere(["a.xlf"]) == [("This is a test", "Ein Test"), ("one", "")]
        assert list(read_sources("a.xlf", None)) == ["This is a test", "one"]

    @pytest.mark.parametrize(
        ("charset", "end"), [("UTF-8", "\n"), ("ISO-8859-1", "\r\n"), ("cp850", "\r\r\n"), ("CHARSET", "\n")]
    )
    def test_po_has_the_charset_of_its_header(self, charset, end, caplog):
        content = PO.replace("CHARSET", charset).replace("\n", end)
        write({"a.po": content.encode("utf-8" if charset == "CHARSET" else charset)})
        assert everywhere(["a.po"]) == PO_PAIRS
        assert list(read_sources("a.po", None)) == [source for source, _ in PO_PAIRS]
        expected = {"ISO-8859-1", "cp850"} & {charset}
        assert [message for message in caplog.messages if message.startswith("a.po")] == [
            f"a.po: read as {name}, which its header names" for name in expected
        ]

    def test_the_segments_of_a_wmt_test_set_are_those_of_sacrebleu(self):
        write({"a.xml": WMT})
        known = WMTXMLDataset._unwrap_wmt21_or_later("a.xml")
        sources, german, other = ([" ".join(text.split()) for text in known[key]] for key in ("src", "ref:A", "ref:B"))
        assert everywhere(["a.xml"]) == list(zip(sources, german, strict=True))
        columns = {"source_column": "source", "target_column": "ref:B"}
        assert everywhere(["a.xml"], **columns) == list(zip(sources, other, strict=True))
        assert list(read_sources("a.xml", None)) == sources

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.po", PO.replace("CHARSET", "UTF-8").encode("latin-1"), "a.po, line 11: byte 0xd6 is not UTF-8"),
            ("a.po", PO.replace("CHARSET", "klingon"), "a.po: its header names the unknown charset klingon"),
            ("a.po", 'msgid "a\nmsgstr "b"\n', "a.po: this is not a po file (end-of-line within string on line 1"),
            ("a.tmx", "<tmx><body>\n<tu>\n</body></tmx>", "line 3"),
            ("a.tmx", xml("<other/>"), "a.tmx: this is not a tmx file (it has another root element)"),
            ("a.xlf", xml("<other/>"), "a.xlf: this is not a xliff file (it has another root element)"),
            ("a.xml", "<dataset>\n<doc>\n</dataset>", "line 3"),
            ("a.xml", xml("<other/>"), "a.xml: this XML is not a test set of WMT: it has no element <doc>"),
            (
                "a.xlf",
                XLIFF.replace("<target>Ein Test</target>", ""),
                "a.xlf, line 3: not translated, as all 2 units of the file",
            ),
            ("a.tmx.gz", b"<tmx>", "a.tmx.gz: the gzip file is damaged"),
        ],
    )
    def test_a_mistake_is_named(self, name, content, message):
        write({name: content})
        with pytest.raises(DataError, match=re.escape(message)):
            load_pairs(DataArguments(train_file=[name]))

    def test_a_script_called_translate_hides_nothing(self, tmp_path, monkeypatch):
        write({"translate.py": "raise RuntimeError", "a.po": PO})
        for name in [name for name in sys.modules if name.split(".")[0] == "translate"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(str(tmp_path))
        assert list(read_sources("a.po", None)) == [source for source, _ in PO_PAIRS]

    def test_a_package_that_is_missing_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "translate.storage.po", None)
        write({"a.po": PO})
        with pytest.raises(DataError, match=r"a\.po: to read it, install translate-toolkit"):
            load_pairs(DataArguments(train_file=["a.po"]))


@pytest.mark.skipif(not AWKWARD, reason="set AWKWARD_DIR to a folder of files as people publish them")
class TestRealFiles:
    LANGUAGES = {"source_lang": "fr", "target_lang": "fon"}
    NAMES = {"source_column": "english", "target_column": "yoruba"}

    @pytest.mark.parametrize(
        ("files", "columns", "count"),
        [
            (["newstest2009.de", "newstest2009.cs"], {}, 2525),
            (["fiskmo_testset.fi", "fiskmo_testset.sv"], {}, 523),
            (["europeana2021.sv", "europeana2021.nb"], {}, 546),
            (["nahuatl.es", "nahuatl.nah"], {}, 16145),
            (["dict.quy", "dict.es"], {}, 9643),
            (["fr-fon.json"], LANGUAGES, 1227),
            (["eng-yor.doc.tsv"], NAMES, 1544),
            (["f43.tgif.fr.po"], {}, 321),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_each_has_its_lines_everywhere(self, files, columns, count):
        paths = [os.path.join(AWKWARD, name) for name in files]
        assert len(everywhere(paths, **columns)) == count
        column = "translation.fr" if columns is self.LANGUAGES else columns.get("source_column")
        assert [len(list(read_sources(path, column))) for path in paths] == [count] * len(paths)

    def test_one_without_translations_is_refused_and_can_be_translated(self):
        path = os.path.join(AWKWARD, "test_2.xlf")
        with pytest.raises(DataError, match=r"test_2\.xlf, line 5: not translated, as all 10 units of the file"):
            load_pairs(DataArguments(test_file=[path]))
        assert len(list(read_sources(path, None))) == 10

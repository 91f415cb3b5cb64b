"""The rows that two systems translate most differently, as text and as files."""

import sacrebleu

from vanilla_transformer.training import differences
from vanilla_transformer.training.differences import find_differences, format_differences, write_differences


SOURCES = ["one", "two", "three", "four\t4", "five"]
REFERENCES = ["eins eins", "zwei zwei", "drei drei", "vier | vier", "fünf fünf"]
OURS = ["eins eins", "zwei zwo", "drei drei", "vierzig", "funf funf"]
THEIRS = ["eins eins", "zwei zwei", "dry dry", "vier | vier", "funf fünf"]


def test_the_largest_difference_comes_first_and_equal_translations_are_left_out():
    found = find_differences(SOURCES, REFERENCES, OURS, THEIRS)
    chrf = sacrebleu.CHRF()
    expected = {
        row: chrf.sentence_score(ours, [reference]).score - chrf.sentence_score(theirs, [reference]).score
        for row, (ours, theirs, reference) in enumerate(zip(OURS, THEIRS, REFERENCES, strict=True), 1)
        if row != 1
    }
    assert {difference.row: difference.gain for difference in found} == expected
    assert [difference.row for difference in found] == sorted(expected, key=lambda row: -abs(expected[row]))
    assert [difference.row for difference in found if difference.gain > 0] == [3]


def test_of_several_references_each_that_is_there_counts():
    (found,) = find_differences(["a"], [["b", None, "c c"]], ["c c"], ["d"])
    assert (found.our_chrf, found.their_chrf, found.references) == (100, 0, ["b", "c c"])


def test_the_printed_rows_are_the_first_of_each_system(monkeypatch):
    monkeypatch.setattr(differences, "PRINTED", 1)
    text = format_differences("ours", "theirs", find_differences(SOURCES, REFERENCES, OURS, THEIRS))
    assert text.splitlines()[0] == "4 rows with different translations"
    assert "row 3: ours is better than theirs by " in text
    assert "row 4: theirs is better than ours by " in text
    assert text.count("is better") == 2
    assert "\n  source     three\n  reference  drei drei\n  ours       drei drei\n  theirs     dry dry\n" in text
    assert format_differences("a", "b", []) == "0 rows with different translations"


def test_a_table_has_one_line_for_each_row_whatever_the_texts_hold(tmp_path):
    found = find_differences(SOURCES, REFERENCES, OURS, THEIRS)
    write_differences(tmp_path / "rows.tsv", "ours", {"theirs": found, "b": found[:1]})
    header, *lines = [line.split("\t") for line in (tmp_path / "rows.tsv").read_text(encoding="utf-8").splitlines()]
    assert header[:5] == ["other", "row", "gain in chrF", "chrF", "other's chrF"]
    assert header[5:] == ["source", "references", "ours", "other's translation"]
    assert [line[:2] for line in lines] == [*(["theirs", str(each.row)] for each in found), ["b", str(found[0].row)]]
    assert ["four 4", "vier | vier", "vierzig", "vier | vier"] in [line[5:] for line in lines]
    assert {len(line) for line in lines} == {9}


def test_markdown_holds_the_largest_differences(tmp_path, monkeypatch):
    monkeypatch.setattr(differences, "IN_MARKDOWN", 2)
    found = find_differences(SOURCES, REFERENCES, OURS, THEIRS)
    write_differences(tmp_path / "rows.md", "ours", {"theirs": found})
    header, rule, *lines = (tmp_path / "rows.md").read_text(encoding="utf-8").splitlines()
    assert header.startswith("| other | row | gain in chrF |")
    assert rule == "|" + " --- |" * 9
    assert len(lines) == 2
    assert any(line.endswith(r"| four 4 | vier \| vier | vierzig | vier \| vier |") for line in lines)

"""Intervals and paired tests beside sacrebleu's command line, and where that would call equal systems different."""

import json
import logging
import re
import subprocess
import sys
from random import Random

import pytest
import sacrebleu.significance

from vanilla_transformer.training import significance
from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.metric_names import DEFAULT_METRICS, METRICS
from vanilla_transformer.training.metrics import score_texts
from vanilla_transformer.training.significance import compare, confidence_intervals, format_comparison, refuse_too_many


def some_systems(rows: int = 60) -> tuple[list[str], list[str], list[str]]:
    """References, and two systems of which the second is worse."""
    draw, words = Random(1), ["der", "die", "das", "hund", "katze", "läuft", "schläft", "auf", "im", "park", "baum"]
    references = [" ".join(draw.choices(words, k=draw.randrange(4, 12))) for _ in range(rows)]

    def spoilt(rate: float) -> list[str]:
        return [
            " ".join(draw.choice(words) if draw.random() < rate else w for w in text.split()) for text in references
        ]

    return references, spoilt(0.2), spoilt(0.3)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, list[list[float]]]:
    """
    What sacrebleu's command line says by each test: for each system, the numbers of BLEU, then those of chrF. (Its JSON
    does not write the numbers of numpy 2, so they are read from its table.)
    """
    folder = tmp_path_factory.mktemp("systems")
    for name, texts in zip(("reference", "ours", "theirs"), some_systems(), strict=True):
        (folder / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "reference", "-i", "ours", "theirs", "-w", "4", "-m", "bleu", "chrf"]
    found = {}
    for test in ("bs", "ar"):
        options = [*command, f"--paired-{test}", "--format", "latex"]
        output = subprocess.run(options, cwd=folder, capture_output=True, text=True, check=True).stdout
        rows = [line for line in output.splitlines() if re.match(r" *(Baseline: ours|theirs) &", line)]
        found[test] = [[float(number) for number in re.findall(r"\d+\.\d+", row)] for row in rows]
    return found


def test_p_values_and_intervals_are_those_of_sacrebleus_command_line(told):
    references, ours, theirs = some_systems()
    names = ["bleu", "chrf"]
    confidence = confidence_intervals(ours, references, "13a", names)
    assert (confidence["level"], confidence["resamples"]) == (95, 1000)
    (found,) = compare(ours, {"theirs": theirs}, references, "13a", names).values()
    json.dumps([confidence, found])
    scores = score_texts(ours, references, "13a", names)
    means = {"ours": confidence["intervals"], "theirs": found["intervals"]}
    assert told["bs"] == [
        pytest.approx([x for n in names for x in (scores[n], *means["ours"][n].values())], abs=1e-4),
        pytest.approx(
            [
                x
                for n in names
                for x in (found["scores"][n], *means["theirs"][n].values(), found["p_values"][n]["bootstrap"])
            ],
            abs=1e-4,
        ),
    ]
    assert told["ar"] == [
        pytest.approx([scores[n] for n in names], abs=1e-4),
        pytest.approx(
            [x for n in names for x in (found["scores"][n], found["p_values"][n]["randomisation"])], abs=1e-4
        ),
    ]


@pytest.mark.parametrize("names", [DEFAULT_METRICS, list(METRICS)], ids=["default", "all"])
def test_the_scores_are_those_without_a_test(names):
    references, ours, theirs = some_systems(20)
    several = [[reference, None if row % 3 else ours[row]] for row, reference in enumerate(references)]
    found = compare(ours, {"theirs": theirs, "ours": ours}, several, "none", names)
    for name, texts in (("theirs", theirs), ("ours", ours)):
        scores = score_texts(texts, several, "none", names)
        assert found[name]["scores"] == {metric: scores[metric] for metric in names}
        assert list(found[name]["p_values"]) == list(names)


def test_equal_systems_do_not_differ():
    references, ours, _ = some_systems()
    (found,) = compare(ours, {"same": list(ours)}, references, "13a", list(METRICS)).values()
    assert {p for p_values in found["p_values"].values() for p in p_values.values()} == {1.0}


def test_systems_that_differ_in_one_sentence_do_not_differ_significantly():
    """Half of all exchanges leave that sentence, half exchange it: the difference is as large each time."""
    references, ours, _ = some_systems()
    wrong = next(row for row, pair in enumerate(zip(ours, references, strict=True)) if len(set(pair)) == 2)
    theirs = [references[row] if row == wrong else text for row, text in enumerate(ours)]
    (found,) = compare(ours, {"theirs": theirs}, references, "13a", list(METRICS)).values()
    assert {p_values["randomisation"] for p_values in found["p_values"].values()} == {1.0}


def test_the_p_value_of_exact_matches_is_that_of_the_binomial_distribution():
    """Exchanging rows at random draws from it: 9 rows that only one system has right, 2 that only the other has."""
    references = [str(number) for number in range(40)]
    ours = ["" if number in range(2) else text for number, text in enumerate(references)]
    theirs = ["" if number in range(20, 29) else text for number, text in enumerate(references)]
    (found,) = compare(ours, {"theirs": theirs}, references, "13a", ["exact_match"]).values()
    exact = 2 * sum(ways / 2**11 for ways in (1, 11, 55))  # 0, 1 or 2 of 11
    assert found["p_values"]["exact_match"]["randomisation"] == pytest.approx(exact, abs=0.01)


def test_sacrebleus_own_counting_is_back_afterwards():
    before = sacrebleu.significance._compute_p_value
    references, ours, theirs = some_systems(5)
    compare(ours, {"theirs": theirs}, references, "13a", ["bleu"])
    assert sacrebleu.significance._compute_p_value is before


def test_more_rows_than_fit_into_memory_have_no_intervals_and_no_tests(monkeypatch, caplog):
    monkeypatch.setattr(significance, "MOST_ROWS", 4)
    references, ours, _ = some_systems(5)
    with caplog.at_level(logging.WARNING):
        assert confidence_intervals(ours, references, "13a", ["bleu"]) is None
    assert "no confidence intervals: 5 rows" in caplog.text
    refuse_too_many(4)
    with pytest.raises(UserError, match="compare: the test set has 5 rows, but significance tests take at most 4"):
        refuse_too_many(5)


def test_the_table_shows_both_scores_and_both_p_values():
    references, ours, theirs = some_systems(20)
    told = (references, "13a", ["bleu", "g2p_wer"])
    (found,) = compare(ours, {"theirs": theirs}, *told).values()
    table = format_comparison(
        "a/long/name", "theirs", 20, score_texts(ours, *told), confidence_intervals(ours, *told), found
    )
    title, header, bleu, wer = (line.split() for line in table.splitlines())
    assert title == ["a/long/name", "and", "theirs,", "20", "rows"]
    assert header[:3] == ["a/long/name", "theirs", "difference"]
    score, other, p_values = score_texts(ours, *told)["bleu"], found["scores"]["bleu"], found["p_values"]["bleu"]
    assert [bleu[0], bleu[1], bleu[4]] == ["BLEU", f"{score:.2f}", f"{other:.2f}"]
    assert bleu[7:] == [f"{score - other:+.2f}", f"{p_values['bootstrap']:.4f}", f"{p_values['randomisation']:.4f}"]
    assert wer[:2] == ["G2P", "WER"]
    assert len({len(line) for line in table.splitlines()[1:]}) == 1

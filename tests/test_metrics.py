"""Compares scores with sacrebleu's command line and with hand computation."""

import json
import os
import subprocess
import sys

import pytest

from vanilla_transformer.training.metrics import TranslationMetrics


PREDICTIONS = ["the cat sat on the mat .", "hello there , world", "3 days ago"]
REFERENCES = ["the cat is on the mat .", "hello there world", "3 days ago"]


@pytest.mark.parametrize("tokenize", ["13a", "none", "char"])
def test_scores_and_signatures_are_those_of_sacrebleus_command_line(tokenize, tmp_path):
    (tmp_path / "hypothesis").write_text("\n".join(PREDICTIONS) + "\n")
    (tmp_path / "reference").write_text("\n".join(REFERENCES) + "\n")
    command = [
        sys.executable,
        "-m",
        "sacrebleu",
        "reference",
        "-i",
        "hypothesis",
        "-w",
        "6",
        "-m",
        "bleu",
        "chrf",
        "ter",
    ]
    output = subprocess.run(
        [*command, "--tokenize", tokenize, "--format", "json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    scores = TranslationMetrics().compute(predictions=PREDICTIONS, references=REFERENCES, tokenize=tokenize)
    for entry in json.loads(output.stdout):
        name = {"BLEU": "bleu", "chrF2": "chrf", "TER": "ter"}[entry["name"]]
        assert scores[name] == pytest.approx(entry["score"], abs=1e-5)
        assert scores[f"{name}_signature"] == entry["signature"]


def test_exact_match_counts_equal_strings():
    scores = TranslationMetrics().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert scores["exact_match"] == pytest.approx(100 / 3)
    assert TranslationMetrics().compute(predictions=REFERENCES, references=REFERENCES)["exact_match"] == 100


def test_a_perfect_translation_has_perfect_scores():
    scores = TranslationMetrics().compute(predictions=REFERENCES, references=REFERENCES)
    assert (scores["bleu"], scores["chrf"], scores["ter"]) == pytest.approx((100, 100, 0))


def test_no_folder_is_needed():
    """`HF_HOME` is on a read-only file system. An error would come after all sentences are translated."""
    code = (
        "from vanilla_transformer.training.metrics import TranslationMetrics\n"
        "metrics = TranslationMetrics()\n"
        "for _ in range(2):\n"
        "    print(metrics.compute(predictions=['the cat sat'], references=['the cat sat'])['exact_match'])"
    )
    # Nobody can make a folder there, root included.
    environment = {**os.environ, "HF_HOME": "/proc/huggingface", "XDG_CACHE_HOME": "/proc/cache"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "100.0\n100.0\n", done.stderr

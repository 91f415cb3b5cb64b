"""vanilla-transformer tokenizer, run as its users run it."""

import pytest
from processes import run_command
from transformers import AutoTokenizer

from vanilla_transformer.training.program import run_program
from vanilla_transformer_commands import tokenizer


PHRASEBOOK = ["--dataset", "phrasebook:en-de", "--phrasebook_size", "500", "--vocab_size", "400"]


def test_it_saves_a_tokenizer_once(tmp_path):
    first = run_command("tokenizer", *PHRASEBOOK, "--output_dir", tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"400 subwords from 500 pairs, saved in {tmp_path}\n")
    learned = AutoTokenizer.from_pretrained(tmp_path)
    assert len(learned) == 400
    ids = learned("March 7, 2023")["input_ids"]
    assert learned.decode(ids, skip_special_tokens=True) == "March 7, 2023"

    second = run_command("tokenizer", *PHRASEBOOK, "--output_dir", tmp_path)
    assert second.returncode == 2
    assert second.stderr == (
        f"error: output_dir={tmp_path} already holds a tokenizer: choose another, or delete it first\n"
    )


def test_help_lists_every_field():
    shown = run_command("tokenizer", "--help")
    assert shown.returncode == 0
    for name in ("--output_dir", "--vocab_size", "--tokenizer_model", "--pretokenized", "--train_file", "--data_dir"):
        assert name in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_file", "missing.en", "missing.de"], "error: missing.en: no such file\n"),
        ([*PHRASEBOOK, "--vocab_size", "7"], "error: vocab_size=7 must be at least 260"),
        ([*PHRASEBOOK, "--tokenizer_model", "syllables"], "error: tokenizer_model=syllables is unknown: choose one of"),
        ([*PHRASEBOOK, "--tokenizer", "some/one"], "error: tokenizer=some/one exists"),
    ],
)
def test_a_mistake_ends_it_with_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(tokenizer.main, [*arguments, "--output_dir", str(tmp_path / "new")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()

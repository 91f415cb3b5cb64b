"""training.evaluate: by which settings a saved model is scored."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
import sacrebleu
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.evaluate import main
from vanilla_transformer.training.program import run_program
from vanilla_transformer.training.translator import translate


TEXTS = ["ban dor kis", "lut mén ban", "dos", "kin lur bas dot"]


@pytest.fixture(scope="module")
def run(lively_model, tmp_path_factory) -> Path:
    """The folder of a run that was scored without a tokenizer, with a checkpoint."""
    folder = tmp_path_factory.mktemp("files") / "run"
    tokenizer = train_tokenizer(TEXTS, 290)
    model = lively_model(vocab_size=len(tokenizer), max_position_embeddings=100)
    with torch.no_grad():
        model.lm_head.bias[tokenizer.convert_tokens_to_ids("Ġ")] += 3  # which makes words
    for place in (folder, folder / "checkpoint-7"):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    (folder / "recipe.yaml").write_text("bleu_tokenize: none\nd_model: 16\n")
    return folder


@pytest.fixture
def scored(run, tmp_path, monkeypatch, capsys):
    """Evaluates a model on references that tokenizers cut differently; returns scores, expected ones, and output."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    found = translate(model, tokenizer, TEXTS, max_new_tokens=30)
    references = [f"({text})," for text in found]
    assert not any("\n" in text for text in references)
    Path("data.jsonl").write_text(
        "".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in zip(TEXTS, references, strict=True))
    )
    expected = {
        name: sacrebleu.corpus_bleu(found, [references], tokenize=name, force=True).score
        for name in ("13a", "none", "char")
    }
    assert len(set(expected.values())) == 3

    def score(name, *words):
        main([str(name), "--test_file", "data.jsonl", "--max_new_tokens", "30", "--output_file", "scores.json", *words])
        return json.loads(Path("scores.json").read_text()), expected, capsys.readouterr().out

    return score


def test_a_model_is_scored_as_its_run_was_unless_told_otherwise(run, scored):
    for name in (run, run / "checkpoint-7"):
        scores, expected, said = scored(name)
        assert scores["bleu"] == pytest.approx(expected["none"])
        assert "num_beams=4, max_new_tokens=30, bleu_tokenize=none (as its recipe.yaml says)" in said
    scores, expected, said = scored(run, "--bleu_tokenize", "char", "--num_beams", "2")
    assert scores["bleu"] != pytest.approx(expected["none"])
    assert "|tok:char|" in scores["bleu_signature"]
    assert "num_beams=2, max_new_tokens=30, bleu_tokenize=char (as told)" in said


def test_without_a_recipe_or_a_setting_in_it_the_default_counts(run, scored, tmp_path):
    alone = shutil.copytree(run / "checkpoint-7", tmp_path / "alone")
    scores, expected, said = scored(alone)
    assert scores["bleu"] == pytest.approx(expected["13a"])
    assert "bleu_tokenize=13a (the default)" in said
    (alone / "recipe.yaml").write_text("d_model: 16\n")
    scores, expected, said = scored(alone)
    assert scores["bleu"] == pytest.approx(expected["13a"])
    assert "bleu_tokenize=13a (as its recipe.yaml says)" in said


def test_a_model_of_the_hub_brings_its_recipe(run, scored, tmp_path, monkeypatch):
    """From the cache, as a download leaves it."""
    repository = tmp_path / "hub" / "models--NAME--mine"
    shutil.copytree(run, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    scores, expected, said = scored("NAME/mine")
    assert scores["bleu"] == pytest.approx(expected["none"])
    assert "NAME/mine on 4 pairs" in said


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("- a list\n", "recipe.yaml must hold lines of the form"),
        ("bleu_tokenize: [", r"recipe.yaml, line 1: this is not YAML \("),
        (b"bleu_tokenize: \xff", "recipe.yaml is not YAML"),
        ("bleu_tokenize: moses\n", "bleu_tokenize='moses' is unknown"),
        (yaml.safe_dump({"bleu_tokenize": [1]}), r"bleu_tokenize=\"\['1'\]\" is unknown"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named_before_anything_is_translated(recipe, message, run, scored, tmp_path):
    odd = shutil.copytree(run / "checkpoint-7", tmp_path / "odd")
    (odd / "recipe.yaml").write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    with pytest.raises(UserError, match=message):
        scored(odd)
    assert scored(odd, "--bleu_tokenize", "13a")[0]["bleu"] > 0


def test_without_data_the_test_data_of_the_models_recipe_is_scored(run, scored, tmp_path, capsys):
    scored(run)
    given = Path("scores.json").read_text()
    own = shutil.copytree(run, tmp_path / "own")
    (own / "recipe.yaml").write_text(
        "bleu_tokenize: none\ntrain_file: gone.jsonl\nvalidation_file: gone.jsonl\ntest_file: data.jsonl\n"
    )
    for name in (own, own / "checkpoint-7"):
        main([str(name), "--max_new_tokens", "30", "--output_file", "again.json"])
        first, second, *_ = capsys.readouterr().out.splitlines()
        assert first == f"no data was given, so test_file=data.jsonl is read, as in {own / 'recipe.yaml'}"
        assert second == f"{name} on 4 pairs of the test split"
        assert Path("again.json").read_text() == given
    main([str(own), "--max_new_tokens", "3", "--max_eval_samples", "1"])
    assert f"{own} on 1 pair of the test split" in capsys.readouterr().out
    # Data that the command line names are taken, and other splits only if they are asked for.
    shutil.copy("data.jsonl", "other.jsonl")
    main([str(own), "--max_new_tokens", "3", "--test_file", "other.jsonl"])
    assert "no data was given" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^gone.jsonl: no such file"):
        main([str(own), "--split", "validation"])


@pytest.mark.parametrize("recipe", [None, "d_model: 16\n", "train_file: data.jsonl\n"])
def test_without_data_anywhere_it_is_asked_for(recipe, run, tmp_path, capsys):
    alone = shutil.copytree(run / "checkpoint-7", tmp_path / "alone")
    if recipe is not None:
        (alone / "recipe.yaml").write_text(recipe)
    with pytest.raises(UserError, match=r"^no data: give a dataset, or train_file, validation_file or test_file$"):
        main([str(alone)])
    assert capsys.readouterr().out == ""


def test_a_closed_output_would_lose_the_scores(run, monkeypatch):
    monkeypatch.setattr("sys.__stdout__", None)
    with pytest.raises(UserError, match="the standard output is closed, so the scores would be lost"):
        main([str(run), "--dataset", "phrasebook:en-de"])


def test_half_of_a_surrogate_pair_is_named(run):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    pipe, texts = pipeline("translation", model=str(run), device="cpu"), ["ban", "do\ud83d"]
    for call in (partial(translate, model, tokenizer), pipe, lambda texts: list(pipe(iter(texts)))):
        with pytest.raises(ValueError, match=r"^text 2 has half of a surrogate pair, '\\ud83d', at character 3"):
            call(texts)
    with pytest.raises(ValueError, match=r"^text 1 has"):
        next(pipe.stream(texts[1]))


def test_an_unknown_option_is_refused_with_the_likely_one(run, capsys):
    for word, message in (("--nonsense", "--nonsense 3"), ("--num_beems", "--num_beems 3: did you mean --num_beams?")):
        with pytest.raises(SystemExit) as ended:
            run_program(main, [str(run), word, "3"])
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"error: unrecognized arguments: {message}\n"


class TestComparisons:
    """`--compare`: with a model, with a file, with several."""

    @pytest.fixture
    def texts(self, run) -> list[str]:
        """What the model writes."""
        model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
        return translate(model, tokenizer, TEXTS, max_new_tokens=30)

    def test_files_and_models_are_compared_alike(self, run, scored, texts, tmp_path):
        (tmp_path / "theirs.txt").write_text("".join(f"{text},\n" for text in texts))
        shutil.copytree(run / "checkpoint-7", tmp_path / "same")
        files = ["--differences_file", "rows.tsv", "--compare", "same", "theirs.txt"]
        scores, expected, said = scored(run, *files)
        assert scores["bleu"] == pytest.approx(expected["none"])
        assert list(scores["comparisons"]) == ["same", "theirs.txt"]
        same, theirs = scores["comparisons"].values()
        assert set(same["p_values"]) == {"bleu", "chrf", "ter", "exact_match"}
        assert {p for p_values in same["p_values"].values() for p in p_values.values()} == {1.0}
        assert same["scores"]["bleu"] == scores["bleu"] != theirs["scores"]["bleu"]
        assert set(scores["confidence"]["intervals"]) == {"bleu", "chrf", "ter", "exact_match"}
        assert f"{run} and theirs.txt, 4 rows" in said
        assert re.search(rf"^row [1-4]: theirs.txt is better than {run} by \d", said, re.MULTILINE)
        header, *rows = Path("rows.tsv").read_text().splitlines()
        assert header.startswith("other\trow\tgain in chrF")
        assert [row.split("\t")[0] for row in rows] == ["theirs.txt"] * 4
        # The other way round, from files alone: no model is loaded.
        (tmp_path / "ours.txt").write_text("".join(f"{text}\n" for text in texts))
        turned, _, said = scored("theirs.txt", "--compare", "ours.txt", "--bleu_tokenize", "none")
        assert turned["bleu"] == theirs["scores"]["bleu"]
        assert turned["comparisons"]["ours.txt"]["p_values"] == theirs["p_values"]
        assert "theirs.txt on 4 pairs" in said
        assert "\nbleu_tokenize=none (as told)\n" in said

    def test_mistakes_are_found_before_anything_is_translated(self, run, scored, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "vanilla_transformer.training.evaluate.translate", lambda *_, **__: pytest.fail("too early")
        )
        (tmp_path / "short.txt").write_text("a\n")
        for words, message in (
            (("--compare", "short.txt"), "^short.txt has 1 line, but 4 rows are scored: line N must translate row N"),
            (("--compare", "./nowhere"), "nowhere: no such folder"),
            (("--compare", str(run), "--differences_file", "no/rows.tsv"), "differences_file=no/rows.tsv: there is no"),
            (("--group_column", "corpus"), "group_column=corpus: the test table has no such column"),
            (("--metrics", "bleu", "cern"), "metrics=cern is unknown"),
        ):
            with pytest.raises(UserError, match=message):
                scored(run, *words)

    def test_metrics_are_those_of_the_run_unless_told_otherwise(self, run, scored, tmp_path):
        mine = shutil.copytree(run, tmp_path / "mine")
        (mine / "recipe.yaml").write_text("bleu_tokenize: char\nmetrics: [per, g2p_wer]\n")
        scores, _, said = scored(mine)
        assert set(scores) == {"per", "g2p_wer", "confidence"}
        assert "\n         per " in said
        scores, expected, _ = scored(mine, "--metrics", "bleu")
        assert set(scores) == {"bleu", "bleu_signature", "confidence"}
        assert scores["bleu"] == pytest.approx(expected["char"])
        (mine / "recipe.yaml").write_text("metrics: blue\n")
        with pytest.raises(UserError, match="metrics=blue is unknown"):
            scored(mine)

    def test_each_group_and_the_whole_are_scored(self, run, scored, texts, tmp_path):
        rows = [{"s": a, "t": f"{b}.", "part": part} for a, b, part in zip(TEXTS, texts, "xyyx", strict=True)]
        (tmp_path / "parts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        words = ["--test_file", "parts.jsonl", "--source_column", "s", "--target_column", "t"]
        scores, _, said = scored(run, *words, "--group_column", "part", "--metrics", "chrf")
        groups = {part: [row for row in range(4) if "xyyx"[row] == part] for part in "xy"}
        expected = {
            part: sacrebleu.corpus_chrf([texts[row] for row in its], [[rows[row]["t"] for row in its]]).score
            for part, its in groups.items()
        }
        assert {part: found["scores"]["chrf"] for part, found in scores["groups"].items()} == expected
        assert scores["chrf"] not in expected.values()
        assert re.search(r"^x +2 +\d+\.\d\d$", said, re.MULTILINE)

    def test_several_references_count(self, run, scored, texts, tmp_path):
        for name, lines in (("src", TEXTS), ("wrong", ["zzz"] * 4), ("right", texts)):
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        scores, _, _ = scored(run, "--test_file", "src", "wrong", "right")
        assert scores["exact_match"] == 100 * sum(bool(text.strip()) for text in texts) / 4 > 0
        assert "nrefs:var|" in scores["bleu_signature"]  # what the model left blank is no reference

"""Small complete runs: the two ways to start one, the files in its folder, and errors."""

import json
import math
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from processes import run_code, run_command
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq
from transformers.trainer_pt_utils import LabelSmoother

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training.data.phrasebook import load_phrasebook
from vanilla_transformer.training.loop.trainer import TranslationTrainer
from vanilla_transformer.training.settings.arguments import TrainingArguments
from vanilla_transformer.training.translator import translate


ROOT = Path(__file__).parents[1]
RECIPE = """
train_file: [{data}/train.en, {data}/train.de]
validation_file: [{data}/valid.jsonl]
vocab_size: 300
d_model: 32
encoder_layers: 1
decoder_layers: 1
encoder_attention_heads: 2
decoder_attention_heads: 2
encoder_ffn_dim: 64
decoder_ffn_dim: 64
dropout: 0.0
per_device_train_batch_tokens: {tokens}
learning_rate: 0.01
warmup_steps: 20
max_steps: 120
eval_strategy: steps
eval_steps: 60
save_strategy: steps
save_steps: 60
logging_steps: 20
num_beams: 2
max_new_tokens: 12
metric_for_best_model: exact_match
output_dir: {output}
"""
TWO_PROCESSES = [
    "accelerate.commands.launch", "--config_file", ROOT / "training" / "accelerate" / "many_gpus.yaml",
    "--num_processes=2", "-m",
]  # fmt: skip
COLOURS = {"red": "rot", "green": "grün", "blue": "blau", "white": "weiß", "black": "schwarz", "grey": "grau"}
THINGS = {"dog": "Hund", "cat": "Katze", "house": "Haus", "tree": "Baum", "car": "Auto", "book": "Buch"}
PAIRS = [(f"{c} {t}", f"{THINGS[t]} {COLOURS[c]}") for c in COLOURS for t in THINGS]
# The 36 targets are equally likely: whoever does not read the source has at least log(36) nats a sentence of some three
# tokens, 1.2 a token. Half of it shows that the source is read.
LEARNED = 0.6


def write_recipe(folder: Path, tokens: int = 150, output: str = "run") -> Path:
    """A task that a tiny model learns in seconds: all pairs of a colour and a thing, six of them held out."""
    held_out, known = PAIRS[::7], [pair for pair in PAIRS if pair not in PAIRS[::7]]
    (folder / "train.en").write_text("".join(f"{source}\n" for source, _ in known), encoding="utf-8")
    (folder / "train.de").write_text("".join(f"{target}\n" for _, target in known), encoding="utf-8")
    rows = [json.dumps({"source": source, "target": target}) for source, target in held_out]
    (folder / "valid.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(data=folder, output=folder / output, tokens=tokens))
    return folder / "recipe.yaml"


def train(*argv, check=True, **environment) -> subprocess.CompletedProcess:
    return run_command("train", *argv, cwd=ROOT, check=check, CUDA_VISIBLE_DEVICES="", **environment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, and its output."""
    folder = tmp_path_factory.mktemp("finished")
    return folder / "run", train(write_recipe(folder)).stdout


def test_a_run_learns_and_leaves_everything_that_the_readme_promises(finished):
    folder, printed = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "recipe.yaml", "metrics.json", "loss_curve.png", "README.md",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".bin", ".py", ".pt", ".part"))]
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["training"]["updates"] == 120
    assert f"{metrics['scores']['exact_match']:.2f}" in printed
    state = json.loads((folder / "checkpoint-120" / "trainer_state.json").read_text())
    assert min(entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry) < LEARNED


def test_the_saved_model_scores_as_the_run_said(finished):
    folder, _ = finished
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    translations = translate(model, tokenizer, [source for source, _ in PAIRS[::7]])
    equal = sum(translation == target for translation, (_, target) in zip(translations, PAIRS[::7], strict=True))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 100 * equal / len(PAIRS[::7]) == pytest.approx(metrics["scores"]["exact_match"])
    assert model.generation_config.num_beams == 2


def test_the_model_card_holds_the_figures_of_metrics_json_in_the_hubs_form(finished):
    folder, _ = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    card = ModelCard.load(folder / "README.md")
    assert "\n# run\n" in card.text
    results = {result.metric_type: result for result in card.data.eval_results}
    assert set(results) == {"bleu", "chrf", "ter", "exact_match"}
    for name, result in results.items():
        assert result.metric_value == pytest.approx(metrics["scores"][name], abs=0.005)
        assert result.metric_config == metrics["scores"].get(f"{name}_signature")


def test_the_python_code_of_the_model_card_runs(finished):
    folder, _ = finished
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["example_translation"] in run_code(code, cwd=ROOT, check=True).stdout


@pytest.mark.parametrize(("launcher", "tokens"), [([], 400), (TWO_PROCESSES, 200)], ids=["python -m", "two processes"])
def test_a_short_run_on_the_phrasebook_learns(launcher, tokens, tmp_path):
    """Its held-out loss is less than half of the loss of a model that only knows the subwords' frequencies."""
    recipe = write_recipe(tmp_path, tokens).read_text().replace("train_file", "dataset: phrasebook:en-de #")
    (tmp_path / "phrases.yaml").write_text(recipe.replace("validation_file", "phrasebook_size: 3000 #"))
    options = "--max_steps 300 --eval_steps 300 --save_steps 300 --learning_rate 0.005 --d_model 64 --vocab_size 600"
    options = [*options.split(), "--max_eval_samples", 100]
    words = [sys.executable, "-m", *launcher, "vanilla_transformer.training.train", tmp_path / "phrases.yaml", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]

    state = json.loads((tmp_path / "run" / "checkpoint-300" / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    phrases = load_phrasebook("en-de", train_size=3000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    seen, held_out = (
        torch.tensor(list(chain(*tokenizer(phrases[split]["target"][:limit])["input_ids"])))
        for split, limit in (("train", 3000), ("validation", 100))
    )
    frequencies = torch.bincount(seen, minlength=600).double() + 1
    by_frequency = -(frequencies / frequencies.sum()).log()[held_out].mean()
    assert losses[-1] < by_frequency / 2, losses


def test_a_run_resumes_where_it_stopped(tmp_path):
    recipe = write_recipe(tmp_path)
    train(recipe, "--max_steps", 60)
    again = train(recipe, "--resume_from_checkpoint", "last")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["training"]["updates"] == 120
    assert "learning 300 subwords" not in again.stderr


def test_a_run_can_end_with_the_mean_of_its_last_checkpoints(tmp_path):
    options = ["--average_checkpoints", 2, "--load_best_model_at_end", "false"]
    train(write_recipe(tmp_path), *options)
    ends = [load_file(tmp_path / "run" / name / "model.safetensors") for name in ("checkpoint-60", "checkpoint-120")]
    mean = load_file(tmp_path / "run" / "model.safetensors")
    assert set(mean) == set(ends[0])
    for name, value in mean.items():
        torch.testing.assert_close(value, (ends[0][name] + ends[1][name]) / 2)
        assert not torch.equal(ends[0][name], ends[1][name])


def test_evaluate_and_translate_agree_with_the_run(finished, tmp_path):
    folder, _ = finished
    data = folder.parent / "valid.jsonl"
    run_command("evaluate", folder, "--test_file", data, "--output_file", tmp_path / "scores.json", check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores == metrics["scores"] | {"confidence": metrics["confidence"]}

    (tmp_path / "in.txt").write_text("red dog\n\nblue house\n")
    run_command("translate", folder, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt", check=True)
    lines = (tmp_path / "out.txt").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 4
    assert lines[1] == lines[3] == ""
    assert all(lines[number] for number in (0, 2))


def test_a_folder_with_another_run_is_refused_and_stays_as_it_was(finished):
    folder, _ = finished
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    result = train(folder.parent / "recipe.yaml", check=False)
    assert result.returncode == 2
    assert "already holds a run" in result.stderr
    assert "--resume_from_checkpoint last" in result.stderr
    assert "Traceback" not in result.stderr
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


REFUSED = {
    "heads that do not divide": (["--encoder_attention_heads", "5"], "encoder_attention_heads=5 does not divide"),
    "an unknown activation": (["--activation_function", "rely"], "activation_function='rely' is unknown"),
    "a file that is not there": (["--train_file", "none.en", "none.de"], "none.en"),
    "a tokenizer that is not there": (["--tokenizer", "./nowhere"], "tokenizer=./nowhere: no such folder"),
    "no checkpoint to resume": (["--resume_from_checkpoint", "last"], "has no checkpoint"),
    "a vocabulary without room for bytes": (["--vocab_size", "100"], "vocab_size=100"),
    "more checkpoints to average than are kept": (["--average_checkpoints", "3"], "save_total_limit=2"),
    "a metric that does not exist": (["--metric_for_best_model", "blue"], "blue"),
}


@pytest.mark.parametrize(("argv", "message"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_ends_with_one_line_and_status_2(argv, message, tmp_path):
    result = train(write_recipe(tmp_path), *argv, check=False)
    assert result.returncode == 2, result.stderr[-2000:]
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert "validation error" not in result.stderr


def test_a_damaged_model_is_refused_by_name(finished, tmp_path):
    folder, _ = finished
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    result = run_command("translate", tmp_path, "--input", folder.parent / "train.en")
    assert result.returncode == 2
    assert str(tmp_path) in result.stderr.splitlines()[-1] or "cannot load the model" in result.stderr
    assert "Traceback" not in result.stderr


def make_trainer(model, rows, folder, **options) -> TranslationTrainer:
    args = TrainingArguments(
        output_dir=str(folder), eval_strategy="no", load_best_model_at_end=False, learning_rate=0.1,
        optim="sgd", lr_scheduler_type="constant", warmup_steps=0, disable_tqdm=True,
        **{"train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none", **options},
    )  # fmt: skip
    # It only pads, with 0 and -100.
    collator = DataCollatorForSeq2Seq(train_tokenizer(["text"], 300))
    data = Dataset.from_list(rows)
    return TranslationTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=collator)


def uneven_rows(count: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (2 * count,), generator=generator).tolist()
    tokens = [torch.randint(3, 61, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": a, "labels": b} for a, b in zip(tokens[::2], tokens[1::2], strict=True)]


def test_evaluation_reports_the_true_negative_log_likelihood_per_token(tiny_model, tmp_path):
    model, rows = tiny_model(label_smoothing=0.3), uneven_rows(7)
    trainer = make_trainer(model, rows, tmp_path, per_device_eval_batch_tokens=16, predict_with_generate=False)
    metrics = trainer.evaluate()

    nll, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits.double()
        nll -= logits.log_softmax(-1).gather(-1, labels[..., None]).sum().item()
        count += labels.numel()
    assert metrics["eval_loss"] == pytest.approx(nll / count, rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-6)


def test_evaluation_leaves_the_generation_config_as_it_was(tiny_model, tmp_path):
    model = tiny_model()
    before = model.generation_config.to_dict()
    make_trainer(model, uneven_rows(), tmp_path, per_device_eval_batch_tokens=16).evaluate()
    assert model.generation_config.to_dict() == before
    # Nothing ends these sentences but the limit: the source's length + 50.
    model.lm_head.bias.data[model.config.eos_token_id] = -1e9
    assert model.generate(torch.full((1, 9), 5), num_beams=1).shape[1] == 9 + 50


def test_smoothing_in_the_model_agrees_with_transformers_label_smoother(tiny_model, padded):
    model = tiny_model(label_smoothing=0.1, dropout=0.0).train()
    sources, mask = padded()
    labels = padded(seed=3)[0].masked_fill(padded(seed=3)[1] == 0, -100)
    output = model(input_ids=sources, attention_mask=mask, labels=labels, return_logits=True)
    reference = LabelSmoother(epsilon=0.1)({"logits": output.logits}, labels)
    assert output.loss.item() == pytest.approx(reference.item(), rel=1e-5)
    unsmoothed = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    assert abs(output.loss.item() - unsmoothed.item()) > 1e-3

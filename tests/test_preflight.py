"""Checks before a run: they predict what the run does, find errors that would end it later, and leave no files."""

import errno
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from test_training import train
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration
from vanilla_transformer.training.checks import plan as planning
from vanilla_transformer.training.checks import rehearsal
from vanilla_transformer.training.checks.inputs import check_inputs
from vanilla_transformer.training.checks.plan import check_memory, check_plan
from vanilla_transformer.training.checks.prepared import Run
from vanilla_transformer.training.checks.rehearsal import measure
from vanilla_transformer.training.data.pairs import load_pairs, tokenize_pairs
from vanilla_transformer.training.data.phrasebook import load_phrasebook
from vanilla_transformer.training.data.rows import learn_tokenizer
from vanilla_transformer.training.errors import RecipeError
from vanilla_transformer.training.findings import PreflightError
from vanilla_transformer.training.loop.network import build_model
from vanilla_transformer.training.settings.arguments import TrainingArguments
from vanilla_transformer.training.settings.recipe import parse_recipe
from vanilla_transformer.training.train import build_trainer, main


NETWORK = """
d_model: 16
encoder_layers: 1
decoder_layers: 1
encoder_attention_heads: 2
decoder_attention_heads: 2
encoder_ffn_dim: 32
decoder_ffn_dim: 32
warmup_steps: 5
report_to: none
"""
PHRASEBOOK = """
dataset: phrasebook:en-de
phrasebook_size: 1500
max_eval_samples: 40
vocab_size: 400
per_device_train_batch_tokens: 700
gradient_accumulation_steps: 2
num_train_epochs: 1
num_beams: 1
max_new_tokens: 40
"""
# A source of n words and a target of n + 1. Each word is one subword.
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ROWS = [{"source": " ".join(WORDS[:n]), "target": " ".join(WORDS[: n + 1])} for n in range(1, 10)] * 6
FILES = """
train_file: {folder}/train.jsonl
validation_file: {folder}/valid.jsonl
test_file: {folder}/test.jsonl
output_dir: {folder}/run
vocab_size: 400
max_steps: 40
eval_strategy: steps
eval_steps: 20
save_strategy: steps
save_steps: 20
"""


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe with small files; tests change it on the command line."""
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "valid.jsonl", ROWS[:9])
    write_rows(tmp_path / "test.jsonl", ROWS[:3])
    (tmp_path / "recipe.yaml").write_text(FILES.format(folder=tmp_path) + NETWORK)
    return tmp_path / "recipe.yaml"


@pytest.fixture
def prepare(recipe):
    """Prepares a run of the recipe, with some fields changed."""

    def build(*argv, tokenizer=None) -> Run:
        told = parse_recipe([str(recipe), *argv])
        pairs = load_pairs(told.data)
        tokenizer = tokenizer or learn_tokenizer(told.tokenizer, pairs["train"])
        rows = {split: tokenize_pairs(pairs[split], tokenizer, told.data, split) for split in pairs if split != "test"}
        return Run(told, pairs, rows, tokenizer, build_model(told, tokenizer))

    return build


def texts(findings, verdict) -> list[str]:
    return [finding.text for finding in findings if finding.verdict == verdict]


def plan_findings(run: Run) -> list:
    return check_plan(run, build_trainer(run.recipe, run.model, run.tokenizer, run.rows))


def number(pattern: str, text: str) -> float:
    return float(re.search(pattern, text).group(1).replace(",", ""))


def test_a_check_leaves_nothing_behind_and_says_what_the_run_then_does(tmp_path, caplog):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "recipe.yaml").write_text(PHRASEBOOK + NETWORK + f"output_dir: {tmp_path / 'run'}")
    printed = train(tmp_path / "recipe.yaml", "--check", TMPDIR=str(tmp_path / "tmp")).stdout
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["recipe.yaml", "tmp"]
    assert "The run can start." in printed
    assert not re.search(r"^(warning|error)", printed, re.MULTILINE)

    caplog.set_level("INFO")
    main([str(tmp_path / "recipe.yaml")])
    (checkpoint,) = tmp_path.glob("run/checkpoint-*")
    updates = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    printed = " ".join(printed.split())
    (plan,) = [line for line in caplog.messages if "updates an epoch" in line]
    assert plan in printed
    assert number(r"([\d,]+) updates? an epoch", plan) == updates
    assert number(r"([\d,]+) updates \(1.0 epochs\), 1 evaluation, 1 checkpoint written", printed) == updates
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    phrases = load_phrasebook("en-de", train_size=1500)["train"]
    for side in ("source", "target"):
        tokens = sum(map(len, tokenizer(list(phrases[side]))["input_ids"]))
        assert number(rf"([\d,]+) {side}", plan) == pytest.approx(tokens / updates, abs=0.5)
    assert number(r"(\S+) s an update", printed) > 0
    assert "check" not in yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())


def test_the_plan_counts_what_the_batches_hold(prepare):
    for strategy in ("token_budget", "random"):
        run = prepare("--train_sampling_strategy", strategy, "--gradient_accumulation_steps", "2")
        trainer = build_trainer(run.recipe, run.model, run.tokenizer, run.rows)
        plan = planning.make_plan(run, trainer)
        batches = list(trainer.get_train_dataloader())
        sources = sum(batch["attention_mask"].sum().item() for batch in batches)
        targets = sum(batch["labels"].ne(-100).sum().item() for batch in batches)
        places = sum(batch[side].numel() for batch in batches for side in ("input_ids", "labels"))
        assert plan.updates_per_epoch == -(-len(batches) // 2)
        assert plan.source_tokens == pytest.approx(sources / plan.updates_per_epoch)
        assert plan.target_tokens == pytest.approx(targets / plan.updates_per_epoch)
        if strategy == "token_budget":
            assert plan.padding == pytest.approx(1 - (sources + targets) / places)


def test_one_of_a_thing_is_in_the_singular(prepare):
    run = prepare("--max_steps", "1", "--eval_steps", "1", "--save_steps", "1")
    told = "\n".join(texts(plan_findings(run), "ok"))
    assert "1 update an epoch" in told
    assert "1 update (1.0 epochs), 1 evaluation, 1 checkpoint written" in told
    assert "1 checkpoint of" in told


def test_the_foretold_time_has_evaluations_and_checkpoints_in_it(prepare, monkeypatch):
    run = prepare()
    trainer = build_trainer(run.recipe, run.model, run.tokenizer, run.rows)
    monkeypatch.setattr(rehearsal, "time_evaluation", lambda trainer: 200.0)
    monkeypatch.setattr(rehearsal, "time_checkpoint", lambda trainer: 3000.0)
    (told,) = [finding.text for finding in measure(run, trainer) if finding.topic == "time"]
    assert "200 s an evaluation, 3e+03 s a checkpoint" in told
    assert told.endswith("(h:m:s) in total, without the final scoring")
    # Two of each: 6,400 seconds, and those of the updates.
    hours, minutes, _ = map(int, re.search(r"about (\d+):(\d+):(\d+)", told).groups())
    assert (hours, minutes) in ((1, 46), (1, 47))


def test_a_checkpoint_is_timed_by_writing_one(prepare, monkeypatch, tmp_path):
    run = prepare("--max_steps", "1", "--eval_strategy", "no", "--load_best_model_at_end", "false")
    trainer = build_trainer(run.recipe, run.model, run.tokenizer, run.rows)
    measure(run, trainer)
    assert list((tmp_path / "run").glob("checkpoint-*"))
    monkeypatch.setattr(trainer, "_write_checkpoint", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    assert rehearsal.time_checkpoint(trainer) is None


def test_looking_at_random_batches_does_not_change_what_is_drawn_later(prepare):
    run = prepare("--train_sampling_strategy", "random")
    trainer = build_trainer(run.recipe, run.model, run.tokenizer, run.rows)
    before = torch.get_rng_state()
    planning.make_plan(run, trainer)
    assert torch.equal(torch.get_rng_state(), before)


REFUSED = {
    "a row longer than a batch": (["--per_device_train_batch_tokens", "9"], "row 9: 11 .*train_batch_tokens=9"),
    "a validation row longer than a batch": (["--per_device_eval_batch_tokens", "10"], "row 9: 11 .*eval_batch_tokens"),
    "a row beyond the learned positions": (
        ["--position_embedding_type", "learned", "--max_position_embeddings", "8"],
        "row 9: 11 tokens, .*max_position_embeddings=8",
    ),
    "translations beyond the learned positions": (
        ["--position_embedding_type", "learned", "--max_new_tokens", "2000"],
        "max_new_tokens=2000 .*max_position_embeddings=1024",
    ),
    "a generation config that cannot be saved": (["--num_beams", "1", "--length_penalty", "0.6"], "length_penalty"),
    "a score without translations": (["--predict_with_generate", "false"], "metric_for_best_model=bleu"),
    "a learning rate that nothing tells": (["--warmup_steps", "0"], "learning_rate .*warmup_steps=0"),
}  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_end_a_run_late_is_an_error_that_names_the_field(prepare, argv, message):
    found = texts(check_inputs(prepare(*argv)), "error")
    assert found
    assert all(re.search(message, text) for text in found), found


def test_a_run_with_nothing_against_it_has_neither_error_nor_warning(prepare):
    run = prepare()
    findings = check_inputs(run) + plan_findings(run)
    assert not texts(findings, "error") + texts(findings, "warning")


def test_no_validation_split_is_an_error_where_evaluation_is_asked_for(prepare, recipe):
    recipe.write_text(recipe.read_text().replace("validation_file", "#"))
    assert re.search("eval_strategy=steps.*validation_file", "".join(texts(check_inputs(prepare()), "error")))
    quiet = ["--eval_strategy", "no", "--load_best_model_at_end", "false"]
    assert not texts(check_inputs(prepare(*quiet)), "error")


def test_a_test_sentence_beyond_the_learned_positions_is_found_before_the_training(prepare, recipe):
    write_rows(recipe.parent / "test.jsonl", [{"source": " ".join(WORDS * 3), "target": "one"}])
    run = prepare("--position_embedding_type", "learned", "--max_position_embeddings", "20")
    assert re.search(
        r"test, row 1: 31 tokens, .*max_position_embeddings=20", "".join(texts(check_inputs(run), "error"))
    )


def test_too_few_rows_for_the_processes_are_an_error(prepare):
    run = prepare()
    # Ten processes, which no test machine need have.
    run.recipe.training.__class__ = type("Ten", (TrainingArguments,), {"world_size": 10})
    assert re.search("validation_file: 9 rows .*10 processes", "".join(texts(check_inputs(run), "error")))


def word_tokenizer(vocabulary: dict[str, int], **special) -> PreTrainedTokenizerFast:
    """One subword for each word of the vocabulary."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | vocabulary
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


NUMBERED = {word: number for number, word in enumerate(WORDS, 4)}
TOKENIZERS = {
    "all is well": (NUMBERED, {}, "ok", "14 subwords"),
    "numbers with gaps": (NUMBERED | {"zero": 99}, {}, "error", "ids up to 99, .*vocab_size=15"),
    "ids outside the network": (NUMBERED | {"ten": 99}, {}, "error", "train target: ids from 2 to 99, .*vocab_size=14"),
    "padding that is an end": (NUMBERED, {"pad_token": "</s>"}, "error", "pad_token and eos_token share the id 2"),
    "a start that is an end": (NUMBERED, {"bos_token": "</s>"}, "warning", "bos_token and eos_token share the id 2"),
    "mostly unknown words": ({"one": 4}, {}, "error", r"train source: 66.7% of the tokens are unknown"),
    "an unknown word": (
        {word: number for word, number in NUMBERED.items() if number < 13},
        {},
        "warning",
        r"train target: 1.6% of the tokens are unknown",
    ),
}


@pytest.mark.parametrize(("vocabulary", "special", "verdict", "message"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_does_not_fit_is_found(prepare, vocabulary, special, verdict, message):
    findings = check_inputs(prepare("--tokenizer", "mine", tokenizer=word_tokenizer(vocabulary, **special)))
    found = texts(findings, verdict)
    assert any(re.search(message, text) for text in found), findings
    if verdict != "error":
        assert not texts(findings, "error")


def test_the_share_of_unknown_tokens_is_counted(prepare):
    run = prepare("--tokenizer", "mine", tokenizer=word_tokenizer({"one": 4}))
    sources = [row["source"].split() for row in ROWS]
    unknown = sum(word != "one" for words in sources for word in words)
    share = unknown / sum(len(words) + 1 for words in sources)
    assert any(f"train source: {share:.1%} of the tokens" in text for text in texts(check_inputs(run), "error"))


WARNED = {
    "warm-up without an end": (["--warmup_steps", "40"], "warmup_steps=40"),
    "translations that are cut": (["--max_new_tokens", "10"], "max_new_tokens=10 cuts 1 of 9 .*11 tokens"),
    "scores of cut translations": (["--generation_max_length", "10"], "generation_max_length=10 cuts 2 of 9"),
    "rows that are left out": (["--max_source_length", "9"], r"11.1% of the training rows .*max_source_length=9"),
    "much padding": (
        ["--train_sampling_strategy", "random", "--per_device_train_batch_size", "16"],
        "train_sampling_strategy=random.*token_budget",
    ),
    "an early stop that keeps the last": (
        ["--early_stopping_patience", "2", "--load_best_model_at_end", "false"],
        "load_best_model_at_end=false",
    ),
    "a mean of fewer checkpoints than asked for": (
        ["--average_checkpoints", "3", "--save_total_limit", "3", "--load_best_model_at_end", "false"],
        "average_checkpoints=3, but only 2",
    ),
}


@pytest.mark.parametrize(("argv", "message"), WARNED.values(), ids=WARNED)
def test_what_is_hardly_meant_is_a_warning_that_names_the_field(prepare, argv, message):
    run = prepare(*argv)
    findings = check_inputs(run) + plan_findings(run)
    assert not texts(findings, "error")
    assert re.search(message, "\n".join(texts(findings, "warning"))), findings


@pytest.mark.parametrize(
    ("bf16", "factor", "verdict"), [("true", 24, "warning"), ("true", 0.6, "ok"), ("false", 24, None)]
)
def test_bfloat16_that_is_slower_than_float32_is_a_warning(prepare, monkeypatch, bf16, factor, verdict):
    monkeypatch.setattr(planning, "time_product", lambda *sizes, bf16: factor if bf16 else 1)
    found = [finding for finding in plan_findings(prepare("--bf16", bf16)) if finding.topic == "precision"]
    assert [finding.verdict for finding in found] == ([verdict] if verdict else [])
    assert all(f"takes {factor} times as long in bfloat16 as in float32" in finding.text for finding in found)


def test_timing_products_draws_no_random_numbers():
    before = torch.get_rng_state()
    assert planning.time_product(8, 16, 32, torch.device("cpu"), bf16=True) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_more_checkpoints_than_the_disk_holds_are_an_error(prepare):
    many = ["--max_steps", str(10**12), "--save_steps", "1", "--eval_steps", "1", "--save_total_limit", str(10**9)]
    (found,) = texts(plan_findings(prepare(*many)), "error")
    assert "save_total_limit=1000000000" in found
    assert "output_dir" in found


def test_a_checkpoint_takes_what_the_report_says(prepare, recipe):
    """Compares with the files of a run: weights, Adam's state, and the mean of the weights."""
    argv = ["--ema_decay", "0.9", "--d_model", "64", "--max_steps", "1", "--eval_strategy", "no", "--save_steps", "1"]
    argv += ["--load_best_model_at_end", "false", "--max_eval_samples", "1"]
    main([str(recipe), *argv])
    checkpoint = recipe.parent / "run" / "checkpoint-1"
    names = ("model.safetensors", "optimizer.pt", "ema.safetensors")
    written = sum((checkpoint / name).stat().st_size for name in names)
    said = next(finding.text for finding in plan_findings(prepare(*argv)) if finding.topic == "disk")
    size = number(r"checkpoints? of ([\d.]+) MB", said) * 2**20
    # Names and headers come on top.
    assert 0.9 * written < size < written


def test_a_model_larger_than_the_machine_is_an_error():
    wide = round((psutil.virtual_memory().total / 4 / 2) ** 0.5) // 8 * 8
    with torch.device("meta"):
        model = VanillaTransformerForConditionalGeneration(VanillaTransformerConfig(vocab_size=10, d_model=wide))
    (found,) = check_memory(model, torch.device("cpu"))
    assert found.verdict == "error"
    assert "d_model" in found.text


def test_a_batch_that_does_not_fit_is_an_error_and_no_traceback(prepare):
    run = prepare()
    # More than 64 bits of addresses reach on today's machines: the allocator's own error.
    run.model.register_forward_pre_hook(lambda *_: torch.empty(2**50, dtype=torch.uint8))
    trainer = build_trainer(run.recipe, run.model, run.tokenizer, run.rows)
    (found,) = texts(measure(run, trainer), "error")
    assert "per_device_train_batch_tokens=4096" in found


def test_the_longest_rows_come_first(prepare):
    run = prepare("--per_device_train_batch_tokens", "50")
    trainer = build_trainer(run.recipe, run.model, run.tokenizer, run.rows)
    seen = []
    run.model.register_forward_pre_hook(partial(note_shape, seen), with_kwargs=True)
    measure(run, trainer)
    longest = max(len(row["labels"]) for row in run.rows["train"])
    assert seen[0] == (50 // longest, longest)
    assert np.prod(seen[0]) <= 50


def note_shape(seen, model, args, kwargs) -> None:
    seen.append(tuple(kwargs["labels"].shape) if kwargs.get("labels") is not None else ())


def test_a_run_is_refused_before_its_first_update_and_a_check_tells_everything(recipe, capsys):
    wrong = ["--per_device_train_batch_tokens", "9", "--predict_with_generate", "false"]
    folder = recipe.parent / "run"
    with pytest.raises(SystemExit) as status:
        main([str(recipe), *wrong, "--check"])
    assert status.value.code == 2
    assert not folder.exists()
    printed = capsys.readouterr().out
    assert re.search("^error .*per_device_train_batch_tokens=9", printed, re.MULTILINE)
    assert re.search("^error .*metric_for_best_model=bleu", printed, re.MULTILINE)
    assert "2 errors: the run cannot start." in printed

    with pytest.raises(PreflightError) as refusal:
        main([str(recipe), *wrong])
    assert "per_device_train_batch_tokens=9" in str(refusal.value)
    assert "metric_for_best_model=bleu" in str(refusal.value)
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--output_dir", "/proc/run"], "output_dir=/proc/run cannot be written into: No such file"),
        (["--output_dir", __file__], "cannot be written into: File exists"),
        (["--optim", "galore_adamw"], "optim=galore_adamw cannot be used here: .*galore_torch"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_type=cosine_with_min_lr .*min_lr_rate"),
    ],
)
def test_what_the_first_update_would_fall_over_is_an_error_that_names_the_field(recipe, wrong, message):
    with pytest.raises(RecipeError, match=message):
        main([str(recipe), *wrong])


def test_a_stream_is_estimated_from_its_first_rows(recipe, capsys):
    """All of them here, so that the estimate is right."""
    plans, limits = [], ("per_device_train_batch_tokens", "max_source_length", "max_target_length")
    budget = [word for name in limits for word in (f"--{name}", "100")]
    for argv in ([], ["--streaming"]):
        main([str(recipe), *budget, "--check", *argv])
        printed = " ".join(capsys.readouterr().out.split())
        assert "The run can start." in printed
        plans.append(re.search(r"batches (.*? of it padding\)); (.*?) ok schedule +40 updates", printed).groups())
    assert plans[0][0] == plans[1][0]
    assert plans[1][1] == "estimated from a sample"

"""LoRA by peft: on our trainer, on transformers' own, and by the training program; merged, saved, reloaded."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_training import COLOURS, THINGS, uneven_rows, write_recipe
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    GenerationMixin,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from vanilla_transformer import train_tokenizer
from vanilla_transformer.engine_eligibility import inspect_model
from vanilla_transformer.network_loss import label_smoothed_cross_entropy
from vanilla_transformer.training.errors import RecipeError
from vanilla_transformer.training.loop.adapters import add_adapters
from vanilla_transformer.training.loop.network import build_model
from vanilla_transformer.training.loop.trainer import TranslationTrainer
from vanilla_transformer.training.metrics import score_texts
from vanilla_transformer.training.saved_model import load_model
from vanilla_transformer.training.settings.arguments import TrainingArguments
from vanilla_transformer.training.settings.recipe import parse_recipe
from vanilla_transformer.training.train import main
from vanilla_transformer.training.translator import translate


EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "lm_head"]


def adapted(model, **options) -> PeftModel:
    """A model whose adapters change its output; with peft's initial values they would not."""
    config = LoraConfig("SEQ_2_SEQ_LM", r=4, target_modules=EVERY_LINEAR, init_lora_weights=False, **options)
    return get_peft_model(model, config).eval()


def test_fast_paths_step_aside_for_adapters_and_are_back_after_the_merge(lively_model, padded, tmp_path):
    model = lively_model()
    source, mask = padded((7, 5, 3, 8))
    options = {"attention_mask": mask, "max_new_tokens": 12}
    before = model.generate(source, **options)  # which packs the weights that the merge will change in place
    wrapped = adapted(model)

    # 1. adapted: transformers' own search, and a head that is called
    assert inspect_model(wrapped.base_model.model).unknown == "the class peft.tuners.lora.layer.Linear (lm_head)"
    found = wrapped.generate(input_ids=source, **options)
    assert not torch.equal(found, before)
    assert torch.equal(found, GenerationMixin.generate(wrapped.base_model.model, source, **options))
    wrapped.train()
    batch = {"input_ids": source, "attention_mask": mask, "labels": source.masked_fill(mask == 0, -100)}
    for layer in wrapped.modules():
        layer.training = layer is wrapped.base_model.model  # the loss of training, without dropout
    output = wrapped(**batch)
    expected = label_smoothed_cross_entropy(output.logits, batch["labels"], model.config.label_smoothing)
    torch.testing.assert_close(output.loss, expected)
    logits = wrapped.eval()(**batch).logits

    # 2. merged: our search on the new weights, with the same result
    merged = wrapped.merge_and_unload()
    assert merged is model
    assert inspect_model(merged).unknown is None
    torch.testing.assert_close(merged(**batch).logits, logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(merged.generate(source, **options), found)
    assert merged.train()(**batch).logits is None  # projection and loss in one

    # 3. a plain folder
    merged.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("adapter")]
    reloaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded(**batch).logits, merged.eval()(**batch).logits)
    assert torch.equal(reloaded.generate(source, **options), found)


def test_new_adapters_change_nothing_and_leave_everything_else_frozen(lively_model, padded):
    model = lively_model(tie_word_embeddings=True)
    source, mask = padded((7, 5, 3, 8))
    before = model(source, mask, labels=source).logits
    wrapped = add_adapters(model, rank=2)
    assert torch.equal(wrapped.eval()(input_ids=source, attention_mask=mask, labels=source).logits, before)
    trained = {name for name, weight in wrapped.named_parameters() if weight.requires_grad}
    # Two matrices beside each of 6 projections in an encoder layer, of 10 in a decoder layer.
    assert len(trained) == 2 * (6 * 3 + 10 * 2)
    assert all("lora_" in name for name in trained)


def make_trainer(trainer_class, model, folder, rows_at_a_time=8):
    """One update is 8 rows, however they are split."""
    ours = trainer_class is TranslationTrainer
    arguments = TrainingArguments if ours else Seq2SeqTrainingArguments
    args = arguments(
        output_dir=str(folder), report_to="none", eval_strategy="no", save_strategy="no", load_best_model_at_end=False,
        learning_rate=0.5, optim="sgd", lr_scheduler_type="constant", warmup_steps=0, max_steps=6, disable_tqdm=True,
        per_device_train_batch_size=rows_at_a_time, gradient_accumulation_steps=8 // rows_at_a_time, use_cpu=True,
        max_grad_norm=0.0, logging_steps=1, train_sampling_strategy="sequential",
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(train_tokenizer(["text"], 300))
    data = Dataset.from_list(uneven_rows(8))
    return trainer_class(model=model, args=args, train_dataset=data, data_collator=collator)


@pytest.mark.parametrize("trainer_class", [TranslationTrainer, Seq2SeqTrainer])
def test_a_trainer_trains_adapters_alone_with_one_loss_for_every_split(trainer_class, tiny_model, tmp_path):
    ends = []
    for rows_at_a_time in (8, 2):
        model = tiny_model(dropout=0.0)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        torch.manual_seed(1)
        trainer = make_trainer(trainer_class, add_adapters(model, rank=4), tmp_path, rows_at_a_time)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        frozen = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
        assert all(torch.equal(frozen[name], value) for name, value in before.items())
        ends.append({name: value for name, value in frozen.items() if "lora_B" in name})
    assert all(value.abs().max() > 1e-4 for value in ends[0].values())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-6, rtol=1e-4, msg=name)


# The program: a model that has learned German learns another order and other words.
FRENCH = {"rot": "rouge", "grün": "vert", "blau": "bleu", "weiß": "blanc", "schwarz": "noir", "grau": "gris"}
OTHER_PAIRS = [(f"{c} {t}", f"{FRENCH[COLOURS[c]]} {THINGS[t]}") for c in COLOURS for t in THINGS]
SILENT = ["--report_to", "none", "--disable_tqdm", "true"]


def write_rows(path: Path, pairs: list[tuple[str, str]]) -> Path:
    rows = [json.dumps({"source": source, "target": target}) for source, target in pairs]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small run."""
    folder = tmp_path_factory.mktemp("base")
    main([str(write_recipe(folder)), *SILENT])
    return folder / "run"


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory) -> tuple[list[str], Path]:
    """The command line that trains it on another language, and the folder."""
    folder = tmp_path_factory.mktemp("lora")
    train = write_rows(folder / "train.jsonl", [pair for pair in OTHER_PAIRS if pair not in OTHER_PAIRS[::7]])
    test = write_rows(folder / "test.jsonl", OTHER_PAIRS[::7])
    command = [
        "--model", str(base), "--lora_rank", "8", "--train_file", str(train), "--test_file", str(test),
        "--per_device_train_batch_tokens", "150", "--learning_rate", "0.03", "--warmup_steps", "20",
        "--max_steps", "160", "--save_strategy", "steps", "--save_steps", "80", "--eval_strategy", "steps",
        "--eval_steps", "80", "--validation_file", str(test), "--load_best_model_at_end", "false",
        "--num_beams", "2", "--max_new_tokens", "12", *SILENT,
    ]  # fmt: skip
    main([*command, "--output_dir", str(folder / "run")])
    return command, folder / "run"


def exact_match(folder: Path) -> float:
    model, tokenizer = load_model(str(folder))
    sources, references = map(list, zip(*OTHER_PAIRS[::7], strict=True))
    return score_texts(translate(model, tokenizer, sources), references, "13a")["exact_match"]


def test_the_program_teaches_a_model_another_language_and_leaves_a_plain_folder(base, lora):
    _, folder = lora
    metrics = json.loads((folder / "metrics.json").read_text())
    assert exact_match(folder) == pytest.approx(metrics["scores"]["exact_match"])
    assert exact_match(folder) > exact_match(base)
    assert not [path.name for path in folder.iterdir() if path.name.startswith("adapter")]
    # All other weights are unchanged, also after an evaluation.
    assert (folder / "generation_config.json").read_text() == (base / "generation_config.json").read_text()
    assert torch.equal(*(load_file(path / "model.safetensors")["model.shared.weight"] for path in (base, folder)))


def test_the_last_checkpoint_is_an_adapter_that_peft_loads_and_merges_into_the_same_model(base, lora):
    _, folder = lora
    checkpoint = folder / "checkpoint-160"
    assert not (checkpoint / "model.safetensors").exists()
    model, tokenizer = load_model(str(folder))
    batch = tokenizer([source for source, _ in OTHER_PAIRS], return_tensors="pt", padding=True)
    expected = model.generate(**batch)
    wrapped = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), checkpoint).eval()
    assert torch.equal(wrapped.generate(**batch), expected)
    merged = wrapped.merge_and_unload()
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(merged.state_dict()[name], value), name


def test_a_run_of_adapters_resumes_to_the_bit(lora, tmp_path):
    command, folder = lora
    main([*command, "--output_dir", str(tmp_path / "run"), "--max_steps", "80"])
    main([*command, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "last"])
    weights = load_file(tmp_path / "run" / "model.safetensors")
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(weights[name], value), name


def test_a_check_says_what_a_run_of_adapters_will_do(lora, tmp_path, capsys):
    main([*lora[0], "--output_dir", str(tmp_path / "run"), "--check"])
    assert "The run can start." in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_exponential_mean_is_that_of_adapters(base, lora, tmp_path):
    main([*lora[0], "--output_dir", str(tmp_path), "--max_steps", "20", "--save_steps", "20", "--ema_decay", "0.9"])
    checkpoint = tmp_path / "checkpoint-20"
    mean = load_file(checkpoint / "ema.safetensors")
    wrapped = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), checkpoint, is_trainable=True)
    trained = {name: weight for name, weight in wrapped.named_parameters() if weight.requires_grad}
    assert set(mean) == set(trained)
    for name, weight in trained.items():
        assert not torch.equal(weight, mean[name])
        weight.data = mean[name]
    merged = wrapped.merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(merged[name], value), name


def test_a_named_model_is_trained_on_in_float32_with_the_rates_of_the_recipe(base, tmp_path):
    model, tokenizer = load_model(str(base))
    for part in (model.bfloat16(), tokenizer):
        part.save_pretrained(tmp_path / "half")
    argv = ["--model", str(tmp_path / "half"), "--dropout", "0.25", "--d_model", "32", "--num_beams", "3"]
    further = build_model(parse_recipe([*argv, "--output_dir", str(tmp_path)]), tokenizer)
    assert further.dtype == torch.float32
    assert further.model.encoder.layers[0].dropout.p == further.config.dropout == 0.25
    assert further.generation_config.num_beams == 3
    for name, value in model.state_dict().items():
        assert torch.equal(further.state_dict()[name], value.float()), name


REFUSED = {
    "adapters without a model": (["--lora_rank", "4"], "lora_rank=4 adapts an existing model"),
    "no rank": (["--model", "BASE", "--lora_rank", "0"], "lora_rank=0 must be at least 1"),
    "another tokenizer": (["--model", "BASE", "--tokenizer", "BASE"], "which has its own"),
    "the mean of adapters": (
        ["--model", "BASE", "--lora_rank", "4", "--average_checkpoints", "2", "--load_best_model_at_end", "false"],
        "checkpoints with lora_rank=4 hold adapters only",
    ),
    "another width": (["--model", "BASE", "--d_model", "64"], "d_model=64, but model="),
}


@pytest.mark.parametrize(("argv", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_a_named_model_is_refused(argv, message, base, tmp_path):
    argv = [str(base) if word == "BASE" else word for word in argv]
    with pytest.raises(RecipeError, match=re.escape(message)):
        build_model(parse_recipe([*argv, "--output_dir", str(tmp_path)]), None)

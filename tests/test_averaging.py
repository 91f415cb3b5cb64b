"""Averages of checkpoints, also by the command, and of all updates of a run; and early stopping."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from processes import run_command
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainerCallback

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training.errors import RecipeError, UserError
from vanilla_transformer.training.loop.averaging import AveragingError, last_checkpoints, load_average
from vanilla_transformer.training.loop.callbacks import callbacks
from vanilla_transformer.training.loop.trainer import TranslationTrainer, score_translations
from vanilla_transformer.training.settings.arguments import TrainingArguments
from vanilla_transformer_commands import average as average_command


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some text"], 300)


@pytest.fixture(scope="module")
def run_folder(tiny_model, tokenizer, tmp_path_factory) -> Path:
    """Three checkpoints of one model, whose order differs from that of their names, and one that is being written."""
    folder = tmp_path_factory.mktemp("run")
    for step in (9, 10, 100):
        save_checkpoint(tiny_model, tokenizer, folder / f"checkpoint-{step}", seed=step)
    (folder / "checkpoint-200.part").mkdir()
    return folder


def save_checkpoint(tiny_model, tokenizer, folder: Path, seed: int, **fields) -> None:
    model = tiny_model(vocab_size=len(tokenizer), **fields)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    model.generation_config.update(num_beams=3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_text("")


def average(*argv) -> None:
    average_command.main(list(map(str, argv)))


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_word_embeddings": False}, {"share_encoder_decoder_embeddings": False}, {"normalize_before": True}],
    ids=str,
)
def test_the_mean_is_that_of_each_weight(fields, tiny_model, tokenizer, tmp_path):
    models = []
    for seed in range(3):
        save_checkpoint(tiny_model, tokenizer, tmp_path / f"checkpoint-{seed}", seed, **fields)
        models.append(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / f"checkpoint-{seed}").state_dict())
    model = tiny_model(vocab_size=len(tokenizer), **fields)
    load_average(model, last_checkpoints(tmp_path, 3))
    for name, weight in model.state_dict().items():
        mean = sum(state[name].double() for state in models) / 3
        assert torch.equal(weight, mean.float()), name


def test_the_script_averages_the_last_checkpoints_of_a_run_into_a_model(run_folder, tmp_path):
    output = tmp_path / "mean"
    run_command("average", run_folder, "--last", 2, "--output_dir", output, check=True)
    assert {path.name for path in output.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not output.with_name("mean.part").exists()
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.generation_config.num_beams == 3
    assert tokenizer.decode(tokenizer("some text").input_ids, skip_special_tokens=True) == "some text"
    ends = [load_file(run_folder / f"checkpoint-{step}" / "model.safetensors") for step in (10, 100)]
    for name, value in load_file(output / "model.safetensors").items():
        assert torch.equal(value, ((ends[0][name].double() + ends[1][name].double()) / 2).float()), name


def test_the_script_averages_named_checkpoints(run_folder, tmp_path):
    chosen = [run_folder / "checkpoint-100", run_folder / "checkpoint-9"]
    average(*chosen, "--output_dir", tmp_path / "mean")
    one, other = (load_file(path / "model.safetensors") for path in chosen)
    for name, value in load_file(tmp_path / "mean" / "model.safetensors").items():
        assert torch.equal(value, ((one[name].double() + other[name].double()) / 2).float()), name


def damage(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])


REFUSED = {
    "a folder that is not there": ({}, None, ["nowhere", "checkpoint-9"], ["nowhere: no such folder"]),
    "more than there are": ({}, None, [".", "--last", "5"], ["--last 5", "3 checkpoints"]),
    "none": ({}, None, [".", "--last", "0"], ["--last 0", "at least 1"]),
    "two runs": ({}, None, [".", ".", "--last", "2"], ["--last needs one folder"]),
    "an existing output": ({}, None, ["checkpoint-9", "--output_dir", "checkpoint-10"], ["output_dir=", "exists"]),
    "another width": ({"encoder_ffn_dim": 40}, None, ["checkpoint-9", "new"], ["checkpoint-9 and", "24", "40"]),
    "another depth": ({"decoder_layers": 1}, None, ["checkpoint-9", "new"], ["decoder_layers is 2", "and 1"]),
    "a weight more": ({"tie_word_embeddings": False}, None, ["checkpoint-9", "new"], ["lm_head.weight is absent"]),
    "other heads": ({"encoder_attention_heads": 8}, None, ["checkpoint-9", "new"], ["encoder_attention_heads is 4"]),
    "a torn file": ({}, damage, ["checkpoint-9", "new"], ["new", "is damaged"]),
    "no configuration": ({}, lambda new: (new / "config.json").unlink(), ["new"], ["config.json cannot be read"]),
}


@pytest.mark.parametrize(("fields", "harm", "argv", "message"), REFUSED.values(), ids=REFUSED)
def test_checkpoints_without_a_mean_are_refused(
    fields, harm, argv, message, tiny_model, tokenizer, run_folder, tmp_path, monkeypatch
):
    if "new" in argv:
        save_checkpoint(tiny_model, tokenizer, tmp_path / "new", seed=1, **fields)
        if harm:
            harm(tmp_path / "new")
    argv = [tmp_path / name if name == "new" else name for name in argv]
    monkeypatch.chdir(run_folder)
    if "--output_dir" not in argv:
        argv += ["--output_dir", tmp_path / "mean"]
    with pytest.raises(UserError) as refused:
        average(*argv)
    assert all(part in str(refused.value) for part in message), refused.value
    assert not (tmp_path / "mean").exists()


# A run of 6 updates that evaluates and saves after every second one.
STEPS = 6
RUN = {
    "max_steps": STEPS, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "save_total_limit": None, "load_best_model_at_end": False, "logging_steps": 1, "learning_rate": 0.02,
    "lr_scheduler_type": "constant", "warmup_steps": 0, "report_to": "none", "disable_tqdm": True,
    "predict_with_generate": False, "metric_for_best_model": "loss", "per_device_train_batch_tokens": 16,
}  # fmt: skip


class Weights(TrainerCallback):
    """The model's weights after each update."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after.append({name: value.double().clone() for name, value in model.state_dict().items()})


def make_trainer(tiny_model, tokenizer, folder, scores=None, extra=(), **options) -> TranslationTrainer:
    """A trainer of a tiny model. Its evaluations return `scores` as BLEU."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (24,), generator=generator).tolist()
    tokens = [torch.randint(3, 61, (length,), generator=generator).tolist() for length in lengths]
    rows = Dataset.from_dict({"input_ids": tokens[::2], "labels": tokens[1::2]})
    args = TrainingArguments(output_dir=str(folder), **(RUN | options))
    found = iter(scores or ())
    return TranslationTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=(lambda prediction: {"bleu": next(found)}) if scores else None,
        callbacks=[*callbacks(args), *extra],
    )


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def exponential_mean(after: list[dict], decay: float) -> dict[str, torch.Tensor]:
    """The mean by its definition, in float64."""
    parts = [decay ** (len(after) - step) for step in range(1, len(after) + 1)]
    return {
        name: sum(part * state[name] for part, state in zip(parts, after, strict=True)) / math.fsum(parts)
        for name in after[0]
    }


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_a_run_evaluates_and_ends_with_the_exponential_mean_of_its_weights(decay, tiny_model, tokenizer, tmp_path):
    plain_weights, weights = Weights(), Weights()
    plain = make_trainer(tiny_model, tokenizer, tmp_path / "plain", extra=[plain_weights])
    plain.train()
    trainer = make_trainer(tiny_model, tokenizer, tmp_path / "ema", extra=[weights], ema_decay=decay)
    trainer.train()

    # 1. the updates are those of a run without it
    for one, other in zip(weights.after, plain_weights.after, strict=True):
        assert_same(one, other)
    last = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ema" / f"checkpoint-{STEPS}")
    assert_same(last.state_dict(), weights_of(plain.model))
    # 2. the mean is the definition's
    mean = exponential_mean(weights.after, decay)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, mean[name].float(), rtol=1e-5, atol=1e-6)
    # 3. the mean was evaluated, and it is saved
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == evaluated[-1]
    assert plain.evaluate()["eval_loss"] != evaluated[-1]
    trainer.save_model(tmp_path / "end")
    assert_same(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "end").state_dict(), weights_of(trainer.model))
    assert not (tmp_path / "end" / "ema.safetensors").exists()


def test_a_run_that_resumes_has_the_same_mean_to_the_bit(tiny_model, tokenizer, tmp_path):
    whole = make_trainer(tiny_model, tokenizer, tmp_path / "whole", ema_decay=0.9)
    whole.train()
    make_trainer(tiny_model, tokenizer, tmp_path / "cut", ema_decay=0.9, max_steps=4).train()
    resumed = make_trainer(tiny_model, tokenizer, tmp_path / "cut", ema_decay=0.9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert_same(weights_of(resumed.model), weights_of(whole.model))
    for name in ("model.safetensors", "ema.safetensors"):
        ends = [load_file(tmp_path / run / f"checkpoint-{STEPS}" / name) for run in ("whole", "cut")]
        assert_same(*ends)
    losses = [
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (whole, resumed)
    ]
    assert losses[0] == losses[1]


def test_the_best_model_is_the_mean_that_scored_best(tiny_model, tokenizer, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "bleu"}
    trainer = make_trainer(tiny_model, tokenizer, tmp_path, scores=[1.0, 3.0, 2.0], ema_decay=0.9, **best)
    trainer.train()
    stored = load_file(tmp_path / "checkpoint-4" / "ema.safetensors")
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, stored[name]), name


def test_a_checkpoint_of_a_run_without_a_mean_is_refused(tiny_model, tokenizer, tmp_path):
    make_trainer(tiny_model, tokenizer, tmp_path, max_steps=2).train()
    trainer = make_trainer(tiny_model, tokenizer, tmp_path, ema_decay=0.9)
    with pytest.raises(AveragingError, match=r"ema_decay=0\.9, but .*checkpoint-2 .* has no ema\.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


CONTRADICTIONS = [
    ({"ema_decay": 1.0}, ["ema_decay=1.0"]),
    ({"ema_decay": 0.0}, ["ema_decay=0.0"]),
    ({"ema_decay": 0.99, "average_checkpoints": 2}, ["ema_decay=0.99", "average_checkpoints=2"]),
    ({"average_checkpoints": 2, "load_best_model_at_end": True}, ["average_checkpoints=2", "load_best_model_at_end"]),
    ({"average_checkpoints": 2, "save_strategy": "no"}, ["average_checkpoints=2", "save_strategy=no"]),
    ({"average_checkpoints": 0}, ["average_checkpoints=0"]),
    ({"early_stopping_patience": 0}, ["early_stopping_patience=0"]),
    ({"early_stopping_patience": 2, "eval_strategy": "no"}, ["early_stopping_patience=2", "eval_strategy=no"]),
    ({"early_stopping_patience": 2, "metric_for_best_model": None}, ["metric_for_best_model=None"]),
    ({"r_drop_alpha": -1.0}, ["r_drop_alpha=-1.0"]),
]


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS, ids=str)
def test_what_cannot_go_together_is_refused(options, message, tmp_path):
    with pytest.raises(RecipeError) as refused:
        TrainingArguments(output_dir=str(tmp_path), **(RUN | options))
    assert all(part in str(refused.value) for part in message), refused.value


STOPPING = {"eval_steps": 1, "save_steps": 1, "max_steps": 12, "metric_for_best_model": "bleu"}
SCORES = {
    "never better": [2.0, 2.0, 2.0, 2.0, 2.0],
    "better, then worse": [1.0, 3.0, 2.0, 2.5, 9.0],
    "better again in time": [1.0, 3.0, 2.0, 4.0, 4.0, 1.0, 9.0],
}


def stops_after(scores: list[float], patience: int) -> int:
    """The first evaluation after which the last `patience` ones are no better than the best before them."""
    return next(
        n for n in range(patience + 1, len(scores) + 1) if max(scores[n - patience : n]) <= max(scores[: n - patience])
    )


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("interrupted", [False, True])
def test_training_stops_early_on_bleu_also_where_it_was_interrupted(
    scores, interrupted, tiny_model, tokenizer, tmp_path
):
    options = STOPPING | {"early_stopping_patience": 2}
    end, start = stops_after(scores, patience=2), 0
    if interrupted:
        start = end - 1
        make_trainer(tiny_model, tokenizer, tmp_path, scores, **(options | {"max_steps": start})).train()
    trainer = make_trainer(tiny_model, tokenizer, tmp_path, scores[start:], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}") if interrupted else None)
    assert trainer.state.global_step == end
    assert trainer.state.best_metric == max(scores[:end])


def test_a_run_that_had_stopped_early_does_not_go_on(tiny_model, tokenizer, tmp_path):
    options = STOPPING | {"early_stopping_patience": 2}
    first = make_trainer(tiny_model, tokenizer, tmp_path, scores=[5.0, 1.0, 1.0], **options)
    first.train()
    again = make_trainer(tiny_model, tokenizer, tmp_path, scores=[5.0], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3
    assert_same(weights_of(again.model), weights_of(first.model))


def test_early_stopping_reads_the_true_score_of_translations(tiny_model, tokenizer, tmp_path):
    """Constant weights give constant scores, so only the patience decides."""
    options = STOPPING | {"early_stopping_patience": 3, "learning_rate": 0.0, "predict_with_generate": True}
    trainer = make_trainer(tiny_model, tokenizer, tmp_path, **options)
    trainer.compute_metrics = score_translations(tokenizer, "13a")
    trainer.train()
    assert trainer.state.global_step == 4
    assert sum("eval_bleu" in entry for entry in trainer.state.log_history) == 4

"""Other libraries: device maps of accelerate, rows of datasets, metrics of evaluate, trackers."""

import re
import subprocess

import evaluate
import pytest
import torch
from datasets import Dataset, IterableDataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import ROOT, make_trainer, uneven_rows
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    pipeline,
)

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training.errors import RecipeError
from vanilla_transformer.training.metrics import TranslationMetrics
from vanilla_transformer.training.settings.arguments import TrainingArguments


# How much of a model may stay in memory, as options of `from_pretrained`, and where the rest is.
DEVICE_MAPS = {
    "all of it": (lambda size: {"device_map": "auto"}, {"cpu"}),
    "half of it": (lambda size: {"device_map": "auto", "max_memory": {"cpu": size // 2}}, {"cpu", "disk"}),
    "not the decoder": (
        lambda size: {
            "device_map": dict.fromkeys(("model.encoder", "model.decoder.embed_tokens"), "cpu")
            | dict.fromkeys((f"model.decoder.{part}" for part in ("embed_positions", "layers", "layer_norm")), "disk")
            | {"lm_head": "disk"}
        },
        {"cpu", "disk"},
    ),
}
NETWORKS = {
    "one table": {"tie_word_embeddings": True},
    "three tables, pre-norm, learned positions": {
        "share_encoder_decoder_embeddings": False,
        "normalize_before": True,
        "position_embedding_type": "learned",
    },
}


@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize(("options", "places"), DEVICE_MAPS.values(), ids=DEVICE_MAPS)
def test_a_model_that_is_split_over_devices_computes_the_same(options, places, fields, lively_model, padded, tmp_path):
    model = lively_model(dropout=0.0, **fields)
    model.save_pretrained(tmp_path / "model")
    options = options(model.get_memory_footprint())
    if model.config.share_encoder_decoder_embeddings and isinstance(options["device_map"], dict):
        # One table is in one place.
        options["device_map"] |= dict.fromkeys(("model.shared", "lm_head"), "cpu")
    split = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model", offload_folder=tmp_path / "offload", **options)
    assert set(getattr(split, "hf_device_map", {"": "cpu"}).values()) == places

    source, mask = padded((7, 5, 3, 8))
    batch = {"input_ids": source, "attention_mask": mask, "labels": source.masked_fill(mask == 0, -100)}
    assert torch.equal(split(**batch).logits, model(**batch).logits)
    for beams in (1, 4):
        search = {"attention_mask": mask, "num_beams": beams, "max_new_tokens": 12}
        assert torch.equal(split.generate(source, **search), model.generate(source, **search))
    # In training the loss calls a head that is not at hand.
    torch.testing.assert_close(split.train()(**batch).loss, model.train()(**batch).loss)


def test_rows_of_an_iterable_dataset_train_by_the_stock_trainer(tiny_model, tmp_path):
    rows = uneven_rows(24)
    ends = []
    for data in (Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows))):
        model = tiny_model(dropout=0.0)
        args = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, learning_rate=0.01, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=True, train_sampling_strategy="sequential",
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(train_tokenizer(["text"], 300))
        Seq2SeqTrainer(model=model, args=args, train_dataset=data, data_collator=collator).train()
        ends.append(model.state_dict())
    start = tiny_model(dropout=0.0).state_dict()
    assert not torch.equal(ends[0]["lm_head.bias"], start["lm_head.bias"])
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


def test_the_pipeline_translates_columns_of_datasets_that_are_streamed(lively_model):
    tokenizer = train_tokenizer(["red dog, blue house, green tree"], 270)
    pipe = pipeline("translation", model=lively_model(vocab_size=len(tokenizer)), tokenizer=tokenizer, device="cpu")
    data = Dataset.from_dict({"source": ["red dog", "a blue house", "tree", ""]})
    expected = pipe(list(data["source"]))
    for column in (data["source"], data.to_iterable_dataset()["source"]):
        assert [one for (one,) in pipe(column)] == expected


def test_our_metric_is_used_as_any_of_evaluate():
    predictions, references = ["the cat sat", "3 days ago", "no"], ["the cat is", "3 days ago", "yes"]
    expected = TranslationMetrics().compute(predictions=predictions, references=references)
    by_rows, by_batches = TranslationMetrics(), TranslationMetrics()
    for prediction, reference in zip(predictions, references, strict=True):
        by_rows.add(prediction=prediction, reference=reference)
    by_batches.add_batch(predictions=predictions[:1], references=references[:1])
    by_batches.add_batch(predictions=predictions[1:], references=references[1:])
    assert by_rows.compute() == by_batches.compute() == expected
    together = evaluate.combine([TranslationMetrics()]).compute(predictions=predictions, references=references)
    assert together == expected


class Tracker(TrainerCallback):
    """A user's own callback."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, logs))


def test_tensorboard_and_a_tracker_of_the_users_own_get_what_is_logged(tiny_model, tmp_path):
    options = {"max_steps": 3, "logging_steps": 1, "report_to": "tensorboard"}
    trainer = make_trainer(tiny_model(), uneven_rows(), tmp_path, **options)
    trainer.add_callback(tracker := Tracker())
    trainer.train()
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert set(losses) == {1, 2, 3}
    assert {step: logs["loss"] for step, logs in tracker.logged if "loss" in logs} == losses
    (written,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(written))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(losses)
    assert '"d_model": 16' in events.Tensors("model_config/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("name", ["wandbb", "azure_ml"])
def test_a_tracker_that_is_not_there_is_refused_at_once(name, tmp_path):
    with pytest.raises(RecipeError, match=re.escape(f"report_to={name} is not an installed tracker")):
        TrainingArguments(output_dir=str(tmp_path), report_to=name)


def test_the_examples_of_the_documents_run_from_top_to_bottom(tiny_model, peer_python, tmp_path):
    document = (ROOT / "docs" / "interoperability.md").read_text(encoding="utf-8")
    section = document.split("## The rest of the ecosystem")[1].split("\n## ")[0]
    tokenizer = train_tokenizer(["3 days ago, 3 dagen geleden, 5 days ago, 5 dagen geleden"], 270)
    for part in (tiny_model(vocab_size=len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "runs" / "quickstart")
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    result = subprocess.run([peer_python("torchao"), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "'exact_match': 100.0" in result.stdout
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {"merged", "int8"}

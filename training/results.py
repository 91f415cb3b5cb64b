"""Scores a finished run, and writes its metrics.json, loss_curve.png and README.md."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, TrainerState

from vanilla_transformer.tokenization_languages import multilingual
from vanilla_transformer.tokenization_units import kind_of_tokens

from .data.languages import target_languages, trained_on
from .files import write_beside
from .loop.stages import MixtureTrainer
from .loop.trainer import TranslationTrainer
from .machine import machine
from .publishing.card import model_card
from .publishing.pictures import draw_loss_curve
from .scores import score_rows
from .settings.arguments import TrainingArguments
from .settings.recipe import Recipe, lasting, public
from .translator import translate
from .words import counted


# Example translations shown at the end of a run.
SHOWN = 5


def score_run(
    recipe: Recipe, trainer: TranslationTrainer, model: PreTrainedModel, pairs: DatasetDict
) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """
    Scores the model on held-out text.

    Returns:
        The contents of metrics.json, and some examples: source, translation and reference.
    """
    split = next(name for name in ("test", "validation", "train") if name in pairs)
    sources, references = list(pairs[split]["source"]), list(pairs[split]["target"])
    tokenizer, batch_tokens = trainer.processing_class, recipe.training.per_device_eval_batch_tokens
    languages = target_languages(pairs[split])
    translations = translate(model, tokenizer, sources, batch_tokens, **languages)
    given = public(recipe.given)
    metrics: dict[str, Any] = {
        "scored_split": split,
        **score_rows(
            translations,
            pairs[split],
            recipe.decoding.bleu_tokenize,
            recipe.decoding.metrics,
            trained_on(pairs["train"]),
        ),
        "num_beams": model.generation_config.num_beams,
        "parameters": model.num_parameters(),
        "data_name": recipe.data.data_name
        or ", ".join(given.get("corpora", ()))
        or given.get("dataset")
        or ", ".join(given.get("train_file", [])),
        "rows": {name: len(rows) for name, rows in pairs.items() if isinstance(rows, Dataset)},
        "training": training_summary(trainer),
        **({"corpora": trainer.given_in_all} if isinstance(trainer, MixtureTrainer) else {}),
        "example_source": sources[0],
        "example_translation": translations[0],
    }
    if languages:
        metrics["example_language"] = languages["tgt_lang"][0]
    return metrics, list(zip(sources, translations, references, strict=True))[:SHOWN]


def final_checkpoint(args: TrainingArguments, state: TrainerState) -> str:
    """Says which checkpoint `load_best_model_at_end` has made the final model, with its metric."""
    metric = args.deciding_metric
    scores = {entry["step"]: value for entry in state.log_history if (value := entry.get(f"eval_{metric}")) is not None}
    if state.best_model_checkpoint is None:
        return f"the final model is that of the last update: no checkpoint was chosen by {metric}"
    best, evaluations = state.best_global_step, counted(len(scores), "evaluation")
    chosen = f"the final model is {Path(state.best_model_checkpoint).name}, with {metric} {state.best_metric:.4g}"
    if len(scores) > 1 and len(set(scores.values())) == 1:
        return (
            f"{chosen}: it is the first of {evaluations}, and all had this {metric}. The model may need more updates; "
            "metric_for_best_model: loss chooses by the loss"
        )
    if len(scores) > 1 and best == min(scores):
        return f"{chosen}: it is the first of {evaluations}, and {metric} never improved after it"
    return f"{chosen}, the best of {evaluations}"


def training_summary(trainer: TranslationTrainer) -> dict[str, Any]:
    """Duration and progress of the run."""
    history = trainer.state.log_history
    minutes = [entry["minutes"] for entry in history if "minutes" in entry]
    return {
        "updates": trainer.state.global_step,
        # The Trainer counts the whole run of a stream as one epoch, however often the data was read.
        "epochs": round(trainer.state.epoch or 0, 2) if trainer.stream is None else None,
        "minutes": max(minutes, default=0.0),
        "machine": machine(),
        "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name or None,
        "best_validation": trainer.state.best_metric,
        "final_loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
    }


def languages_of(tokenizer: Any) -> tuple[list[str], list[str]]:
    """The source and the target languages of a tokenizer that has several."""
    return tokenizer.source_languages, tokenizer.languages


def write_documents(
    recipe: Recipe, trainer: TranslationTrainer, model: PreTrainedModel, metrics: dict[str, Any]
) -> None:
    """Writes metrics.json, the loss curve and the model card into the run's folder."""
    folder, given = Path(recipe.training.output_dir), public(recipe.given)
    write_beside(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    metric = (recipe.training.metric_for_best_model or "bleu").removeprefix("eval_")
    draw_loss_curve(trainer.state.log_history, metric, folder / "loss_curve.png")
    tokenizer = trainer.processing_class
    names = {
        "hub_model_id": recipe.training.hub_model_id,
        "base_model": given.get("model"),
        "tokens": kind_of_tokens(tokenizer),
    }
    languages = languages_of(tokenizer) if multilingual(tokenizer) else recipe.data.direction
    card = model_card(model, languages, metrics, lasting(given), str(folder), **names)
    write_beside(folder / "README.md", str(card))

"""Trains a model by a recipe: `python -m vanilla_transformer.training.train RECIPE.yaml [--field value ...]`.

With several processes: `accelerate launch -m vanilla_transformer.training.train RECIPE.yaml ...`. The run's folder
then holds the best model with its tokenizer, metrics.json, loss_curve.png, recipe.yaml and a model card.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import yaml
from datasets import DatasetDict
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from vanilla_transformer import (
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
    train_tokenizer,
)

from .arguments import Recipe, RecipeError, TrainingArguments, parse_recipe, run_program
from .data import DataError, language_pair, load_pairs, tokenize_pairs, training_texts
from .evaluate import format_scores, score_texts, translate
from .report import draw_loss_curve, machine, model_card, write_beside
from .trainer import TranslationTrainer, callbacks, load_average, score_translations


logger = logging.getLogger(__name__)

# Translations shown at the end of a run.
SHOWN = 5


def main(argv: list[str]) -> None:
    """Trains, scores and documents one model."""
    # 1. what to do
    recipe = parse_recipe(argv)
    args = recipe.training
    logging.basicConfig(format="%(message)s", level=logging.INFO if args.should_log else logging.ERROR)
    checkpoint = checkpoint_to_resume(args)
    set_seed(args.seed)

    # 2. data and vocabulary
    with args.main_process_first(desc="loading data"):
        pairs = load_pairs(recipe.data)
        if "train" not in pairs:
            raise DataError("no training data: name it by train_file, or choose a dataset with a train split")
        tokenizer = prepare_tokenizer(recipe, pairs)
    rows = {split: tokenize_pairs(pairs[split], tokenizer, recipe.data, split) for split in pairs if split != "test"}

    # 3. the network
    model = build_model(recipe, tokenizer)
    logger.info(
        "%d parameters, %d subwords, %d training pairs", model.num_parameters(), len(tokenizer), len(rows["train"])
    )

    # 4. training
    trainer = build_trainer(recipe, model, tokenizer, rows)
    trainer.train(resume_from_checkpoint=checkpoint)
    if args.average_checkpoints:
        load_average(model, args.output_dir, args.average_checkpoints)
    trainer.save_model()

    # 5. what the model can do, in figures and words
    if trainer.is_world_process_zero():
        finish(recipe, trainer, pairs)


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """
    The checkpoint that the arguments ask for, "last" being the newest in the run's folder.

    Raises:
        RecipeError: there is none, or the run's folder holds another run that would be overwritten.
    """
    if args.resume_from_checkpoint is None:
        if args.process_index == 0 and Path(args.output_dir, "recipe.yaml").exists():
            raise RecipeError(
                f"output_dir={args.output_dir} already holds a run: continue it by --resume_from_checkpoint last, "
                "or choose another output_dir"
            )
        return None
    if args.resume_from_checkpoint != "last":
        if not Path(args.resume_from_checkpoint, "trainer_state.json").exists():
            raise RecipeError(f"resume_from_checkpoint={args.resume_from_checkpoint} is not a checkpoint's folder")
        return args.resume_from_checkpoint
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if last is None:
        raise RecipeError(f"output_dir={args.output_dir} holds no checkpoint to resume from")
    return last


def prepare_tokenizer(recipe: Recipe, pairs: DatasetDict) -> PreTrainedTokenizerBase:
    """The tokenizer of the run: the one that is named, the one in the run's folder, or one that is learned now."""
    folder = Path(recipe.training.output_dir)
    if (folder / "recipe.yaml").exists():
        return AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(recipe) if recipe.tokenizer.tokenizer else learn_tokenizer(recipe, pairs)
    tokenizer.save_pretrained(folder)
    # Last: it is what marks the folder as a run's.
    write_beside(folder / "recipe.yaml", resolved(recipe))
    return tokenizer


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe names."""
    try:
        return AutoTokenizer.from_pretrained(recipe.tokenizer.tokenizer)
    except (OSError, ValueError) as error:
        raise RecipeError(f"tokenizer={recipe.tokenizer.tokenizer} cannot be loaded: {error}") from error


def learn_tokenizer(recipe: Recipe, pairs: DatasetDict) -> PreTrainedTokenizerBase:
    """A joint vocabulary of the training split."""
    args = recipe.tokenizer
    logger.info("learning %d subwords from %d pairs", args.vocab_size, len(pairs["train"]))
    try:
        return train_tokenizer(training_texts(pairs["train"]), args.vocab_size, args.tokenizer_model, args.pretokenized)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML that repeats the run, with what the command line changed."""
    given = {name: value for name, value in recipe.given.items() if name != "resume_from_checkpoint"}
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> VanillaTransformerForConditionalGeneration:
    """A new model of the recipe's sizes, with the tokenizer's ids and the recipe's way to decode."""
    config = VanillaTransformerConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        attn_implementation=recipe.model.attn_implementation,
        **recipe.model.config_fields(),
    )
    model = VanillaTransformerForConditionalGeneration(config)
    model.generation_config.update(
        num_beams=recipe.decoding.num_beams,
        length_penalty=recipe.decoding.length_penalty,
        max_new_tokens=recipe.decoding.max_new_tokens,
    )
    return model


def build_trainer(
    recipe: Recipe,
    model: VanillaTransformerForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict,
) -> TranslationTrainer:
    """The Trainer of the run, with the paper's peak learning rate where the recipe names none."""
    args = recipe.training
    if args.learning_rate is None:
        args.learning_rate = (model.config.d_model * args.warmup_steps) ** -0.5
    return TranslationTrainer(
        model=model,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=score_translations(tokenizer, recipe.decoding.bleu_tokenize),
        callbacks=callbacks(args),
    )


def finish(recipe: Recipe, trainer: TranslationTrainer, pairs: DatasetDict) -> None:
    """Scores the model on held-out text, prints some of it, and writes the run's documents."""
    folder, model, tokenizer = Path(recipe.training.output_dir), trainer.model.eval(), trainer.processing_class
    # The Trainer's pickle of its arguments: recipe.yaml says the same, and a model's folder should hold no pickle.
    (folder / "training_args.bin").unlink(missing_ok=True)
    split = next(name for name in ("test", "validation", "train") if name in pairs)
    sources, references = list(pairs[split]["source"]), list(pairs[split]["target"])
    translations = translate(model, tokenizer, sources, recipe.training.per_device_eval_batch_size)
    scores = score_texts(translations, references, recipe.decoding.bleu_tokenize)
    metrics: dict[str, Any] = {
        "scored_split": split,
        "scores": scores,
        "rows": {name: len(rows) for name, rows in pairs.items()},
        "training": training_summary(trainer),
        "example_source": sources[0],
        "example_translation": translations[0],
    }
    write_beside(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    metric = (recipe.training.metric_for_best_model or "bleu").removeprefix("eval_")
    draw_loss_curve(trainer.state.log_history, metric, folder / "loss_curve.png")
    files = ", ".join(Path(path).name for path in recipe.data.train_file or [])
    data_name = recipe.data.data_name or recipe.data.dataset or files
    # Anew, because a run that resumes may have been told otherwise.
    write_beside(folder / "recipe.yaml", resolved(recipe))
    card = model_card(model, language_pair(recipe.data), data_name, metrics, resolved(recipe), str(folder))
    write_beside(folder / "README.md", str(card))
    print(f"\n{split} set, {len(sources)} pairs\n{format_scores(scores)}\n")
    for source, translation, reference in list(zip(sources, translations, references, strict=True))[:SHOWN]:
        verdict = "" if translation == reference else f"   (reference: {reference})"
        print(f"  {source}  ->  {translation}{verdict}")
    print(f"\nThe model, its scores, loss curve and card are in {folder}")


def training_summary(trainer: TranslationTrainer) -> dict[str, Any]:
    """How long the run took and how far it came."""
    history = trainer.state.log_history
    minutes = [entry["minutes"] for entry in history if "minutes" in entry]
    return {
        "updates": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0, 2),
        "minutes": max(minutes, default=0.0),
        "machine": machine(),
        "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name or None,
        "best_validation": trainer.state.best_metric,
        "final_loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
    }


if __name__ == "__main__":
    run_program(main, sys.argv[1:])

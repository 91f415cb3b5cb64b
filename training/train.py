"""Trains a model by a recipe: `vanilla-transformer train RECIPE.yaml [--field value ...]`.

With several processes: `accelerate launch -m vanilla_transformer_commands train RECIPE.yaml ...`. The run's folder
then holds the best model with its tokenizer, metrics.json, loss_curve.png, recipe.yaml and a model card.
"""

import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from vanilla_transformer import (
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
    train_tokenizer,
)

from .arguments import Recipe, TrainingArguments, parse_recipe, recipe_parser
from .averaging import last_checkpoints, load_average
from .bpe_dropout import BpeDropout, BpeDropoutRows
from .checkpointing import damage, newest_checkpoint, settle
from .data import DataError, hold_out, language_pair, load_pairs, tokenize_pairs, training_texts
from .errors import RecipeError
from .evaluate import format_scores, load_model, load_tokenizer, read_model, score_texts, translate
from .filters import FilterReport
from .hub import HubError, public
from .machine import machine
from .memory import hold_memory
from .options import as_yaml
from .preflight import Run, check_inputs, check_plan, rehearse, require
from .program import run_program
from .report import draw_loss_curve, model_card, refusing, write_beside
from .resuming import refuse_changes, refuse_model_alone
from .streaming import VOCABULARY_ROWS, StreamedBatches, open_stream
from .trainer import TranslationTrainer, callbacks, score_translations


logger = logging.getLogger(__name__)

# The options of this command.
build_parser = recipe_parser
# Translations shown at the end of a run.
SHOWN = 5
# What a run may change of a model that it trains further: the rest is what the weights were made for.
CHANGEABLE = ("dropout", "attention_dropout", "activation_dropout", "label_smoothing")


def main(argv: list[str]) -> None:
    """Trains, scores and documents one model."""
    # 1. what to do
    recipe = parse_recipe(argv)
    args = recipe.training
    logging.basicConfig(format="%(message)s", level=logging.INFO if args.should_log else logging.ERROR)
    # Every request to the Hub is a line of it.
    logging.getLogger("httpx2").setLevel(logging.WARNING)

    # 2. data, vocabulary and network
    run = prepare(recipe)
    if args.check:
        rehearse(run, build_trainer)
        return
    require(check_inputs(run))

    # 3. training, where nothing speaks against it
    trainer = build_trainer(recipe, run.model, run.tokenizer, run.rows)
    require(check_plan(run, trainer))
    trainer.data = run.data
    trainer.add_callback(RecipeWriter(recipe))
    trainer.train(resume_from_checkpoint=run.checkpoint)
    if args.lora_rank:
        from .adapters import merge_adapters

        merge_adapters(trainer)
    trainer.save_model()

    # 4. what the model can do, in figures and words: one process alone, from the saved files, since a model that is
    # sharded answers only when all processes ask
    if trainer.is_world_process_zero():
        finish(recipe, trainer, saved_model(args), run.pairs)
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare(recipe: Recipe) -> Run:
    """
    Everything that a run needs before it trains. Of the run's folder nothing is changed that was there, but that
    unfinished and torn checkpoints are put away.

    Raises:
        UserError: what the recipe asks for is not there, or cannot be.
    """
    args = recipe.training
    refuse_changes(recipe)
    checkpoint = checkpoint_to_resume(args)
    if not args.check:
        make_folder(args)
    set_seed(args.seed)
    if args.use_cpu and args.hold_memory and hold_memory():
        logger.info("freed memory is kept for the next update: faster, in a larger process (--hold_memory false)")
    pairs, tokenizer, rows = prepare_data(recipe)
    model = build_model(recipe, tokenizer)
    logger.info(
        "%d parameters, %d subwords, %s",
        *(model.num_parameters(), len(tokenizer)),
        "training pairs from a stream" if recipe.data.streaming else f"{len(rows['train'])} training pairs",
    )
    return Run(recipe, pairs, rows, tokenizer, model, checkpoint)


class RecipeWriter(TrainerCallback):
    """Marks the folder as a run's, by its recipe, when all that could speak against the run has been looked at."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def on_train_begin(self, args, state, control, **kwargs):
        """The checkpoint has been loaded, if there is one, and the first update comes."""
        if state.is_world_process_zero:
            write_beside(Path(args.output_dir, "recipe.yaml"), lasting(self.recipe.given))


def saved_model(args: TrainingArguments) -> PreTrainedModel:
    """What the run has saved; where it is to end with the mean of its last checkpoints, that, in its place."""
    model, _ = load_model(args.output_dir)
    if args.average_checkpoints:
        load_average(model, last_checkpoints(args.output_dir, args.average_checkpoints))
        model.save_pretrained(args.output_dir)
    return model


def make_folder(args: TrainingArguments) -> None:
    """
    Makes sure of a place for what the run will write.

    Raises:
        RecipeError: there can be none.
    """
    with refusing("output_dir", args.output_dir, RecipeError):
        os.makedirs(args.output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir):
            pass


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """
    The checkpoint that the arguments ask for, "last" being the newest whole one in the run's folder. None begins a run,
    or begins it again if it was ended before its first checkpoint.

    Raises:
        RecipeError: there is none, or the run's folder holds another run that would be overwritten.
        CheckpointError: none is whole.
    """
    run, asked = Path(args.output_dir), args.resume_from_checkpoint
    begun = (run / "recipe.yaml").exists()
    if asked is None:
        if args.process_index == 0 and begun:
            raise RecipeError(
                f"output_dir={run} already holds a run: continue it by --resume_from_checkpoint last, or choose "
                "another output_dir"
            )
        return None
    if asked != "last":
        if wrong := damage(Path(asked)):
            raise RecipeError(f"resume_from_checkpoint={asked} is not a whole checkpoint: {wrong}")
        refuse_model_alone(Path(asked))
        return asked
    with args.main_process_first(local=args.save_on_each_node, desc="looking for a checkpoint"):
        if args.should_save and not args.check:
            settle(run)
    last = newest_checkpoint(run)
    if last is None and not begun:
        raise RecipeError(f"output_dir={run} holds no checkpoint to resume from")
    if last is None:
        logger.warning("output_dir=%s holds no checkpoint yet: the run begins again", run)
        return None
    refuse_model_alone(last)
    return str(last)


def prepare_data(recipe: Recipe) -> tuple[DatasetDict, PreTrainedTokenizerBase, dict[str, Any]]:
    """
    The text of all splits, the tokenizer, and the ids of the splits that are trained on and evaluated.

    Raises:
        UserError: the data or the tokenizer cannot be used.
    """
    args, report = recipe.training, FilterReport()
    # One process of all machines, not of each: they share the run's folder.
    with args.main_process_first(local=False, desc="loading data"):
        pairs = load_pairs(recipe.data, report)
        if recipe.data.streaming:
            pairs["train"] = open_stream(recipe.data)
        if "train" not in pairs:
            raise DataError("no training data: name it by train_file, or choose a dataset with a train split")
        tokenizer = prepare_tokenizer(recipe, pairs)
    before = report.numbers
    splits = [split for split in pairs if split != "test"]
    rows = {split: prepare_rows(recipe, pairs[split], tokenizer, split, report) for split in splits}
    if args.eval_strategy != "no" and "validation" not in pairs and not recipe.data.streaming:
        assert before is not None
        assert report.numbers is not None
        hold_out(pairs, rows, np.searchsorted(before, report.numbers))
    return pairs, tokenizer, rows


def prepare_tokenizer(recipe: Recipe, pairs: DatasetDict) -> PreTrainedTokenizerBase:
    """
    The tokenizer of the run: the one in its folder, the one that is named, or one that is learned now by the first
    process, from whom the others have it.
    """
    folder, check = Path(recipe.training.output_dir), recipe.training.check
    if (folder / "recipe.yaml").exists() or (recipe.training.process_index > 0 and not check):
        return load_tokenizer(str(folder))
    named = recipe.tokenizer.tokenizer
    tokenizer = load_tokenizer(named) if named else learn_tokenizer(recipe, pairs)
    if recipe.data.bpe_dropout:
        BpeDropout(tokenizer, recipe.data.bpe_dropout)  # refuses a tokenizer of another kind, before the run begins
    if not check:
        tokenizer.save_pretrained(folder)
    return tokenizer


def learn_tokenizer(recipe: Recipe, pairs: DatasetDict) -> PreTrainedTokenizerBase:
    """A joint vocabulary of the training split, or of the first rows of a stream."""
    args, train = recipe.tokenizer, pairs["train"]
    if recipe.data.streaming:
        train = train.take(VOCABULARY_ROWS)
        logger.info("learning %d subwords from at most %d pairs", args.vocab_size, VOCABULARY_ROWS)
    else:
        logger.info("learning %d subwords from %d pairs", args.vocab_size, len(train))
    try:
        return train_tokenizer(training_texts(train), args.vocab_size, args.tokenizer_model, args.pretokenized)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def lasting(given: dict[str, Any]) -> str:
    """A recipe that repeats the run, with what the command line changed, as YAML."""
    return as_yaml({name: value for name, value in given.items() if name != "resume_from_checkpoint"})


def prepare_rows(
    recipe: Recipe,
    pairs: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    report: FilterReport,
) -> Dataset | StreamedBatches:
    """The ids of a split; of a stream, the batches that this process trains on."""
    if isinstance(pairs, Dataset):
        return tokenize_pairs(pairs, tokenizer, recipe.data, split, report)
    args = recipe.training
    return StreamedBatches(
        pairs,
        tokenizer,
        recipe.data,
        args.per_device_train_batch_tokens,
        length=args.max_steps * args.gradient_accumulation_steps,
        seed=args.seed if args.data_seed is None else args.data_seed,
        num_processes=args.world_size,
        process_index=args.process_index,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> VanillaTransformerForConditionalGeneration:
    """The recipe's model, a new one of its sizes unless it names one, with its way to decode."""
    named = recipe.model.model
    model = read_named_model(recipe, named) if named else new_model(recipe, tokenizer)
    try:
        model.generation_config.update(
            num_beams=recipe.decoding.num_beams,
            length_penalty=recipe.decoding.length_penalty,
            max_new_tokens=recipe.decoding.max_new_tokens,
        )
    except ValueError as error:
        raise RecipeError(f"no translations can be made so: {error}") from error
    if not (rank := recipe.training.lora_rank):
        return model
    from .adapters import add_adapters  # peft takes its time, and most runs need none of it

    return add_adapters(model, rank)


def read_named_model(recipe: Recipe, folder: str) -> VanillaTransformerForConditionalGeneration:
    """
    The model that the recipe trains further, in float32, with the recipe's dropout and label smoothing.

    Raises:
        RecipeError: the recipe asks for another network than the model is.
    """
    given = recipe.model.config_fields()
    changed = {name: given.pop(name) for name in CHANGEABLE if name in given}
    try:
        model, _ = read_model(folder, dtype=torch.float32, attn_implementation=attention(recipe), **changed)
    except ImportError as error:
        raise unusable_attention(recipe, error) from error
    for name, value in given.items():
        if (its := getattr(model.config, name)) != value:
            raise RecipeError(f"{name}={value}, but model={folder} has {name}={its}: leave it out")
    return model


def attention(recipe: Recipe) -> str | None:
    """For sentences the plain attention is the fastest one on a CPU, where sdpa's backward in bfloat16 crawls."""
    return recipe.model.attn_implementation or ("eager" if recipe.training.use_cpu else None)


def unusable_attention(recipe: Recipe, error: Exception) -> RecipeError:
    """What transformers has against the recipe's attention, unknown or without its package."""
    said = " ".join(str(error).split())
    return RecipeError(f"attn_implementation={recipe.model.attn_implementation} cannot be used here: {said}")


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> VanillaTransformerForConditionalGeneration:
    """A model of the recipe's sizes, with the tokenizer's ids."""
    # A tokenizer of T5's kind has no bos. The decoder then starts with padding, as T5's and Marian's do.
    start = tokenizer.pad_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    config = VanillaTransformerConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=start,
        attn_implementation=attention(recipe),
        **recipe.model.config_fields(),
    )
    try:
        return VanillaTransformerForConditionalGeneration(config)
    except (ImportError, ValueError) as error:
        raise unusable_attention(recipe, error) from error


def with_bpe_dropout(recipe: Recipe, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> BpeDropoutRows:
    """The training rows, cut anew in each epoch."""
    args = recipe.training
    seed = args.data_seed if args.data_seed is not None else args.seed
    anew = BpeDropoutRows(rows, tokenizer, recipe.data, seed)
    longer = 100 * (anew.growth() - 1)
    logger.info("BPE-dropout %g lengthens rows by %.0f %% on a sample", recipe.data.bpe_dropout, longer)
    return anew


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
    train = with_bpe_dropout(recipe, rows["train"], tokenizer) if recipe.data.bpe_dropout else rows["train"]
    return TranslationTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=rows.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=score_translations(tokenizer, recipe.decoding.bleu_tokenize)
        if args.predict_with_generate
        else None,
        callbacks=callbacks(args),
    )


def finish(recipe: Recipe, trainer: TranslationTrainer, model: PreTrainedModel, pairs: DatasetDict) -> None:
    """Scores the model on held-out text, prints some of it, and writes the run's documents."""
    folder, tokenizer = Path(recipe.training.output_dir), trainer.processing_class
    # The Trainer's pickle of its arguments: recipe.yaml says the same, and a model's folder should hold no pickle.
    (folder / "training_args.bin").unlink(missing_ok=True)
    split = next(name for name in ("test", "validation", "train") if name in pairs)
    sources, references = list(pairs[split]["source"]), list(pairs[split]["target"])
    translations = translate(model, tokenizer, sources, recipe.training.per_device_eval_batch_tokens)
    scores = score_texts(translations, references, recipe.decoding.bleu_tokenize)
    told = public(recipe.given)
    metrics: dict[str, Any] = {
        "scored_split": split,
        "scores": scores,
        "num_beams": model.generation_config.num_beams,
        "parameters": model.num_parameters(),
        "data_name": recipe.data.data_name or told.get("dataset") or ", ".join(told.get("train_file", [])),
        "rows": {name: len(rows) for name, rows in pairs.items() if isinstance(rows, Dataset)},
        "training": training_summary(trainer),
        "example_source": sources[0],
        "example_translation": translations[0],
    }
    write_beside(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    metric = (recipe.training.metric_for_best_model or "bleu").removeprefix("eval_")
    draw_loss_curve(trainer.state.log_history, metric, folder / "loss_curve.png")
    names = {"hub_model_id": recipe.training.hub_model_id, "base_model": told.get("model")}
    card = model_card(model, language_pair(recipe.data), metrics, lasting(told), str(folder), **names)
    write_beside(folder / "README.md", str(card))
    print(f"\n{split} set, {len(sources)} pairs\n{format_scores(scores)}\n")
    for source, translation, reference in list(zip(sources, translations, references, strict=True))[:SHOWN]:
        verdict = "" if translation == reference else f"   (reference: {reference})"
        print(f"  {source}  ->  {translation}{verdict}")
    print(f"\nThe model, its scores, loss curve and card are in {folder}")
    if recipe.training.push_to_hub:
        publish(trainer)


def publish(trainer: TranslationTrainer) -> None:
    """
    Pushes the finished run.

    Raises:
        HubError: it could not be pushed; the run's folder is whole.
    """
    folder = trainer.args.output_dir
    try:
        pushed = trainer.push_to_hub()
    except HubError as error:
        later = f"vanilla-transformer push {folder} {trainer.hub_model_id}"
        raise HubError(f"{error}. The run itself is whole in {folder}; `{later}` pushes it") from error
    print(f"and at {pushed.repo_url}, revision {pushed.oid}")


def training_summary(trainer: TranslationTrainer) -> dict[str, Any]:
    """How long the run took and how far it came."""
    history = trainer.state.log_history
    minutes = [entry["minutes"] for entry in history if "minutes" in entry]
    return {
        "updates": trainer.state.global_step,
        # To the Trainer the whole run of a stream is one epoch, however often the data was read.
        "epochs": None if isinstance(trainer.train_dataset, StreamedBatches) else round(trainer.state.epoch or 0, 2),
        "minutes": max(minutes, default=0.0),
        "machine": machine(),
        "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name or None,
        "best_validation": trainer.state.best_metric,
        "final_loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
    }


if __name__ == "__main__":
    run_program(main, sys.argv[1:])

"""Trains a model from a recipe: `vanilla-transformer train RECIPE.yaml [--field value ...]`.

With several processes: `accelerate launch -m vanilla_transformer_commands train RECIPE.yaml ...`. Afterwards the run's
folder holds the best model with its tokenizer, metrics.json, loss_curve.png, recipe.yaml and a model card.
"""

import logging
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import DatasetDict
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer import TRAINING_ARGS_NAME

from vanilla_transformer import VanillaTransformerForConditionalGeneration
from vanilla_transformer.tokenization_units import kind_of_tokens

from .checks.inputs import check_inputs
from .checks.plan import check_plan
from .checks.prepared import Run
from .checks.rehearsal import rehearse
from .data.rows import prepare_data, training_rows
from .errors import RecipeError
from .files import make_folder, put_in_place
from .findings import require
from .loop.averaging import last_checkpoints, load_average
from .loop.callbacks import RecipeWriter, callbacks
from .loop.memory import hold_memory
from .loop.network import build_model
from .loop.resuming import checkpoint_to_resume, refuse_changes
from .loop.stages import MixtureTrainer
from .loop.trainer import TranslationTrainer, score_translations
from .metrics import format_scores
from .model_names import find_model
from .program import run_program
from .publishing.hub import HubError
from .results import final_checkpoint, score_run, write_documents
from .saved_model import load_model
from .scores import format_groups
from .settings.arguments import TrainingArguments
from .settings.recipe import Recipe, parse_recipe, recipe_parser
from .words import counted


logger = logging.getLogger(__name__)

# The options of this command.
build_parser = recipe_parser


def main(argv: list[str]) -> None:
    """Trains, scores and documents one model."""
    # 1. what to do
    recipe = parse_recipe(argv)
    args = recipe.training
    logging.basicConfig(format="%(message)s", level=logging.INFO if args.should_log else logging.ERROR)
    # It logs every request to the Hub.
    logging.getLogger("httpx2").setLevel(logging.WARNING)

    # 2. data, vocabulary and network
    run = prepare(recipe)
    if args.check:
        rehearse(run, build_trainer)
        return
    require(check_inputs(run))

    # 3. training, if all checks pass
    trainer = build_trainer(recipe, run.model, run.tokenizer, run.rows)
    require(check_plan(run, trainer))
    trainer.data = run.data
    trainer.add_callback(RecipeWriter(recipe))
    trainer.train(resume_from_checkpoint=run.checkpoint)
    if args.load_best_model_at_end:
        logger.info("%s", final_checkpoint(args, trainer.state))
    if args.lora_rank:
        from .loop.adapters import merge_adapters

        merge_adapters(trainer)
    trainer.save_model()

    # 4. scores and documents: by one process, from the saved files, since a sharded model runs only in all processes
    if trainer.is_world_process_zero():
        finish(recipe, trainer, final_model(args), run.pairs)


def prepare(recipe: Recipe) -> Run:
    """
    Prepares everything that a run needs before it trains. In an existing run's folder it only deletes unfinished
    checkpoints and renames damaged ones.

    Raises:
        UserError: what the recipe asks for is missing or impossible.
    """
    args = recipe.training
    if recipe.model.model:
        find_model(recipe.model.model, field="model=")
    refuse_changes(recipe)
    checkpoint = checkpoint_to_resume(args)
    if not args.check:
        make_folder("output_dir", args.output_dir, RecipeError)
    set_seed(args.seed)
    if args.use_cpu and args.hold_memory and hold_memory():
        logger.info("freed memory is kept: training is faster and uses more memory (--hold_memory false turns it off)")
    pairs, tokenizer, rows = prepare_data(recipe)
    model = build_model(recipe, tokenizer)
    logger.info(
        "%d parameters, %d %s, %s",
        *(model.num_parameters(), len(tokenizer), kind_of_tokens(tokenizer)),
        "training pairs from a stream" if recipe.data.streaming else counted(len(rows["train"]), "training pair"),
    )
    return Run(recipe, pairs, rows, tokenizer, model, checkpoint)


def build_trainer(
    recipe: Recipe,
    model: VanillaTransformerForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict,
) -> TranslationTrainer:
    """The run's Trainer, with the paper's peak learning rate if the recipe sets none."""
    args = recipe.training
    if args.learning_rate is None:
        args.learning_rate = (model.config.d_model * args.warmup_steps) ** -0.5
    options = {
        "model": model,
        "args": args,
        "eval_dataset": rows.get("validation"),
        "processing_class": tokenizer,
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
        "compute_metrics": score_translations(tokenizer, recipe.decoding.bleu_tokenize, recipe.decoding.metrics)
        if args.predict_with_generate
        else None,
        "callbacks": callbacks(args),
    }
    stages = training_rows(recipe, rows["train"], tokenizer)
    if recipe.mixture.corpora is None:
        return TranslationTrainer(train_dataset=stages[0], **options)
    names = [corpus.name for corpus in recipe.corpora]
    return MixtureTrainer(names=names, stages=recipe.stages, stage_rows=stages, **options)


def final_model(args: TrainingArguments) -> PreTrainedModel:
    """The model that the run has saved. With `average_checkpoints` it is replaced by the last checkpoints' mean."""
    model, _ = load_model(args.output_dir)
    if args.average_checkpoints:
        load_average(model, last_checkpoints(args.output_dir, args.average_checkpoints))
        # Beside what is there, then in its place: a crash leaves one model or the other.
        with TemporaryDirectory(dir=args.output_dir) as folder:
            model.save_pretrained(folder)
            for path in Path(folder).iterdir():
                put_in_place(path, Path(args.output_dir, path.name))
    return model


def finish(recipe: Recipe, trainer: TranslationTrainer, model: PreTrainedModel, pairs: DatasetDict) -> None:
    """Scores the model on held-out text, writes the run's documents, prints scores and examples, and pushes the run."""
    # The Trainer's pickle of its arguments: recipe.yaml says the same, and a model's folder should hold no pickle.
    Path(recipe.training.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)
    metrics, examples = score_run(recipe, trainer, model, pairs)
    write_documents(recipe, trainer, model, metrics)
    split, scores = metrics["scored_split"], metrics["scores"]
    print(f"\n{split} set, {counted(len(pairs[split]), 'pair')}\n{format_scores(scores, metrics.get('confidence'))}\n")
    if "groups" in metrics:
        print(f"{format_groups(metrics['groups'])}\n")
    for source, translation, reference in examples:
        verdict = "" if translation == reference else f"   (reference: {reference})"
        print(f"  {source}  ->  {translation}{verdict}")
    print(f"\nThe model, its scores, loss curve and card are in {recipe.training.output_dir}")
    if recipe.training.push_to_hub:
        publish(trainer)


def publish(trainer: TranslationTrainer) -> None:
    """
    Pushes the finished run.

    Raises:
        HubError: the push failed; the run's folder is complete.
    """
    folder = trainer.args.output_dir
    try:
        pushed = trainer.push_to_hub()
    except HubError as error:
        later = f"vanilla-transformer push {folder} {trainer.hub_model_id}"
        raise HubError(f"{error}. The run itself is complete in {folder}; `{later}` pushes it") from error
    print(f"and at {pushed.repo_url}, revision {pushed.oid}")


if __name__ == "__main__":
    run_program(main, sys.argv[1:])

"""The rows that a run trains on: its text, its vocabulary, and the ids of one by the other."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedTokenizerBase

from vanilla_transformer import train_tokenizer, train_unit_tokenizer

from ..errors import DataError, RecipeError
from ..saved_model import load_tokenizer
from ..settings.arguments import TokenizerArguments
from ..settings.recipe import Recipe
from .bpe_dropout import BpeDropout, BpeDropoutRows
from .filters import FilterReport
from .pairs import hold_out, load_pairs, tokenize_pairs, training_pairs, training_texts
from .streaming import VOCABULARY_ROWS, StreamedBatches, open_stream


logger = logging.getLogger(__name__)


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
        tokenizer = prepare_tokenizer(recipe, training_split(pairs))
    before = report.numbers
    splits = [split for split in pairs if split != "test"]
    rows = {split: prepare_rows(recipe, pairs[split], tokenizer, split, report) for split in splits}
    if args.eval_strategy != "no" and "validation" not in pairs and not recipe.data.streaming:
        assert before is not None
        assert report.numbers is not None
        hold_out(pairs, rows, np.searchsorted(before, report.numbers))
    return pairs, tokenizer, rows


def training_split(pairs: DatasetDict) -> Dataset | IterableDataset:
    """
    The training split.

    Raises:
        DataError: there is none.
    """
    if "train" not in pairs:
        raise DataError("no training data: name it by train_file, or choose a dataset with a train split")
    return pairs["train"]


def prepare_tokenizer(recipe: Recipe, train: Dataset | IterableDataset) -> PreTrainedTokenizerBase:
    """
    The tokenizer of the run: the one in its folder, the one that the recipe names, or a new one. The first process
    learns it, and the others load it from the folder.
    """
    folder, check = Path(recipe.training.output_dir), recipe.training.check
    if (folder / "recipe.yaml").exists() or (recipe.training.process_index > 0 and not check):
        return load_tokenizer(str(folder))
    named = recipe.tokenizer.tokenizer
    tokenizer = load_tokenizer(named) if named else learn_tokenizer(recipe.tokenizer, train)
    if recipe.data.bpe_dropout:
        BpeDropout(tokenizer, recipe.data.bpe_dropout)  # refuses a tokenizer of another kind, before the run begins
    if not check:
        tokenizer.save_pretrained(folder)
    return tokenizer


def learn_tokenizer(args: TokenizerArguments, train: Dataset | IterableDataset) -> PreTrainedTokenizerBase:
    """
    A joint vocabulary of the training split, or of the first rows of a stream.

    Raises:
        RecipeError: no such vocabulary can be learned.
    """
    if isinstance(train, IterableDataset):
        train = train.take(VOCABULARY_ROWS)
        count = f"at most {VOCABULARY_ROWS}"
    else:
        count = str(len(train))
    try:
        if args.units:
            logger.info("learning a vocabulary of units from %s pairs: source %s, target %s", count, *args.units)
            return train_unit_tokenizer(training_pairs(train), args.vocab_size, *args.units)
        logger.info("learning %d subwords from %s pairs", args.vocab_size, count)
        return train_tokenizer(training_texts(train), args.vocab_size, args.tokenizer_model, args.pretokenized)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def prepare_rows(
    recipe: Recipe,
    pairs: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    report: FilterReport,
) -> Dataset | StreamedBatches:
    """The ids of a split; for a stream, the batches that this process trains on."""
    if isinstance(pairs, Dataset):
        return tokenize_pairs(pairs, tokenizer, recipe.data, split, report)
    args = recipe.training
    return StreamedBatches(
        pairs,
        tokenizer,
        recipe.data,
        args.per_device_train_batch_tokens,
        length=args.max_steps * args.gradient_accumulation_steps,
        seed=args.seed_of_data,
        num_processes=args.world_size,
        process_index=args.process_index,
    )


def with_bpe_dropout(recipe: Recipe, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> BpeDropoutRows:
    """The training rows, cut anew in each epoch."""
    anew = BpeDropoutRows(rows, tokenizer, recipe.data, recipe.training.seed_of_data)
    longer = 100 * (anew.growth() - 1)
    logger.info("BPE-dropout %g lengthens rows by %.0f %% on a sample", recipe.data.bpe_dropout, longer)
    return anew

"""Prepares the data of a run: its text, its vocabulary, and the text as rows of token ids."""

import dataclasses
import logging
from collections.abc import Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedTokenizerBase

from vanilla_transformer import train_tokenizer, train_unit_tokenizer

from ..errors import DataError, RecipeError, UserError
from ..saved_model import load_tokenizer
from ..settings.arguments import DataArguments, TokenizerArguments
from ..settings.corpora import Corpus
from ..settings.recipe import Recipe
from .bpe_dropout import BpeDropout, BpeDropoutRows
from .corpora import (
    join_streams,
    join_texts,
    load_corpora,
    load_held_out,
    open_corpus,
    tokenize_corpora,
    tokenize_corpus,
)
from .epochs import EpochRows
from .filters import FilterReport
from .languages import (
    add_languages,
    add_tags,
    balanced_texts,
    count_directions,
    has_languages,
    name_directions,
    refuse_unknown_languages,
    set_direction,
)
from .mixture import MixedRows, weights_by_size
from .pairs import SIDES, hold_out, load_pairs, tokenize_pairs, training_pairs, training_texts
from .streamed_mixture import MixedBatches
from .streaming import VOCABULARY_ROWS, StreamedBatches
from .transformed_rows import TransformedRows


logger = logging.getLogger(__name__)


def prepare_data(recipe: Recipe) -> tuple[DatasetDict, PreTrainedTokenizerBase, dict[str, Any]]:
    """
    Loads the text of all splits, learns or loads the tokenizer, and turns the text into ids.

    Returns:
        The text of each split; the tokenizer; and the ids of the splits that are trained on and evaluated.

    Raises:
        UserError: the data or the tokenizer cannot be used.
    """
    args, corpora = recipe.training, recipe.corpora
    reports = [FilterReport(corpus.name) for corpus in corpora]
    # One process of all machines, not of each: they share the run's folder.
    with args.main_process_first(local=False, desc="loading data"):
        pairs, texts = load_text(recipe, corpora, reports)
        tokenizer = prepare_tokenizer(recipe, training_split(pairs))
    refuse_unknown_languages(pairs, tokenizer)
    rows: dict[str, Any] = {}
    if recipe.data.streaming:
        rows["train"] = streamed_batches(recipe, tokenizer)
    elif is_plain(recipe):
        rows["train"], places = tokenize_corpus(corpora[0], pairs["train"], reports[0], tokenizer)
    else:
        rows["train"], places = tokenize_corpora(corpora, texts, reports, tokenizer)
    if "validation" not in pairs and args.eval_strategy != "no" and not recipe.data.streaming:
        hold_out(pairs, rows, places)
    if "validation" in pairs and ("validation" not in rows or not is_plain(recipe)):
        # Of rows that were held out, the text as it is, without transforms.
        rows["validation"] = tokenize_pairs(pairs["validation"], tokenizer, recipe.data, "validation")
    return pairs, tokenizer, rows


def is_plain(recipe: Recipe) -> bool:
    """Whether a recipe has one corpus, whose text stays as it is."""
    return recipe.mixture.corpora is None and not recipe.mixture.transforms


def load_text(
    recipe: Recipe, corpora: Sequence[Corpus], reports: Sequence[FilterReport]
) -> tuple[DatasetDict, list[Dataset]]:
    """
    The text of all splits, where `train` joins all corpora; and the text of each corpus, if it is not streamed.

    Args:
        recipe: names the data.
        corpora: the recipe's.
        reports: for each corpus, counts the rows that its filters skip.
    """
    several = recipe.mixture.corpora is not None
    pairs = load_held_out(recipe.data) if several else load_pairs(recipe.data, reports[0], columns=corpora[0].columns)
    if recipe.data.streaming:
        pairs["train"] = join_streams(corpora) if several else open_corpus(corpora[0])
        name_directions(pairs, recipe.data)
        return pairs, []
    texts = load_corpora(corpora, reports) if several else [training_split(pairs)]
    pairs["train"] = join_texts(texts)
    name_directions(pairs, recipe.data)
    return pairs, texts


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
    if not named:
        tokenizer.add_tokens([tag for corpus in recipe.corpora for tag in corpus.tags])
    extend_tokenizer(tokenizer, recipe.tokenizer, recipe.data, train)
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
        texts = balanced_texts(train, count_directions(train)) if has_languages(train) else training_texts(train)
        for tag in args.tags or ():
            texts = map(methodcaller("replace", tag, ""), texts)
        return train_tokenizer(texts, args.vocab_size, args.tokenizer_model, args.pretokenized)
    except UserError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from error


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, args: TokenizerArguments, data: DataArguments, train: Dataset | IterableDataset
) -> None:
    """
    Adds the tags and languages of the training data that a tokenizer does not have yet.

    Raises:
        UserError: the tokenizer cannot have them, or the target language is not given.
    """
    add_tags(tokenizer, args.tags or ())
    if has_languages(train):
        some = train.take(VOCABULARY_ROWS) if isinstance(train, IterableDataset) else train
        add_languages(tokenizer, count_directions(some))
    else:
        set_direction(tokenizer, data)


def streamed_batches(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[StreamedBatches]:
    """The batches of a stream that this process trains on, for each stage of the run."""
    args, corpora = recipe.training, recipe.corpora
    options = {
        "max_tokens": args.per_device_train_batch_tokens,
        "length": args.max_steps * args.gradient_accumulation_steps,
        "seed": args.seed_of_data,
        "num_processes": args.world_size,
        "process_index": args.process_index,
    }
    if recipe.mixture.corpora is None:
        return [StreamedBatches(open_corpus(corpora[0]), tokenizer, corpora[0], **options)]
    return [
        MixedBatches([open_corpus(corpus) for corpus in corpora], tokenizer, corpora, weights, **options)
        for weights in weights_of_stages(recipe, [1] * len(corpora))
    ]


def training_rows(
    recipe: Recipe, rows: Dataset | list[StreamedBatches], tokenizer: PreTrainedTokenizerBase
) -> Sequence[Dataset | EpochRows | StreamedBatches]:
    """The rows of each stage of the run: mixed, transformed and cut anew in each epoch, as the recipe says."""
    if isinstance(rows, list):
        return rows
    seed, corpora, anew = recipe.training.seed_of_data, recipe.corpora, rows
    if any(corpus.transforms for corpus in corpora):
        anew = TransformedRows(anew, tokenizer, corpora, seed)
    if recipe.data.bpe_dropout:
        limits = [f"max_{side}_length" for side in SIDES]
        longest = {limit: max(getattr(corpus.data, limit) for corpus in corpora) for limit in limits}
        anew = BpeDropoutRows(anew, tokenizer, dataclasses.replace(recipe.data, **longest), seed)
        longer = 100 * (anew.growth() - 1)
        logger.info("BPE-dropout %g lengthens rows by %.0f %% on a sample", recipe.data.bpe_dropout, longer)
    if recipe.mixture.corpora is None:
        return [anew]
    corpus = rows.with_format("numpy")["corpus"][:]
    names = [corpus.name for corpus in corpora]
    weights = weights_of_stages(recipe, np.bincount(corpus, minlength=len(names)).tolist())
    mixtures = [MixedRows(anew, corpus, names, weight, seed) for weight in weights]
    for number, mixture in enumerate(mixtures, 1):
        logger.info("%s%s", f"stage {number}: " if len(mixtures) > 1 else "", mixture)
    return mixtures


def weights_of_stages(recipe: Recipe, sizes: Sequence[int]) -> list[list[float]]:
    """
    The weight of each corpus in each stage; 0 leaves it out.

    Args:
        recipe: has corpora.
        sizes: the number of rows of each corpus.
    """
    corpora, weights = recipe.corpora, []
    for stage in recipe.stages:
        if stage.weights is not None:
            weights.append([stage.weights.get(corpus.name, 0.0) for corpus in corpora])
        elif corpora[0].weight is not None:
            weights.append([corpus.weight or 0.0 for corpus in corpora])
        else:
            weights.append(weights_by_size(sizes, recipe.mixture.mixing_temperature))
    return weights

"""The text and the ids of the training corpora, each read and filtered by its own fields, as one table."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    Value,
    concatenate_datasets,
)
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..settings.arguments import DataArguments
from ..settings.corpora import Corpus, naming, several_directions
from .filters import FilterReport
from .languages import LANGUAGES, has_languages, with_languages
from .pairs import SIDES, SPLITS, load_pairs, tokenize_pairs
from .streaming import open_stream


def load_held_out(data: DataArguments) -> DatasetDict:
    """
    The validation and test splits of a recipe with `corpora`, as far as there are any: from its files, or those of its
    `dataset`, whose train split is not used.

    Raises:
        DataError: they cannot be read, or the corpora are streamed and there are none.
    """
    if not (data.dataset or data.validation_file or data.test_file or data.streaming):
        return DatasetDict()
    return load_pairs(dataclasses.replace(data, train_file=None), FilterReport(), SPLITS[1:])


def load_corpora(corpora: Sequence[Corpus], reports: Sequence[FilterReport]) -> list[Dataset]:
    """
    Loads the text of each corpus, without the rows that its filters find.

    Args:
        corpora: what the recipe says about them.
        reports: for each corpus, counts the skipped rows.

    Raises:
        DataError: a corpus cannot be read, or has no rows. The message begins with its name.
    """
    texts, several = [], several_directions(corpora)
    for corpus, report in zip(corpora, reports, strict=True):
        with naming(corpus):
            found = load_pairs(corpus.data, report, SPLITS[:1], corpus.columns)
            if "train" not in found:
                raise DataError(f"{corpus.data.dataset} has no train split")
            texts.append(with_languages(found["train"], corpus.data) if several else found["train"])
    return texts


def open_corpus(corpus: Corpus) -> IterableDataset:
    """
    The rows of text of a streamed corpus.

    Raises:
        DataError: there is no such data. The message begins with the corpus's name.
    """
    with naming(corpus):
        return open_stream(corpus.data, corpus.columns)


def join_streams(corpora: Sequence[Corpus]) -> IterableDataset:
    """The text of all streamed corpora, a row of each in turn, to learn a vocabulary from and to check."""
    # `interleave_datasets` reads the first rows at once, and does not say which stream has a fault.
    return IterableDataset.from_generator(take_turns, gen_kwargs={"corpora": tuple(corpora)})


def take_turns(corpora: Sequence[Corpus]) -> Iterator[dict[str, str]]:
    """Yields a row of each corpus in turn, until the last has ended."""
    several = several_directions(corpora)

    def rows_of(corpus: Corpus) -> Iterator[dict[str, str]]:
        with naming(corpus):
            direction = dict(zip(LANGUAGES, corpus.data.direction, strict=True)) if several else {}
            for row in open_stream(corpus.data):
                yield direction | row

    for rows in zip_longest(*map(rows_of, corpora)):
        yield from filter(None, rows)


def join_texts(texts: Sequence[Dataset]) -> Dataset:
    """The text of all corpora, one after the other."""
    columns = [*SIDES, *(LANGUAGES if has_languages(texts[0]) else ())]
    return concatenate_datasets([text.select_columns(columns) for text in texts])


def tokenize_corpus(
    corpus: Corpus, text: Dataset, report: FilterReport, tokenizer: PreTrainedTokenizerBase, keep_text: bool = False
) -> tuple[Dataset, np.ndarray]:
    """
    Turns the text of one corpus into ids, and filters it by its lengths.

    Args:
        corpus: what the recipe says about it.
        text: as load_pairs gives it.
        report: of the filters so far.
        tokenizer: the run's.
        keep_text: whether the rows keep their text.

    Returns:
        The rows, and for each of them the index of its pair in `text`.

    Raises:
        DataError: no row is left. The message begins with the name of the corpus.
    """
    before = report.numbers
    with naming(corpus):
        rows = tokenize_pairs(text, tokenizer, corpus.data, "train", report, corpus, keep_text)
    assert before is not None
    assert report.numbers is not None
    return rows, np.searchsorted(before, report.numbers)


def tokenize_corpora(
    corpora: Sequence[Corpus],
    texts: Sequence[Dataset],
    reports: Sequence[FilterReport],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Dataset, np.ndarray]:
    """
    Turns the text of all corpora into ids, and filters them by their lengths.

    Args:
        corpora: what the recipe says about them.
        texts: the text of each.
        reports: of each, of the filters so far.
        tokenizer: the run's.

    Returns:
        The rows of all corpora, one after the other, with the number of their `corpus`, and with their text if any
        corpus has transforms; and for each row the index of its pair in `join_texts(texts)`.

    Raises:
        DataError: no row of a corpus is left. The message begins with its name.
    """
    keep_text = any(corpus.transforms for corpus in corpora)
    parts, places, start = [], [], 0
    for number, (corpus, text, report) in enumerate(zip(corpora, texts, reports, strict=True)):
        rows, numbers = tokenize_corpus(corpus, text, report, tokenizer, keep_text)
        of = Dataset.from_dict({"corpus": [number] * len(rows)}, features=Features({"corpus": Value("int32")}))
        parts.append(concatenate_datasets([rows, of], axis=1))
        places.append(start + numbers)
        start += len(text)
    return concatenate_datasets(parts), np.concatenate(places)

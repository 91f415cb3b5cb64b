"""Translates texts with a model: to token ids, in batches of similar length through `generate()`, and back to text."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from vanilla_transformer.engine_choice import Engine
from vanilla_transformer.loading import text_fault
from vanilla_transformer.pipeline_batches import batches_by_length, longest_sentence

from .data.languages import checked_languages
from .errors import DataError


class Hypothesis(NamedTuple):
    """One translation: its text, its score if that was asked for, and whether it ended by itself, by an eos."""

    text: str
    score: float | None
    ended: bool


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    batch_tokens: int = 4096,
    tgt_lang: str | Sequence[str] | None = None,
    **options,
) -> list[str]:
    """
    Translates texts in batches of similar length, with a progress bar.

    Args:
        model: in evaluation mode.
        texts: one source each; an empty one has the empty translation.
        batch_tokens: source tokens, padding included, of the sentences that are translated together; a longer sentence
            is translated alone.
        tgt_lang: as in `encode`.
        options: arguments of `generate()`.

    Returns:
        One translation for each text, in the order of the texts.

    Raises:
        DataError: as in `encode`.
    """
    rows = encode(model, tokenizer, texts, tgt_lang=tgt_lang)
    with tqdm(total=len(rows), desc="translating", unit="lines", disable=None) as progress:
        found = translate_rows(model, tokenizer, rows, batch_tokens, progress=progress.update, **options)
    return [hypotheses[0].text for hypotheses in found]


def engine_for(model: PreTrainedModel, **options) -> Engine:
    """
    The engine that decodes the model on this machine, found by decoding one token.

    Args:
        model: in evaluation mode.
        options: arguments of `generate()`.

    Raises:
        ValueError: the options are wrong, or this machine does not support them.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    mask = torch.ones_like(token)  # no padding, even if 0 is the padding id
    model.generate(token, attention_mask=mask, **{**options, "max_new_tokens": 1})
    return model.last_engine


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    place: Callable[[int], str] = "text {}".format,
    tgt_lang: str | Sequence[str] | None = None,
) -> list[list[int]]:
    """
    The token ids of each text, none for an empty one.

    Args:
        place: what an error calls the text of a number, from 1.
        tgt_lang: the language to translate into, or one for each text. Default: the tokenizer's.

    Raises:
        DataError: a text is longer than learned positions reach, or holds half of a surrogate pair, or its language is
            not given, or unknown to the tokenizer.
    """
    for number, text in enumerate(texts, start=1):
        if fault := text_fault(text):
            raise DataError(f"{place(number)} {fault}")
    languages = checked_languages(tokenizer, tgt_lang, place)
    ids = tokenizer(texts, return_attention_mask=False, **languages)["input_ids"]
    longest = longest_sentence(model.config)
    for number, row in enumerate(ids, start=1):
        if longest is not None and len(row) > longest:
            raise DataError(
                f"{place(number)} has {len(row)} tokens, but the model has learned positions for "
                f"max_position_embeddings={longest}: split the text"
            )
    return [row if text.strip() else [] for row, text in zip(ids, texts, strict=True)]


def translate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    batch_tokens: int,
    n_best: int = 1,
    scores: bool = False,
    progress: Callable[[int], object] = lambda count: None,
    **options,
) -> list[list[Hypothesis]]:
    """
    Translates rows of token ids in batches of similar length.

    Args:
        model: in evaluation mode.
        rows: one source each, as `encode` gives them; an empty one has the empty translation, of score 0.
        batch_tokens: source tokens, padding included, of the rows that are translated together; a longer row is
            translated alone.
        n_best: how many translations of each row, at most `num_beams`.
        scores: whether they have scores, for which `num_beams` must be over 1.
        progress: is called with the number of rows that were translated since it was called before.
        options: arguments of `generate()`.

    Returns:
        For each row `n_best` translations, the best first, in the order of the rows.
    """
    found = [[Hypothesis("", 0.0 if scores else None, True)] * n_best for _ in rows]
    filled = [number for number, row in enumerate(rows) if row]
    progress(len(rows) - len(filled))
    for places in batches_by_length([len(rows[number]) for number in filled], batch_tokens):
        numbers = [filled[place] for place in places]
        batch = tokenizer.pad({"input_ids": [rows[i] for i in numbers]}, return_tensors="pt").to(model.device)
        hypotheses = iter(_hypotheses(model, tokenizer, batch, scores, {**options, "num_return_sequences": n_best}))
        for i in numbers:
            found[i] = list(islice(hypotheses, n_best))
        progress(len(numbers))
    return found


def _hypotheses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: BatchEncoding, scores: bool, options: dict
) -> list[Hypothesis]:
    values: list[float] | list[None]
    if scores:
        sequences, values = _search(model, batch, options)
    else:
        sequences = model.generate(**batch, **options)
        values = [None] * len(sequences)
    eos = model.generation_config.eos_token_id
    eos = torch.tensor([] if eos is None else eos, device=sequences.device)
    # The first token is the decoder's start, which may be an eos too.
    ended = torch.isin(sequences[:, 1:], eos).any(dim=1).tolist()
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    return [Hypothesis(*fields) for fields in zip(texts, values, ended, strict=True)]


def _search(model: PreTrainedModel, batch: BatchEncoding, options: dict) -> tuple[torch.Tensor, list[float]]:
    """What a beam search finds for each row, `[B * n_best, T]`, and the scores."""
    output = model.generate(**batch, **options, return_dict_in_generate=True)
    if output.sequences_scores is None:
        # transformers' own search tells them only along with those of all words at all steps, which take much memory.
        output = model.generate(**batch, **options, return_dict_in_generate=True, output_scores=True)
    return output.sequences, output.sequences_scores.tolist()

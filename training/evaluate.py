"""Scores a saved model: `vanilla-transformer evaluate MODEL --test_file SOURCE TARGET`.

Any data that training takes will do: `--dataset phrasebook:en-de`, a Hub dataset, files.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import cached_file

from vanilla_transformer import VanillaTransformerConfig  # importing it registers the Auto classes
from vanilla_transformer.loading_vanilla_transformer import refuse_lost_weights, refuse_other_tokenizer, text_fault
from vanilla_transformer.program_vanilla_transformer import load_if_possible

from .arguments import DataArguments, DecodingArguments, check_bleu_tokenizer, check_numbers
from .batching import batch_sizes
from .data import DataError, load_pairs
from .errors import UserError
from .metrics import TranslationMetrics
from .options import OptionParser, read_yaml
from .program import run_program
from .report import make_sure_of_file, write_beside


# Differences between weights and config.json that a message tells.
SHOWN = 3


@dataclass
class EvaluationArguments:
    """What to score, and how to translate. Decoding options that are left out are the model's own."""

    split: str = field(default="test", metadata={"help": "train, validation or test"})
    batch_tokens: int = field(
        default=4096, metadata={"help": "source tokens, padding included, of sentences translated together"}
    )
    num_beams: int | None = field(default=None, metadata={"help": "width of the beam"})
    length_penalty: float | None = field(default=None, metadata={"help": "transformers' length_penalty"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "longest translation in tokens"})
    bleu_tokenize: str | None = field(
        default=None, metadata={"help": "sacrebleu's tokenizer for BLEU (default: that of the model's run, else 13a)"}
    )
    output_file: str | None = field(default=None, metadata={"help": "write the scores here as JSON"})

    def __post_init__(self):
        check_numbers(self)
        if self.bleu_tokenize is not None:
            check_bleu_tokenizer(self.bleu_tokenize)

    def generation_options(self) -> dict:
        """The arguments of `generate()` that were given."""
        options = {name: getattr(self, name) for name in ("num_beams", "length_penalty", "max_new_tokens")}
        return {name: value for name, value in options.items() if value is not None}


def load_model(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A saved model, ready to translate on the device that accelerate chooses, and its tokenizer.

    Raises:
        UserError: as `read_model` does.
    """
    model, tokenizer = read_model(folder)
    model = model.to(PartialState().device).eval()
    if model.device.type == "cpu":
        load_if_possible()
    return model, tokenizer


def read_model(folder: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A saved model and its tokenizer, from JSON and safetensors alone: no code that comes with them is run.

    Args:
        folder: or the name of a model of the Hub.
        options: of `from_pretrained`, fields of the config among them.

    Raises:
        UserError: there is no model of that name, its files are damaged, or they are not those of one model.
    """
    try:
        kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if kind != VanillaTransformerConfig.model_type:
            raise ValueError(
                f"config.json is that of a model_type {kind!r}, and {VanillaTransformerConfig.model_type!r} is needed: "
                "`vanilla-transformer convert` converts some others"
            )
        # Sizes that differ are told below, with what else differs, in place of a table.
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = AutoModelForSeq2SeqLM.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, **told, **options
        )
        refuse_other_weights(report)
        refuse_lost_weights(model)
        tokenizer = load_tokenizer(folder)
        refuse_other_tokenizer(tokenizer, model.config)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"cannot load the model {folder!r}: {' '.join(str(error).split())}") from error
    # What a JSON file of another form makes of transformers' loaders is anybody's guess.
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the model {folder!r}: one of its JSON files is odd: {error!r}") from error
    return model, tokenizer


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a folder, or of a name of the Hub. No code that comes with it is run.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # The library tokenizers raises plain Exceptions.
    except Exception as error:
        raise UserError(f"tokenizer={folder} cannot be loaded: {' '.join(str(error).split())}") from error


def refuse_other_weights(report: dict[str, Any]) -> None:
    """
    Looks at the `loading_info` of `from_pretrained`, which fills with random numbers what a folder does not hold, and
    passes over what the network has no place for.

    Raises:
        ValueError: the weights are not those of the network that config.json describes.
    """
    wrong = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    wrong += [f"there is no place for {name}" for name in sorted(report["unexpected_keys"])]
    for name, stored, expected in sorted(report["mismatched_keys"]):
        wrong.append(f"{name} is {list(stored)}, where {list(expected)} is expected")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"the weights are not those of config.json: {'; '.join(wrong[:SHOWN])}{more}")


class Hypothesis(NamedTuple):
    """One translation: its text, its score if that was asked for, and whether it ended by itself, by an eos."""

    text: str
    score: float | None
    ended: bool


def translate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], batch_tokens: int = 4096, **options
) -> list[str]:
    """
    Translates texts in batches of similar length, with a progress bar.

    Args:
        model: in evaluation mode.
        texts: one source each; an empty one has the empty translation.
        batch_tokens: source tokens, padding included, of the sentences that are translated together; a longer sentence
            is translated alone.
        options: arguments of `generate()`.

    Returns:
        One translation for each text, in the order of the texts.

    Raises:
        DataError: a text is longer than learned positions reach, or holds half of a surrogate pair.
    """
    rows = encode(model, tokenizer, texts)
    with tqdm(total=len(rows), desc="translating", unit="lines", disable=None) as progress:
        found = translate_rows(model, tokenizer, rows, batch_tokens, progress=progress.update, **options)
    return [hypotheses[0].text for hypotheses in found]


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    place: Callable[[int], str] = "text {}".format,
) -> list[list[int]]:
    """
    The token ids of each text, none for an empty one.

    Args:
        place: what an error calls the text of a number, from 1.

    Raises:
        DataError: a text is longer than learned positions reach, or holds half of a surrogate pair.
    """
    for number, text in enumerate(texts, start=1):
        if fault := text_fault(text):
            raise DataError(f"{place(number)} {fault}")
    ids = tokenizer(texts, return_attention_mask=False)["input_ids"]
    limit = model.config.max_position_embeddings
    if model.config.position_embedding_type == "learned":
        for number, row in enumerate(ids, start=1):
            if len(row) > limit:
                raise DataError(
                    f"{place(number)} has {len(row)} tokens, but the model has learned positions for "
                    f"max_position_embeddings={limit}: split the text"
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
    # The longest first: a batch that does not fit in memory fails at once.
    order = sorted((i for i, row in enumerate(rows) if row), key=lambda i: -len(rows[i]))
    progress(len(rows) - len(order))
    batches = iter(order)
    for size in batch_sizes([len(rows[i]) for i in order], batch_tokens):
        numbers = list(islice(batches, size))
        batch = tokenizer.pad({"input_ids": [rows[i] for i in numbers]}, return_tensors="pt").to(model.device)
        hypotheses = iter(_hypotheses(model, tokenizer, batch, scores, {**options, "num_return_sequences": n_best}))
        for i in numbers:
            found[i] = list(islice(hypotheses, n_best))
        progress(size)
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


def bleu_tokenizer_of(model: str) -> tuple[str, str]:
    """
    By which of sacrebleu's tokenizers a model's run was scored: BLEU by another is not to be compared with it.

    Args:
        model: folder or Hub name. A checkpoint is its run's.

    Returns:
        The name, and where it is from, in words: the run's recipe.yaml, or, where there is none, the default.

    Raises:
        UserError: the recipe.yaml cannot be read, or names a tokenizer that cannot be used here.
    """
    folder = Path(model).absolute()
    if folder.is_dir() and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
        model = str(folder.parent)
    name, origin = DecodingArguments.bleu_tokenize, "the default"
    path = cached_file(
        model,
        "recipe.yaml",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is not None:
        recipe = read_yaml(Path(path))
        name, origin = str(recipe.get("bleu_tokenize", name)), "as its recipe.yaml says"
    check_bleu_tokenizer(name)
    return name, origin


def score_texts(predictions: list[str], references: list[str], bleu_tokenize: str) -> dict:
    """BLEU, chrF, TER, exact match and signatures of translations against the true text."""
    return TranslationMetrics().compute(predictions=predictions, references=references, tokenize=bleu_tokenize)


def format_scores(scores: dict) -> str:
    """The scores as lines to print."""
    lines = [f"{name:>12} {value:6.2f}   {scores.get(f'{name}_signature', '')}" for name, value in numbers(scores)]
    return "\n".join(line.rstrip() for line in lines)


def numbers(scores: dict) -> list[tuple[str, float]]:
    """The scores that are numbers, without the signatures."""
    return [(name, value) for name, value in scores.items() if not isinstance(value, str)]


def build_parser() -> OptionParser:
    """The options."""
    usage = "%(prog)s MODEL [--field value ...]"
    parser = OptionParser((EvaluationArguments, DataArguments), usage=usage, description=__doc__)
    parser.add_argument("model", help="folder or Hub name of the model")
    return parser


def main(argv: list[str]) -> None:
    """Scores one split of the data that the command line names."""
    arguments, data, options = build_parser().parse_args_into_dataclasses(argv, look_for_args_file=False)
    if arguments.output_file:
        make_sure_of_file("output_file", arguments.output_file)
    elif sys.__stdout__ is None:
        raise UserError("the standard output is closed, and scores would be lost: name a file by --output_file")

    pairs = load_pairs(data)
    if arguments.split not in pairs:
        raise DataError(f"the data has no {arguments.split} split, only {', '.join(pairs)}: name one by --split")
    pairs = pairs[arguments.split]
    model, tokenizer = load_model(options.model)
    bleu_tokenize, origin = arguments.bleu_tokenize, "as told"
    if bleu_tokenize is None:
        bleu_tokenize, origin = bleu_tokenizer_of(options.model)
    decoding = arguments.generation_options()
    predictions = translate(model, tokenizer, list(pairs["source"]), arguments.batch_tokens, **decoding)
    scores = score_texts(predictions, list(pairs["target"]), bleu_tokenize)
    used = model.generation_config.to_dict() | decoding | {"bleu_tokenize": f"{bleu_tokenize} ({origin})"}
    print(f"{options.model} on {len(pairs)} pairs of the {arguments.split} split")
    told = ("num_beams", "length_penalty", "max_new_tokens", "bleu_tokenize")
    print(", ".join(f"{name}={used[name]}" for name in told if used.get(name) is not None))
    print(format_scores(scores))
    if arguments.output_file:
        write_beside(arguments.output_file, json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main, sys.argv[1:])

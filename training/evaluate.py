"""Scores a saved model: `python -m vanilla_transformer.training.evaluate MODEL --test_file SOURCE TARGET`.

Any data that training takes will do: `--dataset phrasebook:en-de`, a Hub dataset, files (see `--help`).
"""

import json
import sys
from dataclasses import dataclass, field
from itertools import islice

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import vanilla_transformer  # noqa: F401  (registers the Auto classes)

from .arguments import DataArguments, UserError, run_program
from .batching import batch_sizes
from .data import DataError, load_pairs
from .metrics import TranslationMetrics
from .report import write_beside


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
    bleu_tokenize: str = field(default="13a", metadata={"help": "sacrebleu's tokenizer for BLEU"})
    output_file: str | None = field(default=None, metadata={"help": "write the scores here as JSON"})

    def generation_options(self) -> dict:
        """The arguments of `generate()` that were given."""
        options = {name: getattr(self, name) for name in ("num_beams", "length_penalty", "max_new_tokens")}
        return {name: value for name, value in options.items() if value is not None}


def load_model(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A saved model, ready to translate on the GPU if there is one, and its tokenizer.

    Raises:
        UserError: there is no model of that name, or its files are damaged.
    """
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load the model {folder!r}: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


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
        DataError: a text is longer than learned positions reach.
    """
    translations = [""] * len(texts)
    ids = tokenizer(texts, return_attention_mask=False)["input_ids"]
    _refuse_unreachable_positions(model, ids)
    # The longest first: a batch that does not fit in memory fails at once.
    order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: -len(ids[i]))
    with tqdm(total=len(order), desc="translating", unit="lines", disable=None) as progress:
        lengths = [len(ids[i]) for i in order]
        batches = iter(order)
        for size in batch_sizes(lengths, batch_tokens):
            rows = list(islice(batches, size))
            batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(model.device)
            outputs = model.generate(**batch, **options)
            for i, text in zip(rows, tokenizer.batch_decode(outputs, skip_special_tokens=True), strict=True):
                translations[i] = text
            progress.update(len(rows))
    return translations


def _refuse_unreachable_positions(model: PreTrainedModel, ids: list[list[int]]) -> None:
    limit = model.config.max_position_embeddings
    if model.config.position_embedding_type == "learned":
        for number, row in enumerate(ids, start=1):
            if len(row) > limit:
                raise DataError(
                    f"text {number} has {len(row)} tokens, but the model has learned positions for "
                    f"max_position_embeddings={limit}: split the text"
                )


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


def main(argv: list[str]) -> None:
    """Scores one split of the data that the command line names."""
    parser = HfArgumentParser((EvaluationArguments, DataArguments), description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub name of the model")
    arguments, data, options = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)

    pairs = load_pairs(data)
    if arguments.split not in pairs:
        raise DataError(f"the data has no {arguments.split} split, only {', '.join(pairs)}: name one by --split")
    pairs = pairs[arguments.split]
    model, tokenizer = load_model(options.model)
    predictions = translate(
        model, tokenizer, list(pairs["source"]), arguments.batch_tokens, **arguments.generation_options()
    )
    scores = score_texts(predictions, list(pairs["target"]), arguments.bleu_tokenize)
    print(f"{options.model} on {len(pairs)} pairs of the {arguments.split} split")
    print(format_scores(scores))
    if arguments.output_file:
        write_beside(arguments.output_file, json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    run_program(main, sys.argv[1:])

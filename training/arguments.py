"""What a run can be told: by a YAML recipe, and by `--field value` on the command line, which comes after it."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, Seq2SeqTrainingArguments


RECIPES = Path(__file__).parent / "recipes"

# What can choose the best checkpoint, and whether more of it is better.
BEST_METRICS = {"bleu": True, "chrf": True, "ter": False, "exact_match": True, "loss": False, "perplexity": False}


class UserError(ValueError):
    """What the user of a program got wrong. The message says what was found and what would be right."""


class RecipeError(UserError):
    """A recipe or a command line that cannot be followed."""


@dataclass
class ModelArguments:
    """
    The network: fields of VanillaTransformerConfig. One that is left out keeps the config's own default.

    The special ids and the vocabulary's size come from the tokenizer.
    """

    d_model: int | None = field(default=None, metadata={"help": "width of every token vector"})
    encoder_layers: int | None = field(default=None, metadata={"help": "depth of the encoder"})
    decoder_layers: int | None = field(default=None, metadata={"help": "depth of the decoder"})
    encoder_attention_heads: int | None = field(default=None, metadata={"help": "heads in the encoder"})
    decoder_attention_heads: int | None = field(default=None, metadata={"help": "heads in the decoder"})
    d_kv: int | None = field(default=None, metadata={"help": "width of a head's queries and keys"})
    d_v: int | None = field(default=None, metadata={"help": "width of a head's values"})
    encoder_ffn_dim: int | None = field(default=None, metadata={"help": "inner width of the encoder's FFN"})
    decoder_ffn_dim: int | None = field(default=None, metadata={"help": "inner width of the decoder's FFN"})
    activation_function: str | None = field(default=None, metadata={"help": "any activation of transformers"})
    dropout: float | None = field(default=None, metadata={"help": "rate on sub-layers and embeddings"})
    attention_dropout: float | None = field(default=None, metadata={"help": "rate on attention weights"})
    activation_dropout: float | None = field(default=None, metadata={"help": "rate inside the FFN"})
    position_embedding_type: str | None = field(default=None, metadata={"help": "sinusoidal or learned"})
    max_position_embeddings: int | None = field(default=None, metadata={"help": "rows of learned positions"})
    normalize_before: bool | None = field(default=None, metadata={"help": "pre-norm instead of post-norm"})
    share_encoder_decoder_embeddings: bool | None = field(
        default=None, metadata={"help": "one table of embeddings for source and target"}
    )
    tie_word_embeddings: bool | None = field(
        default=None, metadata={"help": "one matrix for target embeddings and output projection"}
    )
    label_smoothing: float | None = field(default=None, metadata={"help": "smoothing of the training loss"})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2 or flex_attention (default: the fastest there)"}
    )

    def config_fields(self) -> dict[str, Any]:
        """The fields that were given, as keyword arguments of VanillaTransformerConfig."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        given.pop("attn_implementation", None)
        return given


@dataclass
class TokenizerArguments:
    """The subword vocabulary: one that exists, or one to learn from the training data."""

    tokenizer: str | None = field(
        default=None, metadata={"help": "folder or Hub name of a tokenizer; default: learn one from the training data"}
    )
    tokenizer_model: str = field(default="bpe", metadata={"help": "how subwords are learned: bpe or unigram"})
    vocab_size: int = field(
        default=37000, metadata={"help": "subwords to learn (the paper: about 37,000, section 5.1)"}
    )
    pretokenized: bool = field(
        default=False, metadata={"help": "the text is tokenised: white space separates its words"}
    )


@dataclass
class DataArguments:
    """
    The parallel text: `dataset`, or files. Paths may hold environment variables ($NAME).

    Files are given per split: one data file (.jsonl, .json, .csv or .tsv, plain or .gz, or .parquet), or two parallel
    text files, source then target (plain or .gz).
    """

    dataset: str | None = field(
        default=None, metadata={"help": "Hub dataset name, or phrasebook:SOURCE-TARGET (e.g. phrasebook:en-de)"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of the Hub dataset"})
    data_dir: str | None = field(default=None, metadata={"help": "folder that the file names below are relative to"})
    train_file: list[str] | None = field(default=None, metadata={"help": "one data file, or source and target text"})
    validation_file: list[str] | None = field(default=None, metadata={"help": "the same, to choose the best model"})
    test_file: list[str] | None = field(default=None, metadata={"help": "the same, for the final score"})
    source_lang: str | None = field(
        default=None, metadata={"help": "language code of the source (also its key in a `translation` column)"}
    )
    target_lang: str | None = field(default=None, metadata={"help": "language code of the target, likewise"})
    source_column: str | None = field(default=None, metadata={"help": "column of the source text"})
    target_column: str | None = field(default=None, metadata={"help": "column of the target text"})
    data_name: str | None = field(default=None, metadata={"help": "what the model card calls the data"})
    max_source_length: int = field(
        default=256, metadata={"help": "training rows with more source tokens are left out, and counted"}
    )
    max_target_length: int = field(
        default=256, metadata={"help": "training rows with more target tokens are left out, and counted"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use only the first rows"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "likewise for validation and test"})
    phrasebook_size: int = field(default=50_000, metadata={"help": "training phrases of the phrasebook"})

    def __post_init__(self):
        # A recipe may name one file without the brackets of a list.
        for name in ("train_file", "validation_file", "test_file"):
            if isinstance(files := getattr(self, name), str):
                setattr(self, name, [files])


@dataclass
class DecodingArguments:
    """How the trained model translates, saved with it as its generation config, and how that is scored."""

    num_beams: int = field(default=4, metadata={"help": "width of the beam (the paper: 4, section 6.1)"})
    length_penalty: float = field(default=1.0, metadata={"help": "transformers' length_penalty: score / length**this"})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "longest translation in tokens (default: the source's length + 50)"}
    )
    bleu_tokenize: str = field(
        default="13a", metadata={"help": "sacrebleu's tokenizer for BLEU; none for text that is tokenised"}
    )


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """transformers' training arguments with the paper's optimizer (section 5.3) as defaults, and early stopping."""

    learning_rate: float | None = field(
        default=None, metadata={"help": "peak learning rate (default: the paper's, (d_model * warmup_steps)**-0.5)"}
    )
    lr_scheduler_type: str = field(default="inverse_sqrt", metadata={"help": "transformers' schedule"})
    warmup_steps: float = field(default=4000, metadata={"help": "updates of linear warm-up"})
    adam_beta2: float = field(default=0.98, metadata={"help": "Adam's beta 2"})
    adam_epsilon: float = field(default=1e-9, metadata={"help": "Adam's epsilon"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "clip gradients to this norm (0: never)"})
    train_sampling_strategy: str = field(
        default="token_budget",
        metadata={
            "help": "batches bounded by tokens; transformers' own (random, sequential, group_by_length) count rows"
        },
    )
    per_device_train_batch_tokens: int = field(
        default=4096,
        metadata={
            "help": "most tokens, padding included, of a process's batch on either side (the paper: about 25,000 in an "
            "update of all processes and accumulated batches)"
        },
    )
    per_device_eval_batch_tokens: int = field(
        default=4096, metadata={"help": "likewise in evaluation, where generation multiplies them by its beams"}
    )
    predict_with_generate: bool = field(default=True, metadata={"help": "score translations, not only the loss"})
    generation_num_beams: int | None = field(default=1, metadata={"help": "beams while training: greedy is quick"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate: no, steps or epoch"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to save, and keep the best"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "end with the best checkpoint, not the last"})
    metric_for_best_model: str | None = field(default="bleu", metadata={"help": "what chooses the best checkpoint"})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better score"}
    )
    average_checkpoints: int | None = field(
        default=None,
        metadata={"help": "end with the mean of the last so many checkpoints (the paper: 5, big 20)"},
    )
    # HfArgumentParser needs None first.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="tensorboard", metadata={"help": "where curves are logged"}
    )

    def __post_init__(self):
        if self.label_smoothing_factor:
            raise RecipeError(
                f"label_smoothing_factor={self.label_smoothing_factor} is the Trainer's slow smoothing, outside the "
                "model: set label_smoothing instead"
            )
        if self.average_checkpoints and self.save_total_limit and self.average_checkpoints > self.save_total_limit:
            raise RecipeError(
                f"average_checkpoints={self.average_checkpoints} is more than are kept: "
                f"save_total_limit={self.save_total_limit} must be at least as many"
            )
        metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if metric not in BEST_METRICS:
            raise RecipeError(f"metric_for_best_model={metric!r} is unknown: choose one of {', '.join(BEST_METRICS)}")
        if self.greater_is_better is None:
            self.greater_is_better = BEST_METRICS[metric]
        # transformers asks to be told that there is no accelerator: else it refuses bf16, and warns of pinned memory.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        super().__post_init__()


class Recipe(NamedTuple):
    """Everything that a run was told, and `given`: the part that differs from the defaults, as a recipe of its own."""

    model: ModelArguments
    tokenizer: TokenizerArguments
    data: DataArguments
    decoding: DecodingArguments
    training: TrainingArguments
    given: dict[str, Any]


def run_program(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Runs a program; what its user got wrong ends it with one line and exit status 2, not with a traceback."""
    try:
        main(argv)
    except (UserError, StrictDataclassError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse_recipe(argv: list[str]) -> Recipe:
    """
    Reads `[RECIPE.yaml] [--variant NAME] [--field value ...]`; what comes later counts.

    Args:
        argv: the command line. A recipe is a path, or the name of one that is installed with the package.

    Raises:
        RecipeError: the recipe cannot be read, or names a field that does not exist.
        SystemExit: argparse's own errors and `--help`.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--variant", help="one of the recipe's variants, e.g. a row of table3.yaml")
    variant, argv = before.parse_known_args(argv)
    groups = (ModelArguments, TokenizerArguments, DataArguments, DecodingArguments, TrainingArguments)
    usage = "%(prog)s [RECIPE.yaml] [--variant NAME] [--field value ...]"
    parser = HfArgumentParser(groups, parents=[before], usage=usage)
    defaults = vars(parser.parse_args([]))
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**read_recipe(argv.pop(0), variant.variant, set(defaults)))
    elif variant.variant:
        raise RecipeError(f"--variant {variant.variant} needs a recipe that has it, as the first argument")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value != defaults[name]}
    try:
        model, tokenizer, data, decoding, training, _ = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return Recipe(model, tokenizer, data, decoding, training, given)


def read_recipe(name: str, variant: str | None, fields: set[str]) -> dict[str, Any]:
    """
    The fields that a recipe sets, with those of one of its `variants` laid over them.

    Raises:
        RecipeError: there is no such file or variant, it is not a YAML mapping, or it sets a field not in `fields`.
    """
    path = next((p for p in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        installed = ", ".join(sorted(p.name for p in RECIPES.glob("*.yaml")))
        raise RecipeError(f"no recipe {name!r}: give the path of a YAML file, or one of {installed}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} must hold lines of the form `field: value`, not {type(recipe).__name__}")

    variants = recipe.pop("variants", {})
    if variant is not None:
        if variant not in variants:
            raise RecipeError(f"{path} has no variant {variant!r}: choose one of {', '.join(variants) or 'none'}")
        recipe |= variants[variant]
    elif variants:
        raise RecipeError(f"{path} holds variants: choose one by --variant {'|'.join(variants)}")
    for field_name in recipe:
        if field_name not in fields:
            likely = difflib.get_close_matches(field_name, fields, n=1)
            hint = f"did you mean {likely[0]}?" if likely else "--help lists the fields"
            raise RecipeError(f"{path} sets the unknown field {field_name!r}: {hint}")
    return recipe

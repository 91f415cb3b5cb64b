"""What a run can be told: by a YAML recipe, and by `--field value` on the command line, which comes after it."""

import argparse
import dataclasses
import difflib
import errno
import io
import logging
import os
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import sacrebleu
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, Seq2SeqTrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy, IntervalStrategy
from transformers.utils import is_torch_bf16_gpu_available

from vanilla_transformer.inference_vanilla_transformer import is_native

from .threads import fit_threads


logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"

# What can choose the best checkpoint, and whether more of it is better.
BEST_METRICS = {"bleu": True, "chrf": True, "ter": False, "exact_match": True, "loss": False, "perplexity": False}

# What a file system refuses, for no fault of the program.
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED_BY_SYSTEM = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


class UserError(ValueError):
    """What the user of a program got wrong. The message says what was found and what would be right."""


class RecipeError(UserError):
    """A recipe or a command line that cannot be followed."""


# What numbers must be: in words, and the fields. Beyond that the Trainer, its optimizer or numpy would fail without the
# field's name, after the data has been read or the model been trained.
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "at least 0": (
        lambda n: n >= 0,
        "learning_rate weight_decay warmup_steps adam_epsilon max_grad_norm r_drop_alpha dataloader_num_workers",
    ),
    "above 0": (lambda n: n > 0, "num_train_epochs logging_steps eval_steps save_steps"),
    "at least 1": (
        lambda n: n >= 1,
        "gradient_accumulation_steps per_device_train_batch_tokens per_device_eval_batch_tokens "
        "per_device_train_batch_size per_device_eval_batch_size generation_num_beams average_checkpoints "
        "early_stopping_patience lora_rank num_beams max_new_tokens batch_tokens max_train_samples max_eval_samples "
        "max_source_length max_target_length shuffle_buffer",
    ),
    "at least 0 and below 1": (lambda n: 0 <= n < 1, "adam_beta1 adam_beta2"),
    "above 0 and below 1, and near 1, e.g. 0.999": (lambda n: 0 < n < 1, "ema_decay"),
    "at least 1, or -1 to count epochs (num_train_epochs)": (lambda n: n >= 1 or n == -1, "max_steps"),
    "between 0 and 2**32 - 1": (lambda n: 0 <= n < 2**32, "seed data_seed"),
    # Lengths to the power of it must be numbers that a float can hold.
    "between -50 and 50": (lambda n: -50 <= n <= 50, "length_penalty"),
}
# No number is as large: torch and numpy would fail without the field's name.
LARGEST = 2**32


def check_numbers(arguments: Any, kind: type[UserError] = RecipeError) -> None:
    """
    Compares the fields of arguments of any kind with `LIMITS`; one that is None was left out.

    Raises:
        UserError: of that kind; it names the field, and what it must be.
    """
    for words, (holds, names) in LIMITS.items():
        for name in names.split():
            value = getattr(arguments, name, None)
            if value is not None and not (abs(value) < LARGEST and holds(value)):
                too_large = f", and below {LARGEST}" if abs(value) >= LARGEST else ""
                raise kind(f"{name}={value} must be {words}{too_large}")


def check_bleu_tokenizer(name: str) -> None:
    """
    Raises:
        RecipeError: sacrebleu has none of this name, or cannot use it here.
    """
    try:
        sacrebleu.BLEU(tokenize=name)
    except KeyError:
        known = ", ".join(sacrebleu.BLEU.TOKENIZERS)
        raise RecipeError(f"bleu_tokenize={name!r} is unknown: choose one of {known}") from None
    except (ImportError, RuntimeError, OSError) as error:  # it wants a package, or a file that it cannot download
        raise RecipeError(f"bleu_tokenize={name} cannot be used here: {' '.join(str(error).split())}") from error


@dataclass
class ModelArguments:
    """
    The network: fields of VanillaTransformerConfig. One that is left out keeps the config's own default.

    The special ids and the vocabulary's size come from the tokenizer. `model` names a trained model to go on with: it
    brings its own sizes, and its tokenizer.
    """

    model: str | None = field(
        default=None, metadata={"help": "folder or Hub name of a model to train further; default: a new one"}
    )
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
    init_std: float | None = field(
        default=None, metadata={"help": "spread of every new matrix (default: Xavier; d_model**-0.5 for embeddings)"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2 or flex_attention (default: the fastest there)"}
    )

    def config_fields(self) -> dict[str, Any]:
        """The fields that were given, as keyword arguments of VanillaTransformerConfig."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        for name in ("model", "attn_implementation"):
            given.pop(name, None)
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
    max_length_ratio: float | None = field(
        default=None, metadata={"help": "training rows with a side of more than so many times the other's tokens, too"}
    )
    drop_duplicates: bool = field(default=False, metadata={"help": "leave out training rows that came before"})
    drop_identical: bool = field(default=False, metadata={"help": "leave out training rows of two equal sides"})
    drop_bad_encoding: bool = field(
        default=False, metadata={"help": "leave out training rows that were decoded wrongly (e.g. Ã¼ for ü)"}
    )
    bpe_dropout: float = field(
        default=0.0,
        metadata={"help": "rate at which merges of BPE are skipped, anew in each epoch of training (the paper: 0.1)"},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use only the first rows"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "likewise for validation and test"})
    streaming: bool = field(
        default=False, metadata={"help": "read training rows as they are needed; max_steps says how many batches"}
    )
    shuffle_buffer: int = field(
        default=100_000, metadata={"help": "streamed rows that are sorted into batches and shuffled together"}
    )
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

    def __post_init__(self):
        check_numbers(self)
        check_bleu_tokenizer(self.bleu_tokenize)


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
    hold_memory: bool = field(
        default=True, metadata={"help": "on a CPU: keep freed memory for the next update (false: give it back)"}
    )
    average_checkpoints: int | None = field(
        default=None,
        metadata={"help": "end with the mean of the last so many checkpoints (the paper: 5, big 20)"},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "evaluate and end with the exponential mean of the weights after each update (e.g. 0.999)"},
    )
    r_drop_alpha: float = field(
        default=0.0,
        metadata={"help": "R-Drop: weight of the divergence between two passes with other dropout (the paper: 5)"},
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "train adapters of this rank beside a model's frozen weights, and merge them at the end"},
    )
    check: bool = field(
        default=False,
        metadata={"help": "only check everything, time a few updates, say what the run will take, and write nothing"},
    )
    # HfArgumentParser needs None first.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="tensorboard", metadata={"help": "where curves are logged"}
    )

    def __post_init__(self):
        check_numbers(self)
        if self.label_smoothing_factor:
            raise RecipeError(
                f"label_smoothing_factor={self.label_smoothing_factor} is the Trainer's slow smoothing, outside the "
                "model: set label_smoothing instead"
            )
        if self.train_sampling_strategy == "token_budget" and self.per_device_train_batch_size != 8:
            raise RecipeError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} counts rows, and batches are made by "
                "tokens: set per_device_train_batch_tokens instead (or train_sampling_strategy=random)"
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
        self._check_endings()
        if self.fsdp and self.world_size == 1:
            raise RecipeError(
                f"fsdp={self.fsdp} shards a model over processes, and this is a single one: leave it out, or start "
                "several by accelerate launch (docs/distributed.md)"
            )
        self._check_trackers()
        self._check_hub()

    def _check_hub(self) -> None:
        """Refuses what would put on the Hub what does not belong there."""
        if self.hub_token is not None:
            raise RecipeError(
                "hub_token would be written into recipe.yaml and the model card, for everyone to read: leave it out, "
                "and log in by `hf auth login`, or set the environment's HF_TOKEN"
            )
        if self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise RecipeError(
                f"hub_strategy={self.hub_strategy.value} would push the optimizer's state and other pickles: set "
                "every_save, which pushes the model of each checkpoint, or end"
            )

    def _check_trackers(self) -> None:
        """Refuses a tracker that is unknown or not installed: transformers would say so when everything is prepared."""
        installed = get_available_reporting_integrations()
        for name in self.report_to or []:
            if name not in installed:
                raise RecipeError(
                    f"report_to={name} is no tracker that is installed here: choose among {', '.join(installed)}, none"
                )

    def _check_endings(self) -> None:
        """Refuses what cannot decide together which weights the run ends with."""
        if self.average_checkpoints and self.save_total_limit and self.average_checkpoints > self.save_total_limit:
            raise RecipeError(
                f"average_checkpoints={self.average_checkpoints} is more than are kept: "
                f"save_total_limit={self.save_total_limit} must be at least as many"
            )
        if self.average_checkpoints and self.load_best_model_at_end:
            raise RecipeError(
                f"average_checkpoints={self.average_checkpoints} ends with the mean of the last checkpoints, "
                "load_best_model_at_end=True with the best: set load_best_model_at_end to false, or leave "
                "average_checkpoints out"
            )
        if self.average_checkpoints and self.ema_decay is not None:
            raise RecipeError(
                f"average_checkpoints={self.average_checkpoints} ends with one mean of weights, "
                f"ema_decay={self.ema_decay} with another: leave one of them out"
            )
        if self.average_checkpoints and self.lora_rank:
            raise RecipeError(
                f"average_checkpoints={self.average_checkpoints} needs whole models, and checkpoints with lora_rank="
                f"{self.lora_rank} hold adapters only: leave it out, or set ema_decay instead"
            )
        if self.average_checkpoints and self.save_strategy == "no":
            raise RecipeError(
                f"average_checkpoints={self.average_checkpoints} has nothing to average with save_strategy=no: "
                "set save_strategy to epoch or steps"
            )
        if self.early_stopping_patience and (self.eval_strategy == "no" or not self.metric_for_best_model):
            raise RecipeError(
                f"early_stopping_patience={self.early_stopping_patience} has no score to follow with eval_strategy="
                f"{IntervalStrategy(self.eval_strategy).value} and metric_for_best_model={self.metric_for_best_model}"
                ": set both"
            )


class Recipe(NamedTuple):
    """Everything that a run was told, and `given`: the part that differs from the defaults, as a recipe of its own."""

    model: ModelArguments
    tokenizer: TokenizerArguments
    data: DataArguments
    decoding: DecodingArguments
    training: TrainingArguments
    given: dict[str, Any]


def run_program(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """
    Runs a program as people at a shell expect it to end.

    What its user got wrong, and what the file system refuses, ends it with one line and exit status 2. Ctrl-C ends it
    with one line and 130, a pipe that nobody reads any more (`| head -1`) without a word and with 141.
    """
    _prepare_streams()
    fit_threads()
    try:
        main(argv)
        sys.stdout.flush()
    except UserError as error:
        _end(2, f"error: {error}")
    except StrictDataclassError as error:  # of two lines
        _end(2, f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        _end(130, "\ninterrupted")
    except OSError as error:
        if isinstance(error, BrokenPipeError) and (_is_unread(1) or _is_unread(2)):
            _end(141)
        if error.errno not in REFUSED_BY_SYSTEM:
            raise
        _end(2, f"error: {'the disk is full: ' if error.errno in FULL else ''}{error}")


def _prepare_streams() -> None:
    """
    Opens the standard streams that the caller has closed on the null device, since libraries write to them; Python's
    own `sys.__stdout__` stays None. Characters that the terminal's encoding lacks are written as escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_unread(descriptor: int) -> bool:
    """Whether this is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _end(status: int, message: str | None = None) -> NoReturn:
    """Ends the program. What can no longer be written is dropped, where Python would complain of it."""
    for descriptor, stream, text in ((1, sys.stdout, None), (2, sys.stderr, message)):
        try:
            if text is not None:
                print(text, file=stream)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    raise SystemExit(status)


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
    parser = HfArgumentParser(groups, parents=[before], usage=usage, conflict_handler="resolve")
    # transformers' own knows true and false.
    help_bf16 = "mixed precision in bfloat16: true, false, or auto (true where the machine has instructions for it)"
    parser.add_argument("--bf16", type=_true_false_or_auto, nargs="?", const=True, default=False, help=help_bf16)
    defaults = vars(parser.parse_args([]))
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**read_recipe(argv.pop(0), variant.variant, set(defaults)))
    elif variant.variant:
        raise RecipeError(f"--variant {variant.variant} needs a recipe that has it, as the first argument")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value != defaults[name]}
    if given.get("bf16") == "auto":
        given["bf16"] = resolve_bf16(parser.parse_args(argv))
        argv = [*argv, "--bf16", str(given["bf16"])]
    try:
        model, tokenizer, data, decoding, training, _ = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False
        )
    except (ValueError, OSError, ImportError) as error:  # a file or a package that an argument asks for is not there
        raise RecipeError(str(error)) from error
    if model.model:
        if tokenizer.tokenizer:
            raise RecipeError(
                f"tokenizer={tokenizer.tokenizer} does not go with model={model.model}, which brings its own: leave it "
                "out"
            )
        tokenizer.tokenizer = model.model
    elif training.lora_rank:
        raise RecipeError(
            f"lora_rank={training.lora_rank} adapts a model that is there already: name it by model, or leave it out"
        )
    if data.streaming:
        _check_streaming(data, training)
    if data.bpe_dropout and not tokenizer.tokenizer and tokenizer.tokenizer_model != "bpe":
        raise RecipeError(
            f"bpe_dropout={data.bpe_dropout} drops merges, and tokenizer_model={tokenizer.tokenizer_model} has none: "
            "set bpe_dropout to 0, or tokenizer_model to bpe"
        )
    return Recipe(model, tokenizer, data, decoding, training, given)


def _true_false_or_auto(value: str) -> bool | str:
    return value if value == "auto" else string_to_bool(value)


def resolve_bf16(arguments: argparse.Namespace) -> bool:
    """
    What `bf16: auto` means: for a run that is resumed what it began with, else whether the machine that trains has
    instructions for bfloat16.
    """
    if asked := arguments.resume_from_checkpoint:
        run = Path(arguments.output_dir or "") if asked == "last" else Path(asked).parent
        if (run / "recipe.yaml").is_file():
            began = bool(read_recipe(str(run / "recipe.yaml"), None, set(vars(arguments))).get("bf16"))
            logger.info("bf16=auto is %s, as this run began", began)
            return began
    if arguments.use_cpu or not torch.accelerator.is_available():
        fast = is_native("bfloat16", torch.device("cpu"))
    elif torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = is_torch_bf16_gpu_available()
    logger.info("bf16=auto is %s: this machine has %s for bfloat16", fast, "instructions" if fast else "none")
    return fast


def _check_streaming(data: DataArguments, training: TrainingArguments) -> None:
    """
    Refuses what a stream of training rows cannot do.

    Raises:
        RecipeError: names the field, and what would be right.
    """
    budget = training.per_device_train_batch_tokens
    refused: dict[str, tuple[bool, str]] = {
        "max_steps": (training.max_steps <= 0, "a stream has no length: say after how many updates the run ends"),
        "train_sampling_strategy": (
            training.train_sampling_strategy != "token_budget",
            "batches of a stream are made by tokens: set token_budget",
        ),
        "eval_strategy": (training.eval_strategy == "epoch", "a stream has no epochs: set steps, and eval_steps"),
        "save_strategy": (training.save_strategy == "epoch", "a stream has no epochs: set steps, and save_steps"),
        "dataloader_num_workers": (training.dataloader_num_workers > 0, "a stream reads ahead by a thread: set 0"),
        "ignore_data_skip": (training.ignore_data_skip, "a stream resumes where it stopped, at no cost: set false"),
        "dataset": (
            (data.dataset or "").startswith("phrasebook:"),
            "the phrasebook is small, and made in memory: set streaming to false",
        ),
        "drop_duplicates": (
            data.drop_duplicates,
            "it needs all rows that came before in memory: leave duplicates out of the data beforehand",
        ),
        "bpe_dropout": (data.bpe_dropout > 0, "it cuts rows that stay in memory: set 0"),
        "max_source_length": (data.max_source_length > budget, f"no batch of {budget} tokens holds such a row"),
        "max_target_length": (data.max_target_length > budget, f"no batch of {budget} tokens holds such a row"),
    }
    for name, (wrong, reason) in refused.items():
        if wrong:
            value = (vars(training) | vars(data))[name]
            raise RecipeError(f"{name}={getattr(value, 'value', value)} does not go with streaming: {reason}")


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

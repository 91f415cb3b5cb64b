"""What a run can be told: by a YAML recipe, and by `--field value` on the command line, which comes after it."""

import argparse
import dataclasses
import difflib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import sacrebleu
import torch
from accelerate.utils import DynamoBackend
from transformers import Seq2SeqTrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.utils import is_torch_bf16_gpu_available

from vanilla_transformer import VanillaTransformerConfig
from vanilla_transformer.engine_products import is_native

from .errors import RecipeError, UserError
from .options import OptionParser, plain, read_yaml, true_or_false, truth_or_text


logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"

# What can choose the best checkpoint, and whether more of it is better.
BEST_METRICS = {"bleu": True, "chrf": True, "ter": False, "exact_match": True, "loss": False, "perplexity": False}

# Options of transformers that would break a run off, or do nothing in one, and why. Only their default is taken.
REFUSED = {
    "accelerator_config": "deals batches of rows to processes, and batches by tokens are dealt already: leave it out",
    "auto_find_batch_size": "halves a number of rows, and batches are made by tokens: see by --check what fits",
    "batch_eval_metrics": "scores batch by batch, and BLEU is that of the whole set: leave it out",
    "bf16_full_eval": "casts a model that is not being trained, and none is evaluated here: leave it out",
    "enable_jit_checkpoint": "saves on SIGTERM, as every run does: leave it out",
    "eval_do_concat_batches": "keeps batches apart, and BLEU is that of the whole set: leave it out",
    "eval_use_gather_object": "gathers objects, and translations are gathered as tensors: leave it out",
    "fp16_full_eval": "casts a model that is not being trained, and none is evaluated here: leave it out",
    "generation_config": "names a file: set num_beams, length_penalty and max_new_tokens here",
    "include_for_metrics": "is for metrics that read more than translations and references: leave it out",
    "label_names": "names columns, and they are those of the model: leave it out",
    "label_smoothing_factor": "is the Trainer's slow smoothing, outside the model: set label_smoothing instead",
    "length_column_name": "names a column, and lengths are counted: leave it out",
    "liger_kernel_config": "is for kernels that this network has not: leave it out",
    "parallelism_config": "is no text: leave it out, and configure accelerate (docs/distributed.md)",
    "prediction_loss_only": "would leave no scores: set predict_with_generate to false to evaluate the loss alone",
    "restore_callback_states_from_checkpoint": "is not needed: early stopping counts on where a run resumes",
    "sortish_sampler": "belongs to another way to make batches: set train_sampling_strategy",
    "use_liger_kernel": "is for kernels that this network has not: leave it out",
}
# These take the name of a JSON file, too.
JSON_FILES = ("fsdp_config", "deepspeed")
# What activation_checkpointing_kwargs may say: others would be refused by torch at the first update.
CHECKPOINTING = {"every_n_layers": range(1, 1000), "offload": (True, False), "use_reentrant": (True, False)}

# What numbers must be: in words, and the fields. Beyond that the Trainer, its optimizer or numpy would fail without the
# field's name, after the data has been read or the model been trained.
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "at least 0": (
        lambda n: n >= 0,
        "learning_rate weight_decay warmup_steps adam_epsilon max_grad_norm r_drop_alpha dataloader_num_workers "
        "eval_delay save_total_limit neftune_noise_alpha",
    ),
    "above 0": (lambda n: n > 0, "num_train_epochs logging_steps eval_steps save_steps"),
    "at least 1": (
        lambda n: n >= 1,
        "gradient_accumulation_steps per_device_train_batch_tokens per_device_eval_batch_tokens "
        "per_device_train_batch_size per_device_eval_batch_size generation_num_beams average_checkpoints "
        "early_stopping_patience lora_rank num_beams max_new_tokens batch_tokens max_train_samples max_eval_samples "
        "max_source_length max_target_length shuffle_buffer phrasebook_size window n_best eval_accumulation_steps "
        "torch_empty_cache_steps dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout",
    ),
    "at least 2, the start of the target included": (lambda n: n >= 2, "generation_max_length"),
    "at least 0 and below 1": (lambda n: 0 <= n < 1, "adam_beta1 adam_beta2"),
    "above 0 and below 1, and near 1, e.g. 0.999": (lambda n: 0 < n < 1, "ema_decay"),
    "at least 1, or -1 to count epochs (num_train_epochs)": (lambda n: n >= 1 or n == -1, "max_steps"),
    "between 0 and 2**32 - 1": (lambda n: 0 <= n < 2**32, "seed data_seed"),
    # Lengths to the power of it must be numbers that a float can hold.
    "between -50 and 50": (lambda n: -50 <= n <= 50, "length_penalty"),
}
# No whole number is as large: torch and numpy would fail without the field's name.
LARGEST = 2**63


def check_numbers(arguments: Any, kind: type[UserError] = RecipeError) -> None:
    """
    Compares the fields of arguments of any kind with `LIMITS`; one that is None was left out.

    Raises:
        UserError: of that kind; it names the field, and what it must be.
    """
    for words, (holds, names) in LIMITS.items():
        for name in names.split():
            value = getattr(arguments, name, None)
            largest = LARGEST if isinstance(value, int) else math.inf
            if value is not None and not (abs(value) < largest and holds(value)):
                too_large = f", and below {largest}" if abs(value) >= largest else ""
                raise kind(f"{name}={value} must be {words}{too_large}")


def refuse(values: Mapping[str, Any], wrong: dict[str, tuple[bool, str]]) -> None:
    """
    Args:
        values: of all fields.
        wrong: by field, whether its value is refused, and what is wrong with it, in words.

    Raises:
        RecipeError: one is.
    """
    for name, (is_wrong, reason) in wrong.items():
        if is_wrong:
            raise RecipeError(f"{name}={plain(values[name])} {reason}")


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
    lr_scheduler_type: SchedulerType | str = field(default="inverse_sqrt", metadata={"help": "transformers' schedule"})
    warmup_steps: float = field(default=4000, metadata={"help": "updates of linear warm-up"})
    adam_beta2: float = field(default=0.98, metadata={"help": "Adam's beta 2"})
    adam_epsilon: float = field(default=1e-9, metadata={"help": "Adam's epsilon"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "clip gradients to this norm (0: never)"})
    train_sampling_strategy: str = field(
        default="token_budget",
        metadata={
            "help": "batches bounded by tokens; transformers' own (random, sequential, group_by_length) count rows",
            "choices": ["token_budget", "random", "sequential", "group_by_length", "batch_rebalance"],
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
    eval_strategy: IntervalStrategy | str = field(
        default="epoch", metadata={"help": "when to evaluate: no, steps or epoch"}
    )
    save_strategy: SaveStrategy | str = field(default="epoch", metadata={"help": "when to save, and keep the best"})
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
    # transformers' parser would make a bool of it.
    include_num_input_tokens_seen: str = field(
        default="no", metadata={"help": "log the source tokens so far", "choices": ["all", "non_padding", "no"]}
    )
    # HfArgumentParser needs None first.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="tensorboard", metadata={"help": "where curves are logged"}
    )

    def __post_init__(self):
        check_numbers(self)
        for option in fields(self):
            default = option.default_factory() if callable(option.default_factory) else option.default
            if option.name in REFUSED and (value := getattr(self, option.name)) != default:
                raise RecipeError(f"{option.name}={value} {REFUSED[option.name]}")
        metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if metric not in BEST_METRICS:
            raise RecipeError(f"metric_for_best_model={metric!r} is unknown: choose one of {', '.join(BEST_METRICS)}")
        if self.greater_is_better is None:
            self.greater_is_better = BEST_METRICS[metric]
        # transformers asks to be told that there is no accelerator: else it refuses bf16, and warns of pinned memory.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        self._check_json()
        self._check_loading()
        self._check_compiler()
        super().__post_init__()
        if self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            # Their own default takes every metric for one of which less is better.
            better = {"mode": "max" if self.greater_is_better else "min"}
            self.lr_scheduler_kwargs = better | (self.lr_scheduler_kwargs or {})
        self._check_endings()
        if self.fsdp and self.world_size == 1:
            raise RecipeError(
                f"fsdp={self.fsdp} shards a model over processes, and this is a single one: leave it out, or start "
                "several by accelerate launch (docs/distributed.md)"
            )
        self._check_trackers()
        self._check_hub()

    def _check_json(self) -> None:
        """Refuses text where a dict is needed: transformers would fall over it without the field's name, or later."""
        for name in self._VALID_DICT_FIELDS:
            text = getattr(self, name)
            if not isinstance(text, str) or (name in JSON_FILES and not text.startswith("{")):
                continue
            try:
                told = json.loads(text)
            except ValueError as error:
                raise RecipeError(f'{name}={text} must be JSON, {{"option": value}}: {error}') from error
            if not isinstance(told, dict):
                raise RecipeError(f'{name}={text} must be JSON of the form {{"option": value}}')
            if name.endswith("checkpointing_kwargs"):
                self._check_checkpointing(name, told)

    def _check_checkpointing(self, name: str, told: dict[str, Any]) -> None:
        """Refuses options that torch would refuse at the first update."""
        for option, value in told.items():
            known = (False,) if option == "offload" and self.use_cpu else CHECKPOINTING.get(option, ())
            if value not in known:
                raise RecipeError(
                    f"{name}: {option}={value} is not to be had: every_n_layers is a number from 1, use_reentrant true "
                    "or false, and so is offload, which needs a GPU"
                )

    def _check_loading(self) -> None:
        """Refuses what does not go with batches by tokens, with as many workers, or with this machine."""
        by_tokens, workers = self.train_sampling_strategy == "token_budget", self.dataloader_num_workers
        no_workers = (
            "is for processes that load data, and dataloader_num_workers=0 has none: raise it, or leave this out"
        )
        refused = {
            "per_device_train_batch_size": (
                by_tokens and self.per_device_train_batch_size != 8,
                "counts rows, and batches are made by tokens: set per_device_train_batch_tokens instead (or "
                "train_sampling_strategy=random)",
            ),
            "per_device_eval_batch_size": (
                self.per_device_eval_batch_size != 8,
                "counts rows, and batches are made by tokens: set per_device_eval_batch_tokens instead",
            ),
            "dataloader_drop_last": (
                by_tokens and self.dataloader_drop_last,
                "drops an incomplete batch, and batches by tokens are never incomplete: leave it out",
            ),
            "dataloader_persistent_workers": (self.dataloader_persistent_workers and not workers, no_workers),
            "dataloader_multiprocessing_context": (
                self.dataloader_multiprocessing_context is not None and not workers,
                no_workers,
            ),
            "ddp_backend": (
                self.ddp_backend is not None and int(os.environ.get("WORLD_SIZE", 1)) == 1,
                "is for several processes, and this is a single one: leave it out",
            ),
            "debug": ("tpu_metrics_debug" in (self.debug or ()), "is for TPUs: leave it out"),
            "fp16": (self.fp16 and self.use_cpu, "needs a GPU: leave it out, or set bf16 to auto"),
            "fsdp_config": (
                bool(self.fsdp_config) and not self.fsdp,
                "tunes fsdp, which is off: set fsdp to true, or leave it out",
            ),
        }
        refuse(vars(self), refused)

    def _check_compiler(self) -> None:
        """Refuses what torch.compile does not know, which would be told at the first update."""
        known = {}
        if self.torch_compile_backend is not None:
            known["torch_compile_backend"] = [name.lower() for name in DynamoBackend.list()]
        if self.torch_compile_mode is not None:
            from torch._inductor import list_mode_options  # takes its time

            known["torch_compile_mode"] = list(list_mode_options())
        for name, choices in known.items():
            if (value := getattr(self, name)) not in choices:
                raise RecipeError(f"{name}={value} is unknown: choose one of {', '.join(choices)}")

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


ABOUT = """\
Trains a model by a recipe, a YAML file whose fields are these options: a path, or the name of an installed one, such as
quickstart.yaml. Options on the command line come after the recipe. docs/training.md explains them all."""


def recipe_parser() -> OptionParser:
    """The parser of recipes and command lines."""
    groups = (ModelArguments, TokenizerArguments, DataArguments, DecodingArguments, TrainingArguments)
    usage = "%(prog)s [RECIPE.yaml] [--variant NAME] [--field value ...]"
    # What the config takes where a recipe leaves a field of the network out.
    defaults = {option.name: getattr(VanillaTransformerConfig, option.name, None) for option in fields(ModelArguments)}
    parser = OptionParser(
        groups, hidden=REFUSED, defaults=defaults, usage=usage, description=ABOUT, conflict_handler="resolve"
    )
    parser.add_argument("--variant", help="one of the recipe's variants, e.g. a row of table3.yaml")
    # transformers' own knows true and false.
    help_bf16 = "mixed precision in bfloat16: true, false, or auto (true where the machine has instructions for it)"
    parser.add_argument("--bf16", type=_true_false_or_auto, nargs="?", const=True, default=False, help=help_bf16)
    # And of these it takes true and false for text.
    helps = {option.name: option.metadata["help"] for option in fields(TrainingArguments)}
    parser.add_argument("--fsdp", type=truth_or_text, nargs="?", const=True, help=helps["fsdp"])
    trackio = ("--trackio_static_space_id", "--trackio-static-space-id")
    parser.add_argument(*trackio, type=truth_or_text, help=helps["trackio_static_space_id"])
    return parser


def parse_recipe(argv: list[str]) -> Recipe:
    """
    Reads `[RECIPE.yaml] [--variant NAME] [--field value ...]`; what comes later counts.

    Args:
        argv: the command line. A recipe is a path, or the name of one that is installed with the package.

    Raises:
        RecipeError: the recipe cannot be read, or a field does not exist, or has no such value.
        SystemExit: `--help`.
    """
    parser = recipe_parser()
    defaults = vars(parser.parse_args([]))
    name = argv[0] if argv and not argv[0].startswith("-") else None
    argv = argv[1:] if name else argv
    variant = parser.parse_args(argv).variant
    if name:
        parser.set_defaults(**read_recipe(name, variant, parser))
    elif variant:
        raise RecipeError(f"--variant {variant} needs a recipe that has it, as the first argument")
    told = vars(parser.parse_args(argv))
    given = {field: plain(told[field]) for field in parser.hints if told[field] != defaults[field]}
    if given.get("bf16") == "auto":
        given["bf16"] = resolve_bf16(parser.parse_args(argv), parser)
        argv = [*argv, "--bf16", str(given["bf16"])]
    try:
        model, tokenizer, data, decoding, training, _ = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False
        )
    except (ValueError, OSError, ImportError) as error:  # a file or a package that an argument asks for is not there
        raise RecipeError(" ".join(str(error).split())) from error
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
    return value if value == "auto" else true_or_false(value)


def recipe_of_run(arguments: Any) -> Path | None:
    """
    What the run was told that the arguments resume, as far as its folder says it.

    Args:
        arguments: with `resume_from_checkpoint` and `output_dir`.
    """
    asked = arguments.resume_from_checkpoint
    if asked is None:
        return None
    recipe = Path(arguments.output_dir or "" if asked == "last" else Path(asked).parent, "recipe.yaml")
    return recipe if recipe.is_file() else None


def resolve_bf16(arguments: argparse.Namespace, parser: OptionParser) -> bool:
    """
    What `bf16: auto` means: for a run that is resumed what it began with, else whether the machine that trains has
    instructions for bfloat16.
    """
    if recipe := recipe_of_run(arguments):
        began = bool(read_recipe(str(recipe), None, parser).get("bf16"))
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
    refused = {
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
    prefixed = {name: (wrong, f"does not go with streaming: {reason}") for name, (wrong, reason) in refused.items()}
    refuse(vars(training) | vars(data), prefixed)


def read_recipe(name: str, variant: str | None, parser: OptionParser) -> dict[str, Any]:
    """
    The fields that a recipe sets, with those of one of its `variants` laid over them.

    Raises:
        RecipeError: there is no such file or variant, it is not a YAML mapping, or it sets a field that does not exist,
            or to what its type does not have.
    """
    path = next((p for p in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        installed = ", ".join(sorted(p.name for p in RECIPES.glob("*.yaml")))
        raise RecipeError(f"no recipe {name!r}: give the path of a YAML file, or one of {installed}")
    recipe = read_yaml(path)
    variants = recipe.pop("variants", None) or {}
    if not (isinstance(variants, dict) and all(isinstance(fields, dict) for fields in variants.values())):
        raise RecipeError(f"{path}: variants must hold lines of the form `name: {{field: value}}`")
    if variant is not None:
        if variant not in variants:
            raise RecipeError(f"{path} has no variant {variant!r}: choose one of {', '.join(variants) or 'none'}")
        recipe |= variants[variant]
    elif variants:
        raise RecipeError(f"{path} holds variants: choose one by --variant {'|'.join(variants)}")
    for field_name in recipe:
        if field_name not in parser.hints:
            likely = difflib.get_close_matches(field_name, parser.hints, n=1)
            hint = f"did you mean {likely[0]}?" if likely else "--help lists the fields"
            raise RecipeError(f"{path} sets the unknown field {field_name!r}: {hint}")
    try:
        return {field_name: parser.typed(field_name, value) for field_name, value in recipe.items()}
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error

"""
The rules of a recipe: which values a field may have, and which fields exclude each other.

Each broken rule raises an error that names the field, its value, and what would be right. The rules are checked as soon
as what they need is known: when TrainingArguments are made, when a recipe has been read, when data is loaded, and when
the data is known. Checks of the data, the tokenizer and the machine are in checks/.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import HubStrategy, IntervalStrategy

from vanilla_transformer.tokenization_units import UNITS
from vanilla_transformer.tokenization_vanilla_transformer import TOKENIZER_MODELS

from ..errors import DataError, RecipeError, UserError, message_of
from ..findings import Finding, error, warning
from ..metric_names import METRICS
from .options import plain


if TYPE_CHECKING:
    from .arguments import DataArguments, TokenizerArguments, TrainingArguments
    from .recipe import Recipe

# A field, whether its value is refused, and why: words that continue `field=value`.
Rule = tuple[str, Any, str]

# The metrics that can choose the best checkpoint -> whether higher is better.
BEST_METRICS = {name: metric.higher_is_better for name, metric in METRICS.items()} | {
    "loss": False,
    "perplexity": False,
}

# Options of transformers that would break a run or have no effect -> why. They must keep their defaults.
REFUSED = {
    "accelerator_config": "splits batches over processes, but token-budget batches are split already: leave it out",
    "auto_find_batch_size": "halves a number of rows, but batches are made by tokens: use --check to see what fits",
    "batch_eval_metrics": "scores batch by batch, but BLEU is computed over the whole set: leave it out",
    "bf16_full_eval": "applies only to evaluation outside training, which no run does: leave it out",
    "enable_jit_checkpoint": "saves on SIGTERM, as every run does: leave it out",
    "eval_do_concat_batches": "keeps batches apart, but BLEU is computed over the whole set: leave it out",
    "eval_use_gather_object": "gathers objects, but translations are gathered as tensors: leave it out",
    "fp16_full_eval": "applies only to evaluation outside training, which no run does: leave it out",
    "generation_config": "names a file: set num_beams, length_penalty and max_new_tokens here",
    "include_for_metrics": "is for metrics that need more than translations and references: leave it out",
    "label_names": "names columns, but the model fixes them: leave it out",
    "label_smoothing_factor": "is the Trainer's slow smoothing, outside the model: set label_smoothing instead",
    "length_column_name": "names a column, but lengths are counted from the tokens: leave it out",
    "liger_kernel_config": "configures kernels that this network does not have: leave it out",
    "parallelism_config": "cannot be given as text: leave it out, and configure accelerate (docs/distributed.md)",
    "prediction_loss_only": "would leave no scores: set predict_with_generate to false to evaluate the loss alone",
    "restore_callback_states_from_checkpoint": "is not needed: early stopping restores its count anyway: leave it out",
    "sortish_sampler": "belongs to another way of making batches: set train_sampling_strategy",
    "use_liger_kernel": "enables kernels that this network does not have: leave it out",
}
# These also take the name of a JSON file.
JSON_FILES = ("fsdp_config", "deepspeed")
# The values allowed in activation_checkpointing_kwargs: torch would refuse others, but only at the first update.
CHECKPOINTING = {"every_n_layers": range(1, 1000), "offload": (True, False), "use_reentrant": (True, False)}

# Each limit in words -> its test, and the fields it applies to. Without it, the Trainer, its optimizer or numpy would
# fail after reading the data or even after training, and would not name the field.
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "at least 0": (
        lambda n: n >= 0,
        "learning_rate weight_decay warmup_steps adam_epsilon max_grad_norm r_drop_alpha simcut_alpha "
        "dataloader_num_workers eval_delay save_total_limit neftune_noise_alpha",
    ),
    "above 0": (lambda n: n > 0, "num_train_epochs logging_steps eval_steps save_steps mixing_temperature"),
    "at least 1": (
        lambda n: n >= 1,
        "gradient_accumulation_steps per_device_train_batch_tokens per_device_eval_batch_tokens "
        "per_device_train_batch_size per_device_eval_batch_size generation_num_beams average_checkpoints "
        "early_stopping_patience lora_rank num_beams max_new_tokens batch_tokens max_train_samples max_eval_samples "
        "max_source_length max_target_length shuffle_buffer phrasebook_size window n_best eval_accumulation_steps "
        "torch_empty_cache_steps dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout",
    ),
    "at least 2, the start of the target included": (lambda n: n >= 2, "generation_max_length"),
    "at least 0 and below 1": (lambda n: 0 <= n < 1, "adam_beta1 adam_beta2 simcut_p"),
    "above 0 and below 1, and near 1, e.g. 0.999": (lambda n: 0 < n < 1, "ema_decay"),
    "at least 1, or -1 to count epochs (num_train_epochs)": (lambda n: n >= 1 or n == -1, "max_steps"),
    "between 0 and 2**32 - 1": (lambda n: 0 <= n < 2**32, "seed data_seed"),
    # length**length_penalty must not overflow a float.
    "between -50 and 50": (lambda n: -50 <= n <= 50, "length_penalty"),
}
# Integers must be below this: torch and numpy would fail without naming the field.
LARGEST = 2**63


def check_numbers(arguments: Any, kind: type[UserError] = RecipeError) -> None:
    """
    Checks all numeric fields against `LIMITS`. None means that the field was left out.

    Raises:
        UserError: a `kind` that names the field and its limit.
    """
    for words, (holds, names) in LIMITS.items():
        for name in names.split():
            value = getattr(arguments, name, None)
            largest = LARGEST if isinstance(value, int) else math.inf
            if value is not None and not (abs(value) < largest and holds(value)):
                too_large = f", and below {largest}" if abs(value) >= largest else ""
                raise kind(f"{name}={value} must be {words}{too_large}")


def refuse(values: Mapping[str, Any], rules: Iterable[Rule], kind: type[UserError] = RecipeError) -> None:
    """
    Args:
        values: the values of all fields.
        rules: the rules to check.
        kind: the class of the error.

    Raises:
        UserError: a `kind` for the first rule that is broken.
    """
    for name, is_wrong, reason in rules:
        if is_wrong:
            raise kind(f"{name}={plain(values[name])} {reason}")


def check_recipe(recipe: Recipe) -> None:
    """
    Checks fields of different groups against each other, after all have been read.

    Raises:
        RecipeError: two fields exclude each other.
    """
    model, tokenizer, data, training = recipe.model, recipe.tokenizer, recipe.data, recipe.training
    decoding = recipe.decoding
    check_numbers(recipe.mixture)
    rules: list[Rule] = [
        (
            "tokenizer",
            model.model and tokenizer.tokenizer,
            f"does not go with model={model.model}, which has its own: leave it out",
        ),
        (
            "lora_rank",
            training.lora_rank and not model.model,
            "adapts an existing model: name it by model, or leave it out",
        ),
        (
            "metric_for_best_model",
            training.eval_strategy != "no" and training.deciding_metric in {*METRICS} - {*decoding.metrics},
            f"is not computed: choose one of metrics={' '.join(decoding.metrics)}, or add it there",
        ),
    ]
    if data.streaming:
        check_stream(data, training)
    learned = not (model.model or tokenizer.tokenizer)
    rules.append(
        (
            "bpe_dropout",
            data.bpe_dropout and learned and tokenizer.tokenizer_model != "bpe",
            f"drops merges, and tokenizer_model={tokenizer.tokenizer_model} has none: set bpe_dropout to 0, or "
            "tokenizer_model to bpe",
        )
    )
    refuse(vars(training) | vars(data) | vars(tokenizer), rules)


def check_stream(data: DataArguments, training: TrainingArguments) -> None:
    """
    Checks the fields of a corpus that is streamed.

    Raises:
        RecipeError: streaming excludes a field's value.
    """
    refuse(vars(training) | vars(data), _rules_of_streams(data, training))


def check_tokenizer(tokenizer: TokenizerArguments) -> None:
    """
    Checks the fields of the vocabulary to learn. train_tokenizer checks its size.

    Raises:
        RecipeError: a value is unknown, the sides cannot have these vocabularies, or a field would have no effect.
    """
    model, target = tokenizer.tokenizer_model, tokenizer.target_tokenizer_model
    known = (*TOKENIZER_MODELS, *UNITS)
    rules: list[Rule] = [
        ("tokenizer_model", model not in known, f"is unknown: choose one of {', '.join(known)}"),
        (
            "target_tokenizer_model",
            target is not None and not {model, target} <= set(UNITS),
            f"and tokenizer_model={model} do not go together: both must be {' or '.join(UNITS)}, since subwords are "
            "learned from both sides at once",
        ),
        (
            "pretokenized",
            tokenizer.pretokenized and model in UNITS,
            f"is for subwords, but tokenizer_model={model}: leave it out",
        ),
    ]
    refuse(vars(tokenizer), rules)


def _rules_of_streams(data: DataArguments, training: TrainingArguments) -> Iterator[Rule]:
    """What streaming excludes."""
    budget = training.per_device_train_batch_tokens
    rules: list[Rule] = [
        ("max_steps", training.max_steps <= 0, "a stream has no length: set the number of updates"),
        (
            "train_sampling_strategy",
            training.train_sampling_strategy != "token_budget",
            "streamed batches are made by tokens: set token_budget",
        ),
        ("eval_strategy", training.eval_strategy == "epoch", "a stream has no epochs: set steps, and eval_steps"),
        ("save_strategy", training.save_strategy == "epoch", "a stream has no epochs: set steps, and save_steps"),
        ("dataloader_num_workers", training.dataloader_num_workers > 0, "a stream is read ahead by a thread: set 0"),
        ("ignore_data_skip", training.ignore_data_skip, "a stream resumes where it stopped, at no cost: set false"),
        (
            "dataset",
            (data.dataset or "").startswith("phrasebook:"),
            "the phrasebook is small and made in memory: set streaming to false",
        ),
        (
            "drop_duplicates",
            data.drop_duplicates,
            "it would have to keep all earlier rows in memory: remove duplicates from the data beforehand",
        ),
        ("bpe_dropout", data.bpe_dropout > 0, "it needs rows that stay in memory: set 0"),
        ("max_source_length", data.max_source_length > budget, f"no batch of {budget} tokens holds such a row"),
        ("max_target_length", data.max_target_length > budget, f"no batch of {budget} tokens holds such a row"),
    ]
    for name, is_wrong, reason in rules:
        yield name, is_wrong, f"does not go with streaming: {reason}"


def check_data(data: DataArguments) -> None:
    """
    Checks the fields that locate and filter the text, before any is read.

    Raises:
        DataError: the data is given twice or not at all, or a value is invalid.
    """
    named = [name for name in ("train_file", "validation_file", "test_file") if getattr(data, name)]
    if data.dataset and named:
        raise DataError(f"dataset={data.dataset!r} and {named[0]} are both given: choose one source of data")
    if not data.dataset and not named:
        raise DataError("no data: give a dataset, or train_file, validation_file or test_file")
    check_numbers(data, DataError)
    ratio = data.max_length_ratio
    rules: list[Rule] = [
        ("bpe_dropout", not 0 <= data.bpe_dropout <= 1, "must lie between 0 and 1: it is a probability"),
        (
            "identify_languages",
            data.identify_languages and not (data.source_lang or data.target_lang),
            "needs to know which they are: name them by source_lang and target_lang",
        ),
        (
            "max_length_ratio",
            ratio is not None and not ratio >= 1,
            "must be at least 1: it is the longer side's number of tokens divided by the shorter side's",
        ),
        *_rules_of_languages(data),
    ]
    refuse(vars(data), rules, DataError)


def _rules_of_languages(data: DataArguments) -> Iterator[Rule]:
    """A row that names one of its languages needs the other too."""
    for side, other in (("source_lang", "target_lang"), ("target_lang", "source_lang")):
        known = getattr(data, f"{other}_column") or getattr(data, other)
        yield (
            f"{side}_column",
            getattr(data, f"{side}_column") and not known,
            f"names one language of each row, but the other is not given: set {other} or {other}_column",
        )


def check_decoding(arguments: Any) -> None:
    """
    Checks the fields of decoding and scoring, in DecodingArguments or EvaluationArguments.

    Raises:
        RecipeError: a number is outside its limits, sacrebleu has no such tokenizer, or a metric is unknown.
    """
    check_numbers(arguments)
    if arguments.bleu_tokenize is not None:
        check_bleu_tokenizer(arguments.bleu_tokenize)
    if arguments.metrics is not None:
        check_metrics(arguments.metrics)


def check_metrics(names: list[str]) -> None:
    """
    Raises:
        RecipeError: a metric is unknown, or there is none.
    """
    for name in names or [""]:
        if name not in METRICS:
            raise RecipeError(f"metrics={name} is unknown: choose among {', '.join(METRICS)}")


def check_bleu_tokenizer(name: str) -> None:
    """
    Raises:
        RecipeError: sacrebleu has no tokenizer of this name, or cannot use it here.
    """
    import sacrebleu

    try:
        sacrebleu.BLEU(tokenize=name)
    except KeyError:
        known = ", ".join(sacrebleu.BLEU.TOKENIZERS)
        raise RecipeError(f"bleu_tokenize={name!r} is unknown: choose one of {known}") from None
    except (ImportError, RuntimeError, OSError) as error:  # a package is missing, or a download failed
        raise RecipeError(f"bleu_tokenize={name} cannot be used here: {message_of(error)}") from error


def check_training_as_given(args: TrainingArguments) -> None:
    """
    Checks TrainingArguments before transformers does, which would fail later or without naming the field.

    Raises:
        RecipeError: a value is invalid, or two fields exclude each other.
    """
    check_numbers(args)
    defaults = {
        option.name: option.default_factory() if callable(option.default_factory) else option.default
        for option in fields(args)
        if option.name in REFUSED
    }
    refuse(vars(args), ((name, getattr(args, name) != value, REFUSED[name]) for name, value in defaults.items()))
    if args.deciding_metric not in BEST_METRICS:
        raise RecipeError(
            f"metric_for_best_model={args.deciding_metric!r} is unknown: choose one of {', '.join(BEST_METRICS)}"
        )
    _check_json(args)
    refuse(vars(args), [*_rules_of_loading(args), *_rules_of_the_compiler(args)])


def _check_json(args: TrainingArguments) -> None:
    """Refuses text that is not a JSON object where transformers needs a dict."""
    for name in args._VALID_DICT_FIELDS:
        text = getattr(args, name)
        if not isinstance(text, str) or (name in JSON_FILES and not text.startswith("{")):
            continue
        try:
            options = json.loads(text)
        except ValueError as error:
            raise RecipeError(f'{name}={text} must be JSON, {{"option": value}}: {error}') from error
        if not isinstance(options, dict):
            raise RecipeError(f'{name}={text} must be JSON of the form {{"option": value}}')
        if name.endswith("checkpointing_kwargs"):
            _check_checkpointing(name, options, args.use_cpu)


def _check_checkpointing(name: str, options: dict[str, Any], use_cpu: bool) -> None:
    """Refuses options of activation checkpointing that torch would refuse at the first update."""
    for option, value in options.items():
        known = (False,) if option == "offload" and use_cpu else CHECKPOINTING.get(option, ())
        if value not in known:
            raise RecipeError(
                f"{name}: {option}={value} is not possible: every_n_layers must be at least 1, use_reentrant and "
                "offload true or false, and offload needs a GPU"
            )


def _rules_of_loading(args: TrainingArguments) -> list[Rule]:
    """What token-budget batches, the number of workers, or this machine exclude."""
    by_tokens, workers = args.train_sampling_strategy == "token_budget", args.dataloader_num_workers
    no_workers = "is for processes that load data, but dataloader_num_workers=0: raise it, or leave this out"
    return [
        (
            "per_device_train_batch_size",
            by_tokens and args.per_device_train_batch_size != 8,
            "counts rows, but batches are made by tokens: set per_device_train_batch_tokens instead (or "
            "train_sampling_strategy=random)",
        ),
        (
            "per_device_eval_batch_size",
            args.per_device_eval_batch_size != 8,
            "counts rows, but batches are made by tokens: set per_device_eval_batch_tokens instead",
        ),
        (
            "dataloader_drop_last",
            by_tokens and args.dataloader_drop_last,
            "drops an incomplete last batch, but token-budget batches are never incomplete: leave it out",
        ),
        ("dataloader_persistent_workers", args.dataloader_persistent_workers and not workers, no_workers),
        (
            "dataloader_multiprocessing_context",
            args.dataloader_multiprocessing_context is not None and not workers,
            no_workers,
        ),
        (
            "ddp_backend",
            args.ddp_backend is not None and int(os.environ.get("WORLD_SIZE", 1)) == 1,
            "is for several processes, but this run has one: leave it out",
        ),
        ("debug", "tpu_metrics_debug" in (args.debug or ()), "is for TPUs: leave it out"),
        ("fp16", args.fp16 and args.use_cpu, "needs a GPU: leave it out, or set bf16 to auto"),
        (
            "fsdp_config",
            args.fsdp_config and not args.fsdp,
            "configures fsdp, which is off: set fsdp to true, or leave it out",
        ),
    ]


def _rules_of_the_compiler(args: TrainingArguments) -> Iterator[Rule]:
    """Unknown values for torch.compile, which would fail only at the first update."""
    known = {}
    if args.torch_compile_backend is not None:
        from accelerate.utils import DynamoBackend

        known["torch_compile_backend"] = [name.lower() for name in DynamoBackend.list()]
    if args.torch_compile_mode is not None:
        from torch._inductor import list_mode_options  # slow to import

        known["torch_compile_mode"] = list(list_mode_options())
    for name, choices in known.items():
        yield name, getattr(args, name) not in choices, f"is unknown: choose one of {', '.join(choices)}"


def check_training(args: TrainingArguments) -> None:
    """
    Checks TrainingArguments after transformers has completed them.

    Raises:
        RecipeError: two fields exclude each other, or would publish a secret or a pickle.
    """
    several = "shards a model over processes, but this run has one: leave it out, or start several by accelerate "
    refuse(
        vars(args),
        [
            *_rules_of_endings(args),
            *_rules_of_regularisers(args),
            ("fsdp", args.fsdp and args.world_size == 1, f"{several}launch (docs/distributed.md)"),
        ],
    )
    _check_trackers(args)
    # The message must not show its value, a secret.
    if args.hub_token is not None:
        raise RecipeError(
            "hub_token would be published in recipe.yaml and the model card: leave it out, and log in by "
            "`hf auth login` or set the environment variable HF_TOKEN"
        )
    pickles = args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
    remedy = "set every_save, which pushes each checkpoint's model, or end"
    refuse(vars(args), [("hub_strategy", pickles, f"would push the optimizer's state and other pickles: {remedy}")])


def _rules_of_regularisers(args: TrainingArguments) -> list[Rule]:
    """R-Drop and SimCut both compare two passes."""
    return [
        (
            "simcut_alpha",
            args.simcut_alpha and args.r_drop_alpha,
            f"does not go with r_drop_alpha={args.r_drop_alpha:g}: both compare two passes of each batch; leave one of "
            "them out",
        ),
    ]


def _rules_of_endings(args: TrainingArguments) -> list[Rule]:
    """Fields that contradict each other about the run's final weights."""
    mean, limit = args.average_checkpoints, args.save_total_limit
    return [
        (
            "average_checkpoints",
            mean and limit and mean > limit,
            f"is more than the checkpoints that are kept: raise save_total_limit={limit} to at least as many",
        ),
        (
            "average_checkpoints",
            mean and args.load_best_model_at_end,
            "ends with the mean of the last checkpoints, load_best_model_at_end=True with the best: set "
            "load_best_model_at_end to false, or leave average_checkpoints out",
        ),
        (
            "average_checkpoints",
            mean and args.ema_decay is not None,
            f"and ema_decay={args.ema_decay} both average the weights: leave one of them out",
        ),
        (
            "average_checkpoints",
            mean and args.lora_rank,
            f"needs whole models, but checkpoints with lora_rank={args.lora_rank} hold adapters only: leave it out, or "
            "set ema_decay instead",
        ),
        (
            "average_checkpoints",
            mean and args.save_strategy == "no",
            "has nothing to average with save_strategy=no: set save_strategy to epoch or steps",
        ),
        (
            "early_stopping_patience",
            args.early_stopping_patience and (args.eval_strategy == "no" or not args.metric_for_best_model),
            f"needs a score, but eval_strategy={IntervalStrategy(args.eval_strategy).value} and "
            f"metric_for_best_model={args.metric_for_best_model}: set both",
        ),
    ]


def _check_trackers(args: TrainingArguments) -> None:
    """Refuses a tracker that is unknown or not installed. transformers would do so only after all preparation."""
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    for name in args.report_to or []:
        if name not in installed:
            raise RecipeError(
                f"report_to={name} is not an installed tracker: choose among {', '.join(installed)}, none"
            )


def check_sharding(args: TrainingArguments, sharded: bool) -> None:
    """
    Checks the fields that need the whole model, once it is known whether FSDP or DeepSpeed shards it.

    Raises:
        RecipeError: `ema_decay` or `lora_rank` with a sharded model.
    """
    remedy = "needs every process to hold the whole model: leave it out, or train without FSDP and DeepSpeed"
    names = ("ema_decay", "lora_rank")
    refuse(vars(args), ((name, sharded and getattr(args, name) is not None, remedy) for name in names))


def check_fields(args: TrainingArguments, has_validation: bool) -> Iterator[Finding]:
    """
    Checks evaluation, checkpoints and averages against each other, once it is known whether there is validation data.

    Args:
        args: the run's arguments.
        has_validation: whether there is a validation split.
    """
    chooses = args.load_best_model_at_end or args.early_stopping_patience or args.save_strategy == "best"
    if args.eval_strategy != "no" and not has_validation:
        yield error(
            "fields",
            f"eval_strategy={IntervalStrategy(args.eval_strategy).value} needs a validation split: give "
            "validation_file, or set eval_strategy=no and load_best_model_at_end=false",
        )
    if args.eval_on_start and not has_validation:
        yield error("fields", "eval_on_start=true needs a validation split: give validation_file, or leave it out")
    if args.save_only_model and args.save_strategy != "no":
        yield warning(
            "fields",
            "save_only_model=true saves checkpoints without the states of the optimizer and the schedule: this run "
            "cannot be resumed",
        )
    if args.learning_rate is None and args.warmup_steps < 1:
        yield error(
            "fields",
            f"learning_rate defaults to the paper's (d_model * warmup_steps)**-0.5, which is impossible with "
            f"warmup_steps={args.warmup_steps:g}: set learning_rate, or warmup_steps of at least 1",
        )
    if chooses and args.deciding_metric not in ("loss", "perplexity") and not args.predict_with_generate:
        yield error(
            "fields",
            f"metric_for_best_model={args.deciding_metric} needs translations, but predict_with_generate=false makes "
            "none: set it to true, or set metric_for_best_model=loss",
        )
    if args.early_stopping_patience and not (args.load_best_model_at_end or args.average_checkpoints):
        yield warning(
            "fields",
            "early_stopping_patience ends the run after its best checkpoint, but load_best_model_at_end=false keeps "
            "the last: set it to true",
        )

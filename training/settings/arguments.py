"""
The fields of a recipe: what a run can be told, in a YAML file or as `--field value` on the command line.

Which values are refused, and which do not go together, is in rules.py. recipe.py reads them.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from . import rules


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
        rules.check_decoding(self)


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
        # transformers refuses bf16, and warns of pinned memory, unless it is told that there is no accelerator.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        rules.check_training_as_told(self)
        if self.greater_is_better is None:
            self.greater_is_better = rules.BEST_METRICS[self.deciding_metric]
        super().__post_init__()
        if self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            # Their own default takes every metric for one of which less is better.
            better = {"mode": "max" if self.greater_is_better else "min"}
            self.lr_scheduler_kwargs = better | (self.lr_scheduler_kwargs or {})
        rules.check_training(self)

    @property
    def deciding_metric(self) -> str:
        """The metric that chooses the best checkpoint, without transformers' prefix."""
        return (self.metric_for_best_model or "loss").removeprefix("eval_")

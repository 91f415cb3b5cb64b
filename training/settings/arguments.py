"""
The fields of a recipe, set in a YAML file or by `--field value` on the command line.

rules.py checks the values and their combinations. recipe.py reads them.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from vanilla_transformer.tokenization_units import UNITS

from ..metric_names import DEFAULT_METRICS, METRICS
from . import rules


# What the name of a data set begins with that is made from the CLDR: phrasebook:en-de.
PHRASEBOOK = "phrasebook:"


@dataclass
class ModelArguments:
    """
    The network: fields of VanillaTransformerConfig, with the config's defaults.

    The tokenizer sets the special ids and the vocabulary size. `model` names a trained model to train further; its
    sizes and its tokenizer are used.
    """

    model: str | None = field(
        default=None, metadata={"help": "folder or Hub name of a model to train further (default: a new model)"}
    )
    d_model: int | None = field(default=None, metadata={"help": "size of the token vectors"})
    encoder_layers: int | None = field(default=None, metadata={"help": "number of encoder layers"})
    decoder_layers: int | None = field(default=None, metadata={"help": "number of decoder layers"})
    encoder_attention_heads: int | None = field(default=None, metadata={"help": "attention heads per encoder layer"})
    decoder_attention_heads: int | None = field(default=None, metadata={"help": "attention heads per decoder layer"})
    d_kv: int | None = field(default=None, metadata={"help": "size of each head's queries and keys"})
    d_v: int | None = field(default=None, metadata={"help": "size of each head's values"})
    encoder_ffn_dim: int | None = field(default=None, metadata={"help": "inner size of the encoder's FFN"})
    decoder_ffn_dim: int | None = field(default=None, metadata={"help": "inner size of the decoder's FFN"})
    activation_function: str | None = field(
        default=None, metadata={"help": "activation of the FFN; any name in transformers"}
    )
    dropout: float | None = field(default=None, metadata={"help": "dropout rate on sub-layer outputs and embeddings"})
    attention_dropout: float | None = field(default=None, metadata={"help": "dropout rate on attention weights"})
    activation_dropout: float | None = field(default=None, metadata={"help": "dropout rate inside the FFN"})
    position_embedding_type: str | None = field(default=None, metadata={"help": "sinusoidal or learned"})
    max_position_embeddings: int | None = field(default=None, metadata={"help": "number of learned positions"})
    normalize_before: bool | None = field(default=None, metadata={"help": "pre-norm instead of post-norm"})
    share_encoder_decoder_embeddings: bool | None = field(
        default=None, metadata={"help": "share one embedding table between source and target"}
    )
    tie_word_embeddings: bool | None = field(
        default=None, metadata={"help": "share one matrix between target embeddings and output projection"}
    )
    label_smoothing: float | None = field(default=None, metadata={"help": "smoothing of the training loss"})
    init_std: float | None = field(
        default=None,
        metadata={"help": "standard deviation of initial weights (default: Xavier; d_model**-0.5 for embeddings)"},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, flash_attention_2 or flex_attention (default: the fastest available)"},
    )

    def config_fields(self) -> dict[str, Any]:
        """The fields that were given, as keyword arguments of VanillaTransformerConfig."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        for name in ("model", "attn_implementation"):
            given.pop(name, None)
        return given


@dataclass
class TokenizerArguments:
    """The vocabulary: an existing tokenizer, or one learned from the training data."""

    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub name of a tokenizer, or a SentencePiece model, a file *.model (default: learn one)"
        },
    )
    tokenizer_model: str = field(
        default="bpe",
        metadata={
            "help": "what to learn: bpe or unigram (subwords), characters, or words (units that the text separates by "
            "spaces, such as phones)"
        },
    )
    target_tokenizer_model: str | None = field(
        default=None,
        metadata={"help": "the same for the target, if it is the other one of characters and words"},
    )
    vocab_size: int = field(
        default=37000,
        metadata={
            "help": "number of subwords to learn (paper: about 37,000, section 5.1); of characters and words at most"
        },
    )
    pretokenized: bool = field(
        default=False, metadata={"help": "the text is already tokenised: white space separates its words"}
    )
    tags: list[str] | None = field(
        default=None, metadata={"help": "words in angle brackets that are one token in any text, e.g. <formal>"}
    )

    def __post_init__(self):
        # In a recipe, one tag needs no list.
        if isinstance(self.tags, str):
            self.tags = [self.tags]
        rules.check_tokenizer(self)

    @property
    def units(self) -> tuple[str, str] | None:
        """The units of source and target, "characters" or "words"; None for subwords."""
        if self.tokenizer_model not in UNITS:
            return None
        return self.tokenizer_model, self.target_tokenizer_model or self.tokenizer_model


@dataclass
class DataArguments:
    """
    The parallel text: `dataset`, or files. Paths may contain environment variables ($NAME).

    Each split takes one data file (.jsonl, .json, .csv, .tsv, .parquet, .tmx, .xliff, .po or WMT's .xml), or two
    parallel text files, source then target. All but .parquet may be compressed (.gz, .xz, .bz2, .zst). Test text may
    have several references: source, then each of them.
    """

    dataset: str | None = field(
        default=None, metadata={"help": "Hub dataset name, or phrasebook:SOURCE-TARGET (e.g. phrasebook:en-de)"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of the Hub dataset"})
    data_dir: str | None = field(default=None, metadata={"help": "folder that the file names below are relative to"})
    train_file: list[str] | None = field(
        default=None, metadata={"help": "training data: one data file, or source and target text"}
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "validation data, to choose the best model"}
    )
    test_file: list[str] | None = field(
        default=None, metadata={"help": "test data, for the final score; text may have several references"}
    )
    source_lang: str | None = field(
        default=None, metadata={"help": "language code of the source (also its key in a `translation` column)"}
    )
    target_lang: str | None = field(
        default=None, metadata={"help": "language code of the target (also its key in a `translation` column)"}
    )
    source_column: str | None = field(
        default=None,
        metadata={"help": "column of the source text; without a header in .tsv and .csv, its number from 1"},
    )
    target_column: str | None = field(
        default=None,
        metadata={"help": "column of the target text; without a header in .tsv and .csv, its number from 1"},
    )
    source_lang_column: str | None = field(
        default=None, metadata={"help": "column of the source's language, for a model of several directions"}
    )
    target_lang_column: str | None = field(
        default=None, metadata={"help": "column of the target's language, for a model of several directions"}
    )
    group_column: list[str] | None = field(
        default=None,
        metadata={"help": "test column(s), e.g. of the corpus or the languages: each value gets a score of its own"},
    )
    data_name: str | None = field(default=None, metadata={"help": "name of the data in the model card"})
    max_source_length: int = field(
        default=256, metadata={"help": "skip training rows with more source tokens; the log says how many"}
    )
    max_target_length: int = field(
        default=256, metadata={"help": "skip training rows with more target tokens; the log says how many"}
    )
    max_length_ratio: float | None = field(
        default=None,
        metadata={
            "help": "skip training rows whose longer side has more than this many times the shorter side's tokens"
        },
    )
    drop_duplicates: bool = field(default=False, metadata={"help": "skip repeated training rows"})
    drop_identical: bool = field(
        default=False, metadata={"help": "skip training rows whose source and target are equal"}
    )
    drop_bad_encoding: bool = field(
        default=False, metadata={"help": "skip training rows decoded with the wrong encoding (e.g. Ã¼ for ü)"}
    )
    identify_languages: bool = field(
        default=False,
        metadata={"help": "skip training rows in another language than source_lang or target_lang (by py3langid)"},
    )
    bpe_dropout: float = field(
        default=0.0,
        metadata={"help": "probability of skipping a BPE merge, drawn anew in each epoch (Provilkov et al.: 0.1)"},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "use only this many training rows, the first ones"}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "use only this many validation and test rows"})
    streaming: bool = field(
        default=False, metadata={"help": "read training rows as they are needed, for max_steps updates"}
    )
    shuffle_buffer: int = field(
        default=100_000, metadata={"help": "number of streamed rows that are batched and shuffled together"}
    )
    phrasebook_size: int = field(default=50_000, metadata={"help": "number of training phrases in the phrasebook"})

    def __post_init__(self):
        # In a recipe, one file or column needs no list.
        for name in ("train_file", "validation_file", "test_file", "group_column"):
            if isinstance(values := getattr(self, name), str):
                setattr(self, name, [values])

    @property
    def has_header(self) -> bool:
        """Whether .csv and .tsv files begin with the names of their columns, rather than have them by number."""
        return not ((self.source_column or "").isdecimal() and (self.target_column or "").isdecimal())

    @property
    def direction(self) -> tuple[str | None, str | None]:
        """The codes of the source and target languages of all rows, as far as they are named."""
        if self.dataset and self.dataset.startswith(PHRASEBOOK):
            source, _, target = self.dataset.removeprefix(PHRASEBOOK).partition("-")
            return self.source_lang or source, self.target_lang or target
        return self.source_lang, self.target_lang

    @property
    def names_languages(self) -> bool:
        """Whether each row names one of its languages at least."""
        return bool(self.source_lang_column or self.target_lang_column)


@dataclass
class MixtureArguments:
    """
    Several training corpora, in place of `train_file`: how they are mixed, and how their text is changed.

    They are mappings, best written in a recipe (docs/training.md, "Several corpora"). corpora.py reads them.
    """

    corpora: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "training corpora: a mapping of names to fields (train_file, weight, transforms and others)"},
    )
    mixing_temperature: float = field(
        default=1.0,
        metadata={
            "help": "without weights, a corpus's share is its size ** (1 / this): 1 takes each row once in an epoch, a "
            "higher value gives small corpora more (Arivazhagan et al.: 5)"
        },
    )
    stages: list[dict] | None = field(
        default=None, metadata={"help": "parts of the run, in order, each with weights of its own and an end (until)"}
    )
    transforms: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "changes of training text, drawn anew in each epoch: a mapping of names to rates"},
    )


@dataclass
class DecodingArguments:
    """How the trained model translates (saved as its generation config), and how translations are scored."""

    num_beams: int = field(default=4, metadata={"help": "beam size (paper: 4, section 6.1)"})
    length_penalty: float = field(default=1.0, metadata={"help": "transformers' length_penalty: score / length**this"})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "maximum length of a translation in tokens (default: source length + 50)"}
    )
    bleu_tokenize: str = field(
        default="13a", metadata={"help": "sacrebleu's tokenizer for BLEU; none for text that is already tokenised"}
    )
    metrics: list[str] = field(
        default_factory=lambda: list(DEFAULT_METRICS),
        metadata={"help": f"scores to compute: {', '.join(METRICS)} (docs/evaluation.md)"},
    )

    def __post_init__(self):
        rules.check_decoding(self)


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """transformers' training arguments with the paper's optimizer (section 5.3) as defaults, and early stopping."""

    learning_rate: float | None = field(
        default=None, metadata={"help": "peak learning rate (default: the paper's, (d_model * warmup_steps)**-0.5)"}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="inverse_sqrt", metadata={"help": "schedule, by its name in transformers"}
    )
    warmup_steps: float = field(default=4000, metadata={"help": "number of updates of linear warm-up"})
    adam_beta2: float = field(default=0.98, metadata={"help": "Adam's beta 2"})
    adam_epsilon: float = field(default=1e-9, metadata={"help": "Adam's epsilon"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "clip gradients to this norm (0: no clipping)"})
    train_sampling_strategy: str = field(
        default="token_budget",
        metadata={
            "help": "how to make batches: token_budget bounds their tokens, the others (of transformers) count rows",
            "choices": ["token_budget", "random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )
    per_device_train_batch_tokens: int = field(
        default=4096,
        metadata={
            "help": "maximum source tokens and maximum target tokens of a batch, padding included, per process "
            "(paper: about 25,000 per update, over all processes and accumulated batches)"
        },
    )
    per_device_eval_batch_tokens: int = field(
        default=4096, metadata={"help": "the same in evaluation; generation multiplies it by the beam size"}
    )
    predict_with_generate: bool = field(default=True, metadata={"help": "score translations, not only the loss"})
    generation_num_beams: int | None = field(
        default=1, metadata={"help": "beam size of evaluations during training (1: greedy, which is fast)"}
    )
    eval_strategy: IntervalStrategy | str = field(
        default="epoch", metadata={"help": "when to evaluate: no, steps or epoch"}
    )
    save_strategy: SaveStrategy | str = field(
        default="epoch", metadata={"help": "when to save a checkpoint: no, steps, epoch or best"}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "number of checkpoints to keep"})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "end with the best checkpoint, not the last"})
    metric_for_best_model: str | None = field(
        default="bleu", metadata={"help": "metric that chooses the best checkpoint"}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after this many evaluations without a better score"}
    )
    hold_memory: bool = field(
        default=True,
        metadata={"help": "on a CPU: keep freed memory for the next update (false: return it to the system)"},
    )
    average_checkpoints: int | None = field(
        default=None,
        metadata={"help": "end with the mean of this many checkpoints, the last ones (paper: 5, big model: 20)"},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "evaluate and end with an exponential moving average of the weights, with this decay (e.g. 0.999)"
        },
    )
    r_drop_alpha: float = field(
        default=0.0,
        metadata={"help": "R-Drop: weight of the divergence between two passes with different dropout (Wu et al.: 5)"},
    )
    simcut_alpha: float = field(
        default=0.0,
        metadata={"help": "SimCut: weight of the divergence from a pass with some tokens cut out (Gao et al.: 3)"},
    )
    simcut_p: float = field(default=0.05, metadata={"help": "SimCut: probability that a token is cut out"})
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "train LoRA adapters of this rank on a frozen model, and merge them at the end"},
    )
    check: bool = field(
        default=False,
        metadata={"help": "check data and recipe, time a few updates and estimate the run; write nothing"},
    )
    # transformers' parser would make a bool of it.
    include_num_input_tokens_seen: str = field(
        default="no",
        metadata={"help": "log the number of source tokens seen so far", "choices": ["all", "non_padding", "no"]},
    )
    # HfArgumentParser needs None first.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="tensorboard", metadata={"help": "where to log curves"}
    )

    def __post_init__(self):
        # Without an accelerator, transformers refuses bf16 and warns about pinned memory unless use_cpu is set.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        rules.check_training_as_given(self)
        if self.greater_is_better is None:
            self.greater_is_better = rules.BEST_METRICS[self.deciding_metric]
        super().__post_init__()
        if self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            # Their default assumes that lower is better for every metric.
            better = {"mode": "max" if self.greater_is_better else "min"}
            self.lr_scheduler_kwargs = better | (self.lr_scheduler_kwargs or {})
        rules.check_training(self)

    @property
    def seed_of_data(self) -> int:
        """The seed of everything that is drawn from the data: the order of batches, BPE-dropout."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def deciding_metric(self) -> str:
        """The metric that chooses the best checkpoint, without the prefix `eval_`."""
        return (self.metric_for_best_model or "loss").removeprefix("eval_")

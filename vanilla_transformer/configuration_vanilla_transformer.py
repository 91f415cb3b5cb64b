"""The configuration of the encoder-decoder Transformer of "Attention Is All You Need" (Vaswani et al., 2017).

Every default is the paper's base model (Table 3, first row). The fields have the names of BART and Marian
where those have such a field, so that tools written for those models work with this one.
"""

from difflib import get_close_matches

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN


POSITION_EMBEDDING_TYPES = ("sinusoidal", "learned")

# Tensor parallelism splits the heads of every attention and the units of every feed-forward network over the ranks:
# by columns on the way in, by rows on the way out, so that each sub-layer communicates once. The tables are split by
# subwords, as is the output matrix that may be one of them.
ATTENTIONS = ("encoder.layers.*.self_attn", "decoder.layers.*.self_attn", "decoder.layers.*.encoder_attn")
TENSOR_PARALLEL_PLAN = {
    **dict.fromkeys(("shared", "encoder.embed_tokens", "decoder.embed_tokens"), "embedding_rowwise"),
    **{
        f"{attention}.{projection}": "colwise"
        for attention in ATTENTIONS
        for projection in ("q_proj", "k_proj", "v_proj")
    },
    **{f"{attention}.out_proj": "rowwise" for attention in ATTENTIONS},
    **{f"{stack}.layers.*.fc1": "colwise" for stack in ("encoder", "decoder")},
    **{f"{stack}.layers.*.fc2": "rowwise" for stack in ("encoder", "decoder")},
}


@strict
class VanillaTransformerConfig(PreTrainedConfig):
    """
    Describes one encoder-decoder Transformer. Sizes are counts of units; rates are probabilities in [0, 1).

    Args:
        vocab_size (`int`, defaults to 37000):
            Number of subwords the encoder reads (section 5.1: a shared vocabulary of about 37,000).
        decoder_vocab_size (`int`, *optional*):
            Number of subwords the decoder reads and predicts. Default: `vocab_size`. May differ only with
            `share_encoder_decoder_embeddings=False`.
        d_model (`int`, defaults to 512): Width of every token vector.
        encoder_layers, decoder_layers (`int`, default to 6): Depth N of each stack; they may differ.
        encoder_attention_heads, decoder_attention_heads (`int`, default to 8): Number of heads h.
        d_kv (`int`, *optional*): Width of one head's queries and keys, d_k. Default: `d_model / heads`.
        d_v (`int`, *optional*): Width of one head's values. Default: `d_model / heads`.
        encoder_ffn_dim, decoder_ffn_dim (`int`, default to 2048): Inner width d_ff of the feed-forward network.
        activation_function (`str`, defaults to "relu"): Any name that `transformers.activations.ACT2FN` knows.
        dropout (`float`, defaults to 0.1):
            On each sub-layer's output and on the sum of embeddings and positions (section 5.4).
        attention_dropout (`float`, defaults to 0.0): On the attention weights. The paper has none.
        activation_dropout (`float`, defaults to 0.0): Inside the feed-forward network. The paper has none.
        position_embedding_type (`str`, defaults to "sinusoidal"): "sinusoidal" (section 3.5) or "learned" (row E).
        max_position_embeddings (`int`, defaults to 1024):
            Rows of the table of learned positions. Sinusoids are computed for any length and ignore it.
        normalize_before (`bool`, defaults to `False`):
            `False`: LayerNorm(x + Sublayer(x)), the paper's post-norm. `True`: x + Sublayer(LayerNorm(x)), with a
            final LayerNorm at the end of each stack.
        scale_embedding (`bool`, defaults to `True`): Multiply embeddings by sqrt(d_model) (section 3.4).
        share_encoder_decoder_embeddings (`bool`, defaults to `True`): One table for source and target embeddings.
        tie_word_embeddings (`bool`, defaults to `True`):
            One matrix for the target embeddings and the output projection. Both together are the paper's three-way
            sharing (section 3.4).
        label_smoothing (`float`, defaults to 0.1):
            Mass spread over the whole vocabulary by the training loss (section 5.4). Evaluation never smooths.
        init_std (`float`, *optional*):
            Standard deviation of every new matrix, as in BART and Marian. With their 0.02 a small model learns to
            attend to the source in a third of the updates. Default: `d_model**-0.5` for embeddings, Xavier-uniform
            projections.
        layer_norm_eps (`float`, defaults to 1e-5): PyTorch's own default.
        pad_token_id, bos_token_id, eos_token_id (`int`, default to 0, 1, 2): As our tokenizers number them.
        decoder_start_token_id (`int`, defaults to 1): The decoder's first input: bos, so that pad is only padding.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type, or its value cannot make a
            network. The message names the field, the value and what would be right.

    Example:

        >>> from vanilla_transformer import VanillaTransformerConfig
        >>> VanillaTransformerConfig(d_model=256, encoder_attention_heads=4, decoder_attention_heads=4).d_model
        256
    """

    model_type = "vanilla_transformer"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }

    base_model_tp_plan = TENSOR_PARALLEL_PLAN
    base_model_pp_plan = {
        "encoder": (["input_ids", "attention_mask"], ["encoder_hidden_states"]),
        "decoder": (["input_ids", "encoder_hidden_states"], ["last_hidden_state"]),
    }
    base_model_fsdp_plan = {
        "encoder.layers.*": "free_full_weight",
        "decoder.layers.*": "free_full_weight",
    }

    vocab_size: int = 37000
    decoder_vocab_size: int | None = None
    d_model: int = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    d_kv: int | None = None
    d_v: int | None = None
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    activation_function: str = "relu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    position_embedding_type: str = "sinusoidal"
    max_position_embeddings: int = 1024
    normalize_before: bool = False
    scale_embedding: bool = True
    share_encoder_decoder_embeddings: bool = True
    tie_word_embeddings: bool = True
    label_smoothing: float | int = 0.1
    init_std: float | int | None = None
    layer_norm_eps: float | int = 1e-5
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1
    use_cache: bool = True
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        self._refuse_misspelt_fields(kwargs)
        if __package__ == "vanilla_transformer":
            # A repository may bring the pipeline's code for users without this package. This package has the pipeline,
            # and without this line transformers would ask the user to trust the repository's code.
            kwargs.pop("custom_pipelines", None)
        if self.decoder_vocab_size is None:
            self.decoder_vocab_size = self.vocab_size
        super().__post_init__(**kwargs)

    def _refuse_misspelt_fields(self, unknown: dict) -> None:
        """A config keeps unknown names, because tools add their own. Without this check a typo would be ignored."""
        if self.transformers_version is not None:
            # Loaded from a saved file: any extra name was added by a tool on purpose.
            return
        fields = list(VanillaTransformerConfig.__annotations__) + list(self.attribute_map)
        for name in unknown:
            if name not in fields and (likely := get_close_matches(name, fields, n=1, cutoff=0.8)):
                raise ValueError(f"unknown field {name}={unknown[name]!r}: did you mean {likely[0]}?")

    def validate_architecture(self) -> None:
        """Checks that the fields together describe a network (`@strict` runs each `validate_*` at construction)."""
        self._validate_sizes()
        self._validate_heads("encoder")
        self._validate_heads("decoder")
        self._validate_names()
        self._validate_rates()
        self._validate_embeddings()

    def _validate_sizes(self) -> None:
        sizes = ("vocab_size", "decoder_vocab_size", "d_model", "encoder_layers", "decoder_layers", "d_kv", "d_v")
        for name in (*sizes, "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size} must be a positive number")

    def _validate_heads(self, stack: str) -> None:
        name = f"{stack}_attention_heads"
        heads = getattr(self, name)
        if heads < 1:
            raise ValueError(f"{name}={heads} must be a positive number")
        if None in (self.d_kv, self.d_v) and self.d_model % heads:
            raise ValueError(
                f"{name}={heads} does not divide d_model={self.d_model}: "
                f"choose a divisor, or set both d_kv and d_v to the width that each head should have"
            )

    def _validate_names(self) -> None:
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"activation_function={self.activation_function!r} is unknown: "
                f"choose one of {', '.join(sorted(ACT2FN))}"
            )
        if self.position_embedding_type not in POSITION_EMBEDDING_TYPES:
            raise ValueError(
                f"position_embedding_type={self.position_embedding_type!r} is unknown: "
                f"choose one of {', '.join(POSITION_EMBEDDING_TYPES)}"
            )
        if self.position_embedding_type == "sinusoidal" and self.d_model % 2:
            raise ValueError(
                f"d_model={self.d_model} is odd, but sinusoids come in pairs of sine and cosine: "
                "make it even, or set position_embedding_type='learned'"
            )

    def _validate_rates(self) -> None:
        for name in ("dropout", "attention_dropout", "activation_dropout", "label_smoothing"):
            rate = getattr(self, name)
            if not 0 <= rate < 1:
                raise ValueError(f"{name}={rate} must be a rate of at least 0 and below 1")
        for name in ("init_std", "layer_norm_eps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")

    def _validate_embeddings(self) -> None:
        if self.share_encoder_decoder_embeddings and self.decoder_vocab_size != self.vocab_size:
            raise ValueError(
                f"decoder_vocab_size={self.decoder_vocab_size} differs from vocab_size={self.vocab_size}, so source "
                "and target cannot share one table: set share_encoder_decoder_embeddings=False"
            )

    def validate_token_ids(self) -> None:
        """Checks that each special token has a row in both tables: transformers itself only warns."""
        smallest = min(self.vocab_size, self.decoder_vocab_size or self.vocab_size)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            ids = getattr(self, name)
            for token_id in ids if isinstance(ids, list) else [ids]:
                if token_id is None and name in ("bos_token_id", "eos_token_id"):
                    continue
                if token_id is None or not 0 <= token_id < smallest:
                    raise ValueError(f"{name}={token_id} is outside the vocabulary: choose 0 to {smallest - 1}")

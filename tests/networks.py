"""Every shape of network that a recipe may ask for, as changes to the tiny configuration."""

NETWORKS = {
    "paper": {},
    "pre-norm": {"normalize_before": True},
    "learned positions": {"position_embedding_type": "learned"},
    "free d_k and d_v": {"d_kv": 6, "d_v": 10},
    "gelu": {"activation_function": "gelu"},
    "unscaled": {"scale_embedding": False},
    "separate vocabularies": {"decoder_vocab_size": 53, "share_encoder_decoder_embeddings": False},
}

# The paper's network, and one that differs wherever a program made of it could have been written for the paper's alone.
EXTREMES = {
    "as the paper": {},
    "all else": {
        "normalize_before": True,
        "activation_function": "gelu",
        "position_embedding_type": "learned",
        "share_encoder_decoder_embeddings": False,
        "decoder_vocab_size": 53,
        "d_kv": 6,
        "d_v": 10,
    },
}

"""What a configuration is by default, keeps in its file, and refuses."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from vanilla_transformer import VanillaTransformerConfig


# Each field out of bounds, and what the message must name: the field, its value, and a way out.
ERRORS = {
    "heads that do not divide": (
        {"encoder_attention_heads": 7},
        ["encoder_attention_heads=7", "d_model=512", "d_kv and d_v"],
    ),
    "decoder heads that do not divide": (
        {"decoder_attention_heads": 7, "d_kv": 64},
        ["decoder_attention_heads=7", "d_model=512"],
    ),
    "no heads": ({"decoder_attention_heads": 0}, ["decoder_attention_heads=0", "positive"]),
    "odd width of sinusoids": (
        {"d_model": 15, "encoder_attention_heads": 3, "decoder_attention_heads": 3},
        ["d_model=15", "odd", "learned"],
    ),
    "unknown activation": ({"activation_function": "rleu"}, ["activation_function='rleu'", "relu"]),
    "unknown positions": (
        {"position_embedding_type": "rotary"},
        ["position_embedding_type='rotary'", "sinusoidal, learned"],
    ),
    "two vocabularies in one table": (
        {"decoder_vocab_size": 100},
        ["decoder_vocab_size=100", "vocab_size=37000", "share_encoder_decoder_embeddings=False"],
    ),
    "no standard deviation": ({"init_std": 0.0}, ["init_std=0.0", "above 0"]),
    "no epsilon": ({"layer_norm_eps": 0.0}, ["layer_norm_eps=0.0", "above 0"]),
    "special token outside the smaller vocabulary": (
        {"decoder_vocab_size": 10, "share_encoder_decoder_embeddings": False, "eos_token_id": 10},
        ["eos_token_id=10", "0 to 9"],
    ),
    "one of several special tokens outside": ({"eos_token_id": [2, 37000]}, ["eos_token_id=37000", "0 to 36999"]),
    "no pad token": ({"pad_token_id": None}, ["pad_token_id=None", "0 to 36999"]),
    "misspelt field": ({"dropuot": 0.2}, ["dropuot=0.2", "did you mean dropout?"]),
    "another library's field": ({"encoder_layer": 3}, ["encoder_layer=3", "did you mean encoder_layers?"]),
    **{
        f"{name}={rate}": ({name: rate}, [f"{name}={rate}", "at least 0 and below 1"])
        for name in ("dropout", "attention_dropout", "activation_dropout", "label_smoothing")
        for rate in (-0.1, 1.0, float("nan"))
    },
    **{
        f"{name}={size}": ({name: size}, [f"{name}={size}", "positive"])
        for name in (
            "vocab_size",
            "decoder_vocab_size",
            "d_model",
            "encoder_layers",
            "decoder_layers",
            "d_kv",
            "d_v",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "max_position_embeddings",
        )
        for size in (0, -1)
    },
    **{
        f"{name} outside": ({name: token_id}, [f"{name}={token_id}", "0 to 36999"])
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
        for token_id in (-1, 37000)
    },
}


@pytest.mark.parametrize(("fields", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_what_cannot_make_a_network_is_refused_at_construction(fields, message):
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        VanillaTransformerConfig(**fields)
    for part in message:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", "512"),
        ("d_model", 512.0),
        ("dropout", "0.1"),
        ("normalize_before", "yes"),
        ("activation_function", 3),
        ("d_kv", [64]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(field, value):
    with pytest.raises(StrictDataclassError, match=field):
        VanillaTransformerConfig(**{field: value})


def test_heads_need_not_divide_where_both_widths_are_given():
    config = VanillaTransformerConfig(encoder_attention_heads=7, d_kv=64, d_v=32)
    assert (config.encoder_attention_heads, config.d_kv, config.d_v) == (7, 64, 32)


def test_an_odd_width_is_right_for_learned_positions():
    config = VanillaTransformerConfig(
        d_model=15, encoder_attention_heads=3, decoder_attention_heads=5, position_embedding_type="learned"
    )
    assert config.d_model == 15


def test_the_vocabulary_of_the_decoder_is_that_of_the_encoder_by_default():
    assert VanillaTransformerConfig(vocab_size=50).decoder_vocab_size == 50


def test_common_names_of_other_models_read_the_same_fields():
    config = VanillaTransformerConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
    assert (config.d_model, config.encoder_attention_heads, config.encoder_layers) == (64, 4, 2)
    config.hidden_size = 128
    assert config.d_model == 128


def test_a_round_trip_through_json_keeps_every_field(tiny_config, tmp_path):
    config = tiny_config(
        d_kv=6,
        d_v=10,
        decoder_vocab_size=53,
        share_encoder_decoder_embeddings=False,
        tie_word_embeddings=False,
        position_embedding_type="learned",
        normalize_before=True,
        eos_token_id=[2, 5],
        init_std=0.02,
    )
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "vanilla_transformer"
    for reloaded in (VanillaTransformerConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(reloaded) is VanillaTransformerConfig
        for name in VanillaTransformerConfig.__annotations__:
            assert getattr(reloaded, name) == getattr(config, name), name


def test_a_saved_configuration_with_a_tools_own_field_still_loads(tiny_config, tmp_path):
    config = tiny_config()
    config.layer_norm_epsilon = 1e-6
    config.save_pretrained(tmp_path)
    assert VanillaTransformerConfig.from_pretrained(tmp_path).layer_norm_epsilon == 1e-6


@pytest.mark.parametrize("change", [{"dropout": 1.5}, {"d_model": 17}, {"eos_token_id": 61}])
def test_a_file_that_was_edited_wrongly_is_refused_at_loading(tiny_config, tmp_path, change):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(StrictDataclassError, match="=".join(map(str, *change.items()))):
        AutoConfig.from_pretrained(tmp_path)

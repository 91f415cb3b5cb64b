"""conversion/ctranslate2.py: compares CTranslate2's output of a converted model with transformers' search."""

import copy
import re

import pytest
import torch
from transformers import GenerationMixin

from vanilla_transformer.tokenization_vanilla_transformer import SPECIAL_TOKENS


ctranslate2 = pytest.importorskip("ctranslate2", reason="the dev and bench extras install ctranslate2")
from vanilla_transformer.conversion.ctranslate2 import to_ctranslate2  # noqa: E402  (it needs ctranslate2)


LENGTHS = (7, 4, 1, 6, 5, 9, 3, 8)
NEW_TOKENS = 12
# With a value that is added to eos's bias, so that sentences end at different lengths.
SETTINGS = {
    "as the paper": ({}, 3),
    "pre-norm": ({"normalize_before": True}, 3),
    "learned positions": ({"position_embedding_type": "learned"}, 2),
    "three tables": ({"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}, 1),
    "gelu, another epsilon": ({"activation_function": "gelu", "layer_norm_eps": 1e-2}, 3),
    "unscaled embeddings": ({"scale_embedding": False}, 3),
}


def tokens(size=61):
    """A token for each id."""
    return [*SPECIAL_TOKENS.values(), *(f"w{number}" for number in range(len(SPECIAL_TOKENS), size))]


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize(("fields", "more"), SETTINGS.values(), ids=SETTINGS)
def test_ctranslate2_finds_what_generate_finds_with_its_scores(fields, more, beams, tiny_model, padded, tmp_path):
    model, words = tiny_model(**fields), tokens()
    with torch.no_grad():
        model.lm_head.bias[model.config.eos_token_id] += more
    source, mask = padded(LENGTHS)
    options = {"num_beams": beams, "max_new_tokens": NEW_TOKENS, **({"early_stopping": True} if beams > 1 else {})}
    expected = GenerationMixin.generate(model, source, attention_mask=mask, **options)

    to_ctranslate2(model, words, tmp_path / "converted")
    translator = ctranslate2.Translator(str(tmp_path / "converted"), inter_threads=1, intra_threads=1)
    found = translator.translate_batch(
        [[words[i] for i in row[:length]] for row, length in zip(source.tolist(), LENGTHS, strict=True)],
        beam_size=beams,
        max_decoding_length=NEW_TOKENS,
        min_decoding_length=0,
        return_end_token=True,
        return_scores=True,
    )
    model.double()
    lengths = set()
    for number, result in enumerate(found):
        row = expected[number, 1:].tolist()
        length = row.index(2) + 1 if 2 in row else NEW_TOKENS
        lengths.add(length)
        assert result.hypotheses[0] == [words[i] for i in row[:length]]
        with torch.no_grad():
            loss = model(source[[number], : LENGTHS[number]], labels=torch.tensor([row[:length]])).loss
        assert result.scores[0] == pytest.approx(-loss.item(), abs=1e-4)
    assert len(lengths) > 1


def rounded(x):
    """Rounds each row to 127 steps on either side of 0."""
    scale = 127 / x.abs().amax(dim=-1, keepdim=True)
    return (x * scale).round() / scale


def in_eight_bits(model, states):
    """The same network with rounded tables and weights, and with rounded states as factors of products if asked."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.weight.data = rounded(module.weight.data)
        if states and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, arguments: (rounded(arguments[0]),))
    return model


# In float32 the rounded weights are multiplied by states as they are: that works on every processor.
COMPUTE_TYPES = [
    "float32",
    pytest.param(
        "int8",
        marks=pytest.mark.skipif(
            not torch.cpu._is_vnni_supported(),
            reason="without VNNI, CTranslate2's sums of products in 8 bits saturate and are other numbers",
        ),
    ),
]


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("fields", [{}, {"normalize_before": True, "activation_function": "gelu"}], ids=str)
@torch.no_grad()
def test_int8_gives_each_token_the_probability_that_rounding_explains(
    fields, compute_type, tiny_model, padded, tmp_path
):
    """In int8 the outputs differ from the model's, but equal those of a model that is rounded in the same way."""
    model, words = tiny_model(**fields), tokens()
    before = copy.deepcopy(model.state_dict())
    to_ctranslate2(model, words, tmp_path / "converted", quantization="int8")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    source, mask = padded(LENGTHS)
    target, _ = padded((10,) * len(LENGTHS), seed=1)
    target[:, -1] = model.config.eos_token_id
    threads = {"inter_threads": 1, "intra_threads": 1}
    translator = ctranslate2.Translator(str(tmp_path / "converted"), compute_type=compute_type, **threads)
    assert translator.compute_type.startswith(compute_type)
    scored = translator.score_batch(
        [[words[i] for i in row[:length]] for row, length in zip(source.tolist(), LENGTHS, strict=True)],
        [[words[i] for i in row[:-1]] for row in target.tolist()],
    )
    found = torch.tensor([result.log_probs for result in scored])
    of_model, of_rounded = (
        each(source, mask, labels=target).logits.log_softmax(dim=-1).gather(-1, target[..., None])[..., 0]
        for each in (model, in_eight_bits(model, states=compute_type == "int8"))
    )
    # A state that lies between two steps may be rounded up by one library and down by the other.
    loss_by_rounding = (of_rounded - of_model).abs().mean()
    assert 0.005 < loss_by_rounding < 0.1
    assert (found - of_rounded).abs().mean() < 0.1 * loss_by_rounding


def test_quantised_weights_are_smaller_and_a_folder_is_replaced_only_when_asked(tiny_model, tmp_path):
    model = tiny_model(d_model=64, encoder_ffn_dim=256, decoder_ffn_dim=256)
    sizes = {}
    for quantization in (None, "int8"):
        to_ctranslate2(model, tokens(), tmp_path / "converted", quantization=quantization, force=True)
        sizes[quantization] = (tmp_path / "converted" / "model.bin").stat().st_size
    assert sizes["int8"] < 0.5 * sizes[None]
    with pytest.raises(RuntimeError, match="already exists"):
        to_ctranslate2(model, tokens(), tmp_path / "converted")


def test_a_model_in_bfloat16_keeps_its_weights(tiny_model, tmp_path):
    model = tiny_model()
    for name, cast in (("half", model.bfloat16()), ("whole", model.float())):
        to_ctranslate2(cast, tokens(), tmp_path / name)
    assert (tmp_path / "half" / "model.bin").read_bytes() == (tmp_path / "whole" / "model.bin").read_bytes()


@pytest.mark.parametrize(
    ("fields", "words", "message"),
    [
        ({"d_kv": 4, "d_v": 8}, tokens(), "d_v=8 is not d_model=16 / encoder_attention_heads=4"),
        ({"d_kv": 8, "d_v": 8}, tokens(), "d_kv=8 is not d_model=16 / encoder_attention_heads=4"),
        ({"activation_function": "gelu_10"}, tokens(), "no activation_function='gelu_10', only relu"),
        ({"eos_token_id": [2, 3]}, tokens(), "eos_token_id=[2, 3]"),
        ({}, tokens(60), "60 tokenizer_tokens for vocab_size=61"),
        (
            {"decoder_vocab_size": 50, "share_encoder_decoder_embeddings": False},
            tokens(),
            "61 tokenizer_tokens for decoder_vocab_size=50",
        ),
        ({}, [f"w{number}" for number in range(61)], "lack '<unk>'"),
    ],
)
def test_what_ctranslate2_has_not_is_refused_before_anything_is_written(fields, words, message, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        to_ctranslate2(tiny_model(**fields), words, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()

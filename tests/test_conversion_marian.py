"""conversion/marian.py: the same outputs from transformers' own MarianMTModel, in both directions, and by a folder."""

import json
import re

import pytest
import torch
from processes import run_new_python
from transformers import GenerationConfig, MarianConfig, MarianMTModel

from vanilla_transformer import VanillaTransformerForConditionalGeneration, train_tokenizer
from vanilla_transformer.conversion.marian import from_marian, to_marian


SETTINGS = {
    "as the paper": {},
    "another output matrix": {"tie_word_embeddings": False},
    "two vocabularies": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 53},
    "three tables": {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False},
    "unscaled, of d_k and d_v that are the default": {
        "scale_embedding": False,
        "decoder_attention_heads": 4,
        "d_kv": 4,
    },
    "an activation with weights of its own": {"activation_function": "prelu"},
}
each_setting = pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)


PAD = 60


@pytest.fixture
def opus(padded) -> MarianMTModel:
    """
    A model that decodes as those of OPUS-MT do: it starts from the last token, pad, which outputs may not hold. Its
    outputs depend on all that precedes; half of its tokens would be pad, and more than one in five ends the sentence.
    """
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=61, d_model=16, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=32, max_position_embeddings=48,
        activation_function="swish", scale_embedding=True, pad_token_id=PAD, decoder_start_token_id=PAD,
        eos_token_id=0, forced_eos_token_id=0, init_std=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    model = MarianMTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2 * parameter.requires_grad)
        for layer in model.model.decoder.layers:
            layer.self_attn.out_proj.weight.mul_(0.4)
            layer.fc2.weight.mul_(0.4)
        model.lm_head.weight.copy_(model.model.decoder.embed_tokens.weight[torch.randperm(61)])
        model.final_logits_bias.normal_()
        (source, mask), (target, _) = padded((7, 5, 3, 8), vocab_size=60), padded((9, 9, 9, 9), vocab_size=60)
        logits = model(source, attention_mask=mask, decoder_input_ids=target).logits
        for token, share in ((0, 1 / 5), (PAD, 1 / 2)):
            model.final_logits_bias[0, token] += (logits.amax(dim=-1) - logits[..., token]).quantile(share)
        model.final_logits_bias[0, 0] += 0.25
    model.generation_config = GenerationConfig(
        **{"bad_words_ids": [[PAD]], "num_beams": 4, "max_length": 16, "forced_eos_token_id": 0, "eos_token_id": 0},
        **{"pad_token_id": PAD, "decoder_start_token_id": PAD},
    )
    return model


def sentences(padded, model, side="right"):
    """Source and target with their masks, as arguments of both models."""
    pad = model.config.pad_token_id
    source, mask = padded((7, 4, 1, 6), vocab_size=53, side=side)
    target, seen = padded((5, 8, 3, 6), vocab_size=53, seed=1)
    inputs = {"input_ids": source.masked_fill(mask == 0, pad), "attention_mask": mask}
    return {**inputs, "decoder_input_ids": target.masked_fill(seen == 0, pad)}, seen.bool()


def in_float64(marian):
    """Uses sinusoids in float64; transformers rounds them to float32."""
    marian.double()
    for stack in (marian.model.encoder, marian.model.decoder):
        table = stack.embed_positions.weight
        numbers, units = torch.arange(len(table)).double(), torch.arange(table.shape[1] // 2).double()
        angles = numbers[:, None] / 10000 ** (2 * units / table.shape[1])
        exact = torch.cat([angles.sin(), angles.cos()], dim=1)
        assert 0 < (table - exact).abs().max() < 1e-6
        table.data.copy_(exact)
    return marian


def assert_same_logits(ours, marian, padded):
    inputs, seen = sentences(padded, ours)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-10)):
        ours.to(dtype)
        marian = in_float64(marian) if dtype == torch.float64 else marian
        with torch.no_grad():
            expected, found = marian(**inputs).logits[seen], ours(**inputs).logits[seen]
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@each_setting
def test_ours_as_marian_gives_the_same_logits(fields, tiny_model, padded):
    ours = tiny_model(**fields)
    assert_same_logits(ours, to_marian(ours), padded)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": False},
        {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 57},
        {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False, "scale_embedding": False},
    ],
    ids=["one table", "shared but not tied", "two vocabularies", "three tables"],
)
def test_marian_as_ours_gives_the_same_logits(fields, opus, padded):
    torch.manual_seed(1)
    special = {"pad_token_id": 56, "decoder_start_token_id": 56, "tie_word_embeddings": True}
    marian = MarianMTModel(MarianConfig(**{**opus.config.to_dict(), **special, **fields})).eval()
    marian.final_logits_bias.normal_()
    assert_same_logits(from_marian(marian), marian, padded)


@each_setting
def test_there_and_back_nothing_has_changed(fields, tiny_model):
    ours = tiny_model(**fields)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    back = from_marian(to_marian(ours.train()))
    assert back.training
    state = back.state_dict()
    # Marian cannot share the embeddings of both sides without the output matrix: they become two equal tables.
    assert before.keys() - state.keys() <= {"model.shared.weight"}
    for name, value in state.items():
        assert torch.equal(value, before[name]), name
        assert torch.equal(ours.state_dict()[name], before[name]), name


def test_the_dtype_is_kept(tiny_model, opus):
    half = tiny_model().bfloat16()
    back = from_marian(to_marian(half))
    assert {parameter.dtype for parameter in back.parameters()} == {torch.bfloat16}
    assert torch.equal(back.lm_head.bias, half.lm_head.bias)
    assert from_marian(opus.double()).dtype == torch.float64


@pytest.fixture
def ending_model(lively_model):
    """Builds a lively model whose translations end before the maximum length of both models."""

    def build(**fields) -> VanillaTransformerForConditionalGeneration:
        model = lively_model(max_position_embeddings=100, **fields)
        with torch.no_grad():
            model.lm_head.bias[2] += 0.5
        return model

    return build


def assert_worth_comparing(sequences, model):
    """Checks that they differ, also in length, and that all have ended."""
    assert sequences.unique(dim=0).shape[0] > 1
    ends = torch.isin(sequences[:, 1:], torch.tensor(model.config.eos_token_id))
    assert ends.any(dim=1).all()
    assert ends.int().argmax(dim=1).unique().numel() > 1


WAYS = {
    "greedy": {"num_beams": 1},
    "beams": {},
    "as saved": {"num_beams": 3, "length_penalty": 0.6, "early_stopping": True, "max_new_tokens": 9},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("eos", [2, [2, 7]], ids=["one end", "two ends"])
def test_plain_generate_translates_as_ours_does(way, eos, ending_model, padded):
    ours = ending_model(eos_token_id=eos)
    ours.generation_config.update(**way)
    inputs, _ = sentences(padded, ours)
    del inputs["decoder_input_ids"]
    expected = ours.generate(**inputs)
    assert_worth_comparing(expected, ours)
    assert to_marian(ours).generate(**inputs).tolist() == expected.tolist()


@pytest.mark.parametrize("beams", [1, 4])
def test_ours_generates_what_an_opus_model_does(beams, opus, padded):
    inputs, _ = sentences(padded, opus)
    del inputs["decoder_input_ids"]
    ours = from_marian(opus)
    expected = opus.generate(**inputs, num_beams=beams)
    assert ours.generate(**inputs, num_beams=beams).tolist() == expected.tolist()
    assert_worth_comparing(expected, opus)
    # The ban is what keeps the padding token out.
    for model in (opus, ours):
        free = model.generate(**inputs, num_beams=beams, bad_words_ids=None)
        assert (free[:, 1] == PAD).any()
    if beams == 4:
        assert ours.generate(**inputs).tolist() == expected.tolist()


def test_padding_on_the_left_shifts_marians_positions_but_not_ours(tiny_model, padded):
    """The difference that docs/interoperability.md describes."""
    ours = tiny_model()
    marian = to_marian(ours)
    logits = {}
    for side in ("right", "left"):
        inputs, seen = sentences(padded, ours, side)
        with torch.no_grad():
            logits[side] = [model(**inputs).logits[seen] for model in (ours, marian)]
    torch.testing.assert_close(logits["left"][0], logits["right"][0], atol=1e-4, rtol=0)
    assert (logits["left"][1] - logits["right"][1]).abs().max() > 0.1


WITHOUT_US = """
import json, sys
sys.modules["vanilla_transformer"] = None  # importing it fails
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
sequences = model.generate(**tokenizer(texts, return_tensors="pt", padding=True))
texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
print(json.dumps([type(model).__name__, type(tokenizer).__module__, sequences.tolist(), texts]))
"""


def test_plain_transformers_loads_the_folder_and_translates_identically(ending_model, tmp_path):
    texts = ["3 days ago", "1,234.50 </s> euros", "Ä", "Norway, Peru, and Japan"]
    tokenizer = train_tokenizer(texts, 290)
    ours = ending_model(vocab_size=len(tokenizer))
    to_marian(ours).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, module, sequences, outputs = json.loads(
        run_new_python(WITHOUT_US, tmp_path, json.dumps(texts), cwd=tmp_path)
    )
    assert model == "MarianMTModel"
    assert module.startswith("transformers.")
    expected = ours.generate(**tokenizer(texts, return_tensors="pt", padding=True))
    assert_worth_comparing(expected, ours)
    assert sequences == expected.tolist()
    assert outputs == tokenizer.batch_decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("fields", "way", "message"),
    [
        ({"normalize_before": True}, {}, "normalises after each sub-layer only, but normalize_before=True"),
        ({"position_embedding_type": "learned"}, {}, "sinusoids only, but position_embedding_type='learned'"),
        ({"layer_norm_eps": 1e-6}, {}, "add 1e-05 always, but layer_norm_eps=1e-06"),
        ({"d_v": 8}, {}, "d_v=8 is not d_model=16 / encoder_attention_heads=4"),
        ({"d_kv": 4}, {}, "d_kv=4 is not d_model=16 / decoder_attention_heads=2"),
        ({}, {"length_penalty_form": "gnmt"}, "but length_penalty_form='gnmt'"),
        ({}, {"coverage_penalty": 0.2}, "but coverage_penalty=0.2"),
        ({}, {"num_beam_groups": 2, "diversity_penalty": 0.5}, "but num_beam_groups=2"),
    ],
)
def test_what_marian_has_not_is_refused(fields, way, message, tiny_model):
    ours = tiny_model(**fields)
    for name, value in way.items():
        setattr(ours.generation_config, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        to_marian(ours)


def test_an_odd_d_model_is_refused(opus):
    fields = {"d_model": 15, "encoder_attention_heads": 3, "decoder_attention_heads": 3}
    with pytest.raises(ValueError, match="d_model=15 is odd"):
        from_marian(MarianMTModel(MarianConfig(**{**opus.config.to_dict(), **fields})))

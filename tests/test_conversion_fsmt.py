"""conversion/fsmt.py: transformers' own FSMT, its forward pass and its search."""

import pytest
import torch
from transformers import FSMTConfig, FSMTForConditionalGeneration

from vanilla_transformer.conversion.fsmt import from_fsmt


LENGTHS = (7, 4, 1, 6)
SIZES = {
    "src_vocab_size": 61,
    "tgt_vocab_size": 53,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "max_length": 16,
}
SETTINGS = {
    "separate vocabularies": {},
    "one table": {"tie_word_embeddings": True, "tgt_vocab_size": 61},
    "gelu, unscaled": {"activation_function": "gelu", "scale_embedding": False},
}


def fsmt(seed=1, **fields) -> FSMTForConditionalGeneration:
    """A tiny model whose parameters have values that reveal mistakes; its positions are unchanged."""
    torch.manual_seed(seed)
    model = FSMTForConditionalGeneration(FSMTConfig(**{**SIZES, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        if not model.config.tie_word_embeddings:
            # A token calls for another one, and some for the end.
            decoder = model.model.decoder
            rows = decoder.embed_tokens.weight[torch.randperm(model.config.tgt_vocab_size)]
            rows[model.config.eos_token_id] = rows[4:12].sum(dim=0)
            decoder.output_projection.weight.copy_(rows)
    # A padding token in a target is masked there, and a token like others here.
    model.generation_config.suppress_tokens = [model.config.pad_token_id]
    return model.eval()


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_logits_and_outputs_stay(fields, padded):
    theirs = fsmt(**fields)
    ours = from_fsmt(theirs)
    source, mask = padded(LENGTHS)
    source[mask == 0] = theirs.config.pad_token_id
    target = padded((5, 5, 5, 5), vocab_size=53)[0]
    with torch.no_grad():
        # With a cache, FSMT takes it that there is one new token, which may see all that precede it.
        expected = theirs(source, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits
        found = ours(source, attention_mask=mask, decoder_input_ids=target).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for options in ({"num_beams": 1}, {}):
        expected = theirs.generate(source, attention_mask=mask, **options)
        assert len(set(map(tuple, expected.tolist()))) > 1
        assert ours.generate(source, attention_mask=mask, **options).tolist() == expected.tolist()


def test_the_source_is_left_as_it_is_and_dtypes_are_kept():
    theirs = fsmt().double()
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours = from_fsmt(theirs)
    assert ours.dtype == torch.float64
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())

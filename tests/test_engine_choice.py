"""Which engine decodes which call, and why."""

import pytest
import torch
from compilers import needs_compiler
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin

from vanilla_transformer import decoding_call


# What decodes, by default and with `compiled=False`; the reasons are in plain words.
CHOICES = {
    "default": ({}, "compiled", ""),
    "greedy": ({"num_beams": 1}, "compiled", ""),
    "told not to": ({"compiled": False}, "packed", "compiled=False"),
    "sampling": ({"do_sample": True, "num_beams": 1}, "packed", "does not support sampling"),
    "bfloat16": ({"compute_type": "bfloat16"}, "packed", "program computes in float32 or int8, not in bfloat16"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "transformers", "output_attentions"),
}


@needs_compiler
@pytest.mark.parametrize(("options", "name", "reason"), CHOICES.values(), ids=CHOICES.keys())
def test_which_engine_decodes_and_why(lively_model, padded, options, name, reason):
    model, (ids, mask) = lively_model(attention="eager"), padded()
    model.generate(ids, attention_mask=mask, **options, max_new_tokens=4)
    assert model.last_engine.name == name
    assert reason in model.last_engine.reason


# Arguments of `generate` that only transformers' loops support, and the name that the error must have.
STOCK = {
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "static cache": (
        {"cache_implementation": "static", "disable_compile": True}, "cache_implementation='static'",
    ),
    "attention weights": (
        {"output_attentions": True, "return_dict_in_generate": True}, "output_attentions",
    ),
    "states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    "told cache": ({"use_cache": True, "return_dict_in_generate": True}, "past_key_values"),
    "own cache": ({"past_key_values": "static"}, "past_key_values"),
    "encoder's output": ({"encoder_outputs": "computed"}, "encoder_outputs"),
    "assistant": ({"assistant_model": "itself", "num_beams": 1}, "generation mode"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2, "num_beams": 1}, "generation mode"),
}  # fmt: skip


OWN = {
    "compute_type": "float32",
    "length_penalty_form": "gnmt",
    "coverage_penalty": 0.2,
    "ensemble": "itself",
    "required_phrases": [[[5]]],
    "forbidden_phrases": [[[5]]],
}


@pytest.fixture
def no_search_of_ours(monkeypatch):
    for name in ("search_beams", "search_rows", "copy_of"):
        monkeypatch.setattr(decoding_call, name, lambda *_: pytest.fail("our search was called"))


def filled(arguments: dict, model, source: dict) -> dict:
    """Adds the arguments that cannot be written in a table."""
    made = dict(arguments)
    if "encoder_outputs" in made:
        made["encoder_outputs"] = model.model.encoder(**source)
    if "assistant_model" in made:
        made["assistant_model"] = model
    if "past_key_values" in made:
        made["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    if "ensemble" in made:
        made["ensemble"] = [model]
    return made


@pytest.mark.parametrize(("arguments", "name"), STOCK.values(), ids=STOCK.keys())
@pytest.mark.usefixtures("packed_engine")
class TestStock:
    def test_transformers_loops_do_what_only_they_can(self, lively_model, padded, no_search_of_ours, arguments, name):
        model = lively_model(attention="eager")
        source = dict(zip(("input_ids", "attention_mask"), padded((5,)), strict=True))
        common = {**source, "max_new_tokens": 7, **arguments}
        outputs = [
            generate(**filled(common, model, source))
            for generate in (model.generate, lambda **options: GenerationMixin.generate(model, **options))
        ]
        if "return_dict_in_generate" in arguments:
            assert outputs[0].keys() == outputs[1].keys()
            outputs = [output.sequences for output in outputs]
        assert torch.equal(*outputs)

    def test_our_own_arguments_do_not_go_with_them(self, lively_model, padded, no_search_of_ours, arguments, name):
        model = lively_model(attention="eager")
        source = dict(zip(("input_ids", "attention_mask"), padded((5,)), strict=True))
        for own, value in OWN.items():
            if "num_beams" in arguments and own == "required_phrases":
                continue
            with pytest.raises(ValueError, match=f"{own} cannot be combined with .*{name}"):
                model.generate(**source, **filled({**arguments, own: value}, model, source))


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 1, "do_sample": True, "top_k": 1}])
def test_an_output_may_be_continued_from_its_cache(lively_model, padded, options):
    """As transformers' tests of `generate()` do it."""
    model = lively_model()
    model.generation_config.eos_token_id = None
    source = dict(zip(("input_ids", "attention_mask"), padded((5, 7)), strict=True))
    asked = {**source, **options, "use_cache": True, "return_dict_in_generate": True}
    whole = model.generate(**asked, max_new_tokens=4)
    begun = model.generate(**asked, max_new_tokens=3)
    # It holds all but the last token.
    memory = model.model.encoder(**source)
    states = model(
        encoder_outputs=memory, attention_mask=source["attention_mask"], decoder_input_ids=begun.sequences[:, :-1]
    ).past_key_values
    for found, expected in zip(begun.past_key_values, states, strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    past = {"past_key_values": begun.past_key_values, "decoder_input_ids": begun.sequences}
    continued = model.generate(**asked, **past, max_new_tokens=1)
    assert torch.equal(continued.sequences, whole.sequences)
    assert isinstance(continued.past_key_values, EncoderDecoderCache)

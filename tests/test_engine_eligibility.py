"""Our engines decode only models that nobody has changed."""

import types

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vanilla_transformer import VanillaTransformerForConditionalGeneration
from vanilla_transformer.engine_eligibility import inspect_model


pytestmark = pytest.mark.usefixtures("packed_engine")


@pytest.fixture(scope="session")
def source(padded):
    return dict(zip(("input_ids", "attention_mask"), padded(side="left"), strict=True))


class Wrapped(nn.Linear):
    """A layer like that of a quantiser or an adapter: it does not compute what `nn.Linear` does."""

    def forward(self, x):
        return 1.1 * super().forward(x)


def loudly(method):
    """The method, with a result that is greater by half: that of a layer, or logits."""

    def louder(self, *args, **kwargs):
        found = method(self, *args, **kwargs)
        if isinstance(found, torch.Tensor):
            return 1.5 * found
        name = "logits" if "logits" in found else "last_hidden_state"
        found[name] = found[name].clone()
        found[name][..., 7:20] += 2.0
        return found

    return louder


class Loud(VanillaTransformerForConditionalGeneration):
    """A user's subclass of a model."""

    forward = loudly(VanillaTransformerForConditionalGeneration.forward)


class Shy(VanillaTransformerForConditionalGeneration):
    """It reads only the first token of the target."""

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        return super().prepare_inputs_for_generation(input_ids[:, :1].expand_as(input_ids), *args, **kwargs)


class Forgetful(VanillaTransformerForConditionalGeneration):
    """It does not reorder the cache with the beams. Older models of transformers have this method; ours do not."""

    def _reorder_cache(self, past_key_values, beam_idx):
        return past_key_values


class Picky(VanillaTransformerForConditionalGeneration):
    """It changes the scores of beams."""

    def _get_top_k_continuations(self, **kwargs):
        return super()._get_top_k_continuations(**kwargs | {"accumulated_log_probs": -kwargs["accumulated_log_probs"]})


def of_class(kind):
    def change(model, monkeypatch):
        model.__class__ = kind

    change.__name__ = kind.__name__
    return change


def a_decoder_of_its_own(model, monkeypatch):
    kind = type(model.model.decoder)
    model.model.decoder.__class__ = type("LoudDecoder", (kind,), {"forward": loudly(kind.forward)})


def a_layer_with_another_part(model, monkeypatch):
    kind = type(model.model.decoder.layers[0])
    louder = type("LoudLayer", (kind,), {"feed_forward": loudly(kind.feed_forward)})
    model.model.decoder.layers[0].__class__ = louder


def a_class_patched_later(model, monkeypatch):
    kind = type(model.model.decoder.layers[0])
    monkeypatch.setattr(kind, "feed_forward", loudly(kind.feed_forward))


def a_forward_of_its_own(model, monkeypatch):
    model.forward = types.MethodType(loudly(type(model).forward), model)


def a_layer_s_method_of_its_own(model, monkeypatch):
    layer = model.model.encoder.layers[1]
    layer.feed_forward = types.MethodType(loudly(type(layer).feed_forward), layer)


def a_leaf_s_forward_of_its_own(model, monkeypatch):
    norm = model.model.encoder.layers[0].final_layer_norm
    norm.forward = lambda x: 1.5 * nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)


def in_training(model, monkeypatch):
    model.train()


def dropout_alone_in_training(model, monkeypatch):
    """Dropout while decoding, as used to estimate uncertainty."""
    layer = model.model.decoder.layers[0]
    layer.dropout.p = 0.4
    layer.dropout.train()


def in_float64(model, monkeypatch):
    model.double()


def a_wrapped_layer(model, monkeypatch):
    old = model.model.decoder.layers[0].fc1
    model.model.decoder.layers[0].fc1 = Wrapped(old.in_features, old.out_features)


def another_kind_of_positions(model, monkeypatch):
    class NoPositions(nn.Module):
        def forward(self, position_ids, dtype):
            return torch.zeros(*position_ids.shape, 16, dtype=dtype)

    model.model.encoder.embed_positions = NoPositions()


def a_hook(model, monkeypatch):
    model.model.decoder.layers[1].fc2.register_forward_hook(lambda module, args, output: 2 * output)


def a_hook_with_keywords_on_the_model(model, monkeypatch):
    model.register_forward_hook(lambda module, args, kwargs, output: loudly(lambda _: output)(None), with_kwargs=True)


def a_hook_that_is_an_object(model, monkeypatch):
    class Twice:
        def __call__(self, module, args, output):
            return 2 * output

    Twice.__module__ = None
    model.lm_head.register_forward_hook(Twice())


def a_hook_before(model, monkeypatch):
    model.model.encoder.layers[1].fc2.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def a_hook_on_all_modules(model, monkeypatch):
    def louder(module, args, output):
        return 2 * output if module is model.lm_head else None

    handle = register_module_forward_hook(louder)
    monkeypatch.callback = handle.remove


def a_hook_before_all_modules(model, monkeypatch):
    def louder(module, args):
        return (2 * args[0],) if module is model.lm_head else None

    handle = register_module_forward_pre_hook(louder)
    monkeypatch.callback = handle.remove


def a_head_without_bias(model, monkeypatch):
    model.lm_head = nn.Linear(model.config.d_model, model.config.decoder_vocab_size, bias=False)


def an_attention_of_its_own(model, monkeypatch):
    def to_itself_alone(module, query, key, value, attention_mask, **kwargs):
        return value.mean(dim=2, keepdim=True).expand_as(query).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "to itself", to_itself_alone)
    model.config._attn_implementation = "to itself"


# Ways to change a model, and what `last_engine` tells of them.
CHANGES = {
    of_class(Loud): "Loud.forward, which is not this package's own (the model)",
    of_class(Shy): "Shy.prepare_inputs_for_generation, which is not this package's own (the model)",
    of_class(Forgetful): "Forgetful._reorder_cache, which",
    of_class(Picky): "Picky._get_top_k_continuations, which",
    a_decoder_of_its_own: "LoudDecoder.forward, which is not this package's own (model.decoder)",
    a_layer_with_another_part: "LoudLayer.feed_forward, which is not this package's own (model.decoder.layers.0)",
    a_class_patched_later: "DecoderLayer.feed_forward, which is not this package's own (model.decoder.layers.0)",
    a_forward_of_its_own: "a forward of its own (the model)",
    a_layer_s_method_of_its_own: "a feed_forward of its own (model.encoder.layers.1)",
    a_leaf_s_forward_of_its_own: "a forward of its own (model.encoder.layers.0.final_layer_norm)",
    in_training: "a model in training mode",
    dropout_alone_in_training: "training mode (model.decoder.layers.0.dropout)",
    in_float64: "weights in torch.float64",
    a_wrapped_layer: "Wrapped.forward, which is not this package's own (model.decoder.layers.0.fc1)",
    another_kind_of_positions: ".NoPositions (model.encoder.embed_positions)",
    a_hook: "a hook (model.decoder.layers.1.fc2)",
    a_hook_with_keywords_on_the_model: "a hook (the model)",
    a_hook_that_is_an_object: "a hook (lm_head)",
    a_hook_before: "a hook (model.encoder.layers.1.fc2)",
    a_hook_on_all_modules: "a hook on all modules",
    a_hook_before_all_modules: "a hook on all modules",
    a_head_without_bias: "a layer without bias",
    an_attention_of_its_own: "the attention implementation 'to itself'",
}


@pytest.fixture
def changeable(monkeypatch):
    """`monkeypatch` that also reverts changes that are not attributes."""
    monkeypatch.callback = lambda: None
    yield monkeypatch
    monkeypatch.callback()


@pytest.mark.parametrize(("change", "told"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_models_that_are_not_as_we_know_them_are_left_to_transformers(lively_model, source, changeable, change, told):
    model = lively_model(dropout=0.0)
    arguments = {**source, "max_new_tokens": 7, "return_dict_in_generate": True, "output_scores": True}
    before = model.generate(**arguments)
    change(model, changeable)
    outputs = []
    for options in ({"stock": True}, {}, {"compiled": False}, {"compiled": True}):
        torch.manual_seed(0)
        generate = GenerationMixin.generate if options.pop("stock", False) else type(model).generate
        outputs.append(generate(model, **arguments, **options))
    for ours in outputs[1:]:
        assert torch.equal(ours.sequences, outputs[0].sequences)
        assert torch.equal(ours.sequences_scores, outputs[0].sequences_scores)
    assert model.last_engine.name == "transformers"
    assert told in model.last_engine.reason
    if change not in (in_training, in_float64):  # the others change what is found
        assert before.sequences.tolist() != outputs[0].sequences.tolist()
    with pytest.raises(ValueError, match="coverage_penalty cannot be combined with"):
        model.generate(**source, coverage_penalty=0.1)


def in_a_subclass_that_adds_a_method(model):
    model.__class__ = type("Chatty", (type(model),), {"say": lambda self: "hello"})


def cast_by_accelerate(model):
    """As `Accelerator.prepare` leaves a model that it trains in bfloat16."""
    cast = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model.forward = types.MethodType(cast, model)
    model.forward = types.MethodType(convert_outputs_to_fp32(model.forward.__func__), model)


def with_its_own_forward_bound(model):
    """As accelerate leaves it afterwards."""
    model.forward = types.MethodType(type(model).forward, model)


@pytest.mark.parametrize(
    "change",
    [in_a_subclass_that_adds_a_method, cast_by_accelerate, with_its_own_forward_bound],
    ids=lambda f: f.__name__,
)
def test_what_changes_no_output_is_still_decoded_here(lively_model, source, change):
    model = lively_model()
    expected = model.generate(**source, max_new_tokens=6)
    change(model)
    assert torch.equal(model.generate(**source, max_new_tokens=6), expected)
    assert model.last_engine.name == "packed"


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_a_head_that_is_hooked_or_replaced_is_called_in_training(lively_model, source, change):
    """Otherwise the loss in training would not use it."""
    model, labels = lively_model(dropout=0.0, label_smoothing=0.0).train(), source["input_ids"]
    if change == "hook":
        model.lm_head.register_forward_hook(lambda module, args, output: 0.5 * output)
    else:
        model.lm_head.forward = lambda x: 0.5 * nn.functional.linear(x, model.lm_head.weight, model.lm_head.bias)
    loss = model(**source, labels=labels).loss
    logits = model(**source, labels=labels, return_logits=True).logits
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_a_model_that_has_told_its_attention_is_still_decoded_here(lively_model, source):
    """transformers leaves hooks in the layers; they do nothing unless outputs are recorded."""
    model = lively_model(attention="eager")
    model(**source, decoder_input_ids=torch.ones(4, 1, dtype=torch.long), output_attentions=True)
    assert inspect_model(model).unknown is None

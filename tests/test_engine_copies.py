"""What is made of a model's weights: once, and again after every kind of change, in any number of threads."""

import copy
import gc
import multiprocessing
import os
import pickle
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compilers import needs_compiler
from torch import nn
from transformers import GenerationMixin

from vanilla_transformer import (
    VanillaTransformerForConditionalGeneration,
    engine_copies,
)
from vanilla_transformer.engine_copies import copy_of
from vanilla_transformer.engine_eligibility import inspect_model
from vanilla_transformer.engine_packed import PackedTransformer


pytestmark = pytest.mark.usefixtures("packed_engine")


@pytest.fixture(scope="session")
def source(padded):
    return dict(zip(("input_ids", "attention_mask"), padded(side="left"), strict=True))


# Ways to change weights, each of all a model's weights or of some.
def by_an_optimizer(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(input_ids=torch.tensor([[5, 6, 2]]), labels=torch.tensor([[7, 8, 2]])).loss.backward()
    optimizer.step()


def by_a_state(model):
    model.load_state_dict({name: tensor.roll(1, 0) for name, tensor in model.state_dict().items()})


def by_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(-1.3)


def by_a_new_head(model):
    model.lm_head = nn.Linear(model.config.d_model, model.config.decoder_vocab_size)
    nn.init.normal_(model.lm_head.weight)


def by_a_transposed_head(model):
    model.lm_head.weight = nn.Parameter(torch.randn(model.config.d_model, model.config.decoder_vocab_size).T)


def by_no_grad(model):
    with torch.no_grad():
        model.model.encoder.layers[1].fc1.weight[0, 0] += 20.0
        model.model.decoder.layers[0].self_attn_layer_norm.bias[3] += 9.0


def by_another_activation(model):
    model.model.decoder.layers[0].activation_fn = nn.Tanh()


def by_a_layer_less(model):
    model.model.encoder.layers = nn.ModuleList(model.model.encoder.layers[1:])


def by_embeddings(model):
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[1] += 5.0


@pytest.mark.parametrize(
    "options", [{}, {"compute_type": "bfloat16"}, pytest.param({"compiled": True}, marks=needs_compiler)], ids=str
)
@pytest.mark.parametrize(
    "change",
    [
        by_an_optimizer,
        by_a_state,
        by_data,
        by_a_new_head,
        by_a_transposed_head,
        by_no_grad,
        by_embeddings,
        by_another_activation,
        by_a_layer_less,
    ],
    ids=lambda f: f.__name__,
)
def test_changed_weights_are_used_at_once(lively_model, source, change, options):
    model = lively_model()
    arguments = {**source, **options, "max_new_tokens": 6, "return_dict_in_generate": True}
    before = model.generate(**arguments)
    assert torch.equal(model.generate(**arguments).sequences_scores, before.sequences_scores)
    change(model)
    after = model.generate(**arguments)
    fresh = copy.deepcopy(model).generate(**arguments)
    assert torch.equal(after.sequences, fresh.sequences)
    assert torch.equal(after.sequences_scores, fresh.sequences_scores)
    assert not torch.allclose(after.sequences_scores, before.sequences_scores)
    assert model.last_engine.name != "transformers"
    stock = GenerationMixin.generate(model, **source, max_new_tokens=6)
    assert torch.equal(stock, after.sequences) or "compute_type" in options


def test_weights_are_packed_once(lively_model, source, monkeypatch):
    made = []
    build = PackedTransformer.__init__
    monkeypatch.setattr(PackedTransformer, "__init__", lambda *args: made.append(args[2]) or build(*args))
    model = lively_model()
    for compute_type in (None, "float32", "bfloat16", None, "bfloat16"):
        model.generate(**source, max_new_tokens=2, compute_type=compute_type)
    assert made == ["float32", "bfloat16"]


@pytest.mark.parametrize("options", [{}, {"num_beams": 1}, {"compute_type": "bfloat16"}])
def test_weights_that_are_no_numbers_are_an_error(lively_model, source, options):
    model = lively_model()
    model.generate(**source, **options)
    bias = model.model.decoder.layers[1].fc2.bias
    for wrong in (float("nan"), float("-inf")):
        with torch.no_grad():
            bias[3] = wrong
        with pytest.raises(ValueError, match=rf"model\.decoder\.layers\.1\.fc2\.bias contains {wrong}"):
            model.generate(**source, **options)
    with torch.no_grad():
        bias[3] = 0.0
    model.generate(**source, **options)


def test_a_model_that_was_made_in_inference_mode_decodes(lively_model, source):
    expected = lively_model().generate(**source, max_new_tokens=6)
    with torch.inference_mode():
        model = lively_model()
    for _ in range(2):
        assert torch.equal(model.generate(**source, max_new_tokens=6), expected)


def test_models_do_not_mix(lively_model, source):
    models = [lively_model(seed=seed) for seed in (0, 1)]
    expected = [GenerationMixin.generate(model, **source, max_new_tokens=6) for model in models]
    assert not torch.equal(*expected)
    for number in (0, 1, 0):
        assert torch.equal(models[number].generate(**source, max_new_tokens=6), expected[number])


def test_a_model_that_has_decoded_can_be_copied_pickled_and_saved(lively_model, source, tmp_path):
    model = lively_model()
    expected = model.generate(**source, max_new_tokens=6)
    names = set(model.state_dict())
    model.save_pretrained(tmp_path)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        VanillaTransformerForConditionalGeneration.from_pretrained(tmp_path).eval(),
    ]
    for other in copies:
        assert set(other.state_dict()) == names
        assert torch.equal(other.generate(**source, max_new_tokens=6), expected)
    by_data(copies[0])
    assert not torch.equal(copies[0].generate(**source, max_new_tokens=6), expected)
    assert torch.equal(model.generate(**source, max_new_tokens=6), expected)


class TestThreads:
    """What threads share: the packed weights, and what tells whether they have changed."""

    def test_packed_weights_that_another_thread_drops_are_used_to_the_end(self, lively_model, source, monkeypatch):
        """Between any two looks at them, another thread finds that the weights have changed."""
        model, is_of = lively_model(), engine_copies._Copy.is_of
        expected = model.generate(**source, max_new_tokens=6)

        def is_of_and_dropped(self, found):
            engine_copies._COPIES[model].clear()
            return is_of(self, found)

        monkeypatch.setattr(engine_copies._Copy, "is_of", is_of_and_dropped)
        assert torch.equal(model.generate(**source, max_new_tokens=6), expected)

    def test_one_thread_packs_and_the_others_wait(self, lively_model, source, monkeypatch):
        made, build = [], PackedTransformer.__init__

        def slowly(*arguments):
            made.append(1)
            time.sleep(0.2)
            build(*arguments)

        monkeypatch.setattr(PackedTransformer, "__init__", slowly)
        model = lively_model()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: model.generate(**source, max_new_tokens=2), range(8)))
        assert len(made) == 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
    def test_a_fork_while_a_thread_packs_can_pack(self, lively_model, source):
        model = lively_model()
        expected = GenerationMixin.generate(model, **source, max_new_tokens=3).tolist()
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        work = lambda: queue.put(model.generate(**source, max_new_tokens=3).tolist())  # noqa: E731
        process = context.Process(target=work, daemon=True)
        with engine_copies._packing:
            process.start()
        process.join(timeout=60)
        assert process.exitcode == 0, "it hangs"
        assert queue.get() == expected


def test_packed_weights_go_with_their_model(tiny_model):
    model = tiny_model()
    found = inspect_model(model)
    engine = weakref.ref(copy_of(model, found, PackedTransformer, "float32"))
    assert engine() is copy_of(model, found, PackedTransformer, "float32")
    del model
    gc.collect()
    assert engine() is None

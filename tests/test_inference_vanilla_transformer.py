"""The packed network against the modules that it is made from, its staleness, its cache, and who decodes what."""

import copy
import gc
import logging
import multiprocessing
import os
import pickle
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from compilers import needs_compiler
from networks import NETWORKS
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vanilla_transformer import VanillaTransformerForConditionalGeneration
from vanilla_transformer import generation_vanilla_transformer as generation
from vanilla_transformer import inference_vanilla_transformer as inference
from vanilla_transformer.inference_vanilla_transformer import (
    COMPUTE_TYPES,
    PackedTransformer,
    TargetCache,
    copy_of,
    inspect_model,
    pack_linear,
)


pytestmark = pytest.mark.usefixtures("packed_engine")

CONFIGURATIONS = {
    **NETWORKS,
    "two vocabularies": {**NETWORKS["separate vocabularies"], "tie_word_embeddings": False},
}
# Largest error of a logit, as a share of the logits' standard deviation. These models showed 2e-6, 0.11 and 0.29.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.2, "int8": 0.5}

CPU = torch.device("cpu")
FEW_INPUTS = inference.FEW_INPUTS
needs_fbgemm = pytest.mark.skipif(not inference.is_native("int8", CPU), reason="whole numbers are FBGEMM's, on x86")


@pytest.fixture(autouse=True)
def small_matrices_in_int8_too(monkeypatch):
    """The networks of these tests have no others."""
    monkeypatch.setattr(inference, "FEW_INPUTS", 0)


@pytest.fixture(params=["as this machine does it", "in float32"])
def way(request, monkeypatch):
    """Each type as this machine computes it, and as one without its instructions does."""
    if request.param == "in float32":
        monkeypatch.setattr(inference, "is_native", lambda compute_type, device: compute_type == "float32")


@pytest.fixture(scope="session")
def source(padded):
    return dict(zip(("input_ids", "attention_mask"), padded(side="left"), strict=True))


def logits_by_steps(engine: PackedTransformer, source: dict, targets: torch.Tensor, padding=None) -> torch.Tensor:
    """Logits `[B, T, V]` of one target for each sentence, read token by token; `padding` is true at the left."""
    memory = engine.encode(**source)
    state = engine.start(memory, source.get("attention_mask"), 1, False, padding is not None)
    logits = []
    for column in range(targets.shape[1]):
        position = state.position
        logits.append(engine.step(targets[:, column, None], state)[:, 0])
        if padding is not None:
            state.target.hide_last(padding[:, column])
            state.position = position + (~padding[:, column, None]).long()
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("fields", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
@pytest.mark.usefixtures("way")
@torch.inference_mode()
def test_logits_and_encodings_are_those_of_the_modules(tiny_model, source, padded, fields, compute_type):
    model = tiny_model(**fields)
    engine = PackedTransformer(model, compute_type)
    targets = padded((12,) * 4, vocab_size=53, seed=3)[0]
    expected = model(**source, decoder_input_ids=targets)
    error = (logits_by_steps(engine, source, targets) - expected.logits).abs().max() / expected.logits.std()
    assert error < TOLERANCE[compute_type]
    kept = source["attention_mask"].bool()
    wrong = (engine.encode(**source) - expected.encoder_last_hidden_state)[kept]
    assert wrong.abs().max() / expected.encoder_last_hidden_state.std() < TOLERANCE[compute_type]


@torch.inference_mode()
def test_target_positions_beyond_those_prepared_are_right(tiny_model, source, padded):
    model = tiny_model()
    targets = padded((150,) * 4, seed=3)[0]
    logits = logits_by_steps(PackedTransformer(model, "float32"), source, targets)
    expected = model(**source, decoder_input_ids=targets).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("last", [3, 200])
def test_a_table_that_another_thread_replaces_is_long_enough(tiny_model, monkeypatch, last):
    """Between any two reads of the table, another thread puts a shorter one in its place."""
    table = inference.PositionTable(tiny_model().model.encoder)
    tables = iter([table.upto(100), *[table.upto(0)[:1]] * 9])
    monkeypatch.setattr(
        inference.PositionTable, "table", property(lambda _: next(tables), lambda *_: None), raising=False
    )
    assert len(table.upto(last)) > last


def test_learned_positions_end_in_the_model_s_error(tiny_model, source):
    model = tiny_model(position_embedding_type="learned")
    model.lm_head.bias.data[2] = -1e4
    assert model.generate(**source, max_length=48).shape[1] == 48
    with pytest.raises(ValueError, match="position 48 has no learned embedding"):
        model.generate(**source, max_length=50)


@torch.inference_mode()
def test_padding_may_be_longer_than_learned_positions(tiny_model, padded):
    model = tiny_model(position_embedding_type="learned", max_position_embeddings=7)
    ids, mask = padded(side="left")
    wide, wide_mask = (torch.nn.functional.pad(each, (5, 0)) for each in (ids, mask))
    engine = PackedTransformer(model, "float32")
    torch.testing.assert_close(
        engine.encode(wide, wide_mask)[:, 5:][mask.bool()], engine.encode(ids, mask)[mask.bool()]
    )


# Little work, more than is little, and more than is little for one row.
@pytest.mark.parametrize(("rows", "inside", "out"), [(5, 17, 33), (400, 17, 33), (2, 400, 700)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.usefixtures("way")
@torch.inference_mode()
def test_a_packed_product_is_the_product(compute_type, relu, positive, rows, inside, out):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(out, inside, generator=generator), torch.randn(out, generator=generator)
    weight *= (17 / inside) ** 0.5  # sums of one size
    x = torch.randn(2, rows, inside, generator=generator)
    x = x.abs() if positive else x
    expected = x.double() @ weight.double().T + bias.double()
    expected = expected.relu() if relu else expected
    # 24 bits; 8 bits; 7 or 8 bits for weights and states.
    tolerance = {"float32": 2e-5, "bfloat16": 0.15, "int8": 0.4}[compute_type]
    multiply = pack_linear(weight, bias, compute_type, relu, positive)
    result = multiply(x)
    assert result.dtype == torch.float32
    assert (result - expected).abs().max() < tolerance
    assert (multiply(x[:1, :1]) - expected[:1, :1]).abs().max() < tolerance


@pytest.mark.parametrize("compute_type", ["bfloat16", "int8"])
@torch.inference_mode()
def test_without_instructions_a_product_is_float32_s_of_rounded_weights(monkeypatch, compute_type):
    monkeypatch.setattr(inference, "is_native", lambda compute_type, device: compute_type == "float32")
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(600, 512, generator=generator), torch.randn(4, 512, generator=generator)
    scales = weight.double().abs().amax(dim=1, keepdim=True) / 127
    rounded = {"bfloat16": weight.bfloat16().double(), "int8": (weight.double() / scales).round() * scales}
    found = pack_linear(weight, torch.zeros(600), compute_type)(x)
    torch.testing.assert_close(found, (x.double() @ rounded[compute_type].T).float(), rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_products_of_a_type_without_instructions_are_told_once(tiny_model, monkeypatch, caplog):
    monkeypatch.setattr(inference, "is_native", lambda compute_type, device: compute_type == "float32")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    inference.logger.warning_once.cache_clear()
    for compute_type in (*COMPUTE_TYPES, *COMPUTE_TYPES):
        PackedTransformer(tiny_model(), compute_type)
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        "compute_type='bfloat16'",
        "compute_type='int8'",
    ]
    inference.logger.warning_once.cache_clear()


@torch.inference_mode()
def test_int8_leaves_small_matrices_in_float32(monkeypatch):
    monkeypatch.setattr(inference, "FEW_INPUTS", FEW_INPUTS)
    generator = torch.Generator().manual_seed(0)
    for inside, exact in ((511, True), (512, False)):
        weight, x = torch.randn(600, inside, generator=generator), torch.randn(4, inside, generator=generator)
        found = pack_linear(weight, torch.zeros(600), "int8")(x)
        assert torch.allclose(found, x @ weight.T, rtol=1e-5, atol=1e-4) == exact


@needs_fbgemm
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 300])
@torch.inference_mode()
def test_sums_of_int8_are_exact(positive, rows):
    """On whole numbers, the largest among them, which sums in 16 bits would cut."""
    bits = inference._state_bits()
    largest = 2**bits - 1 if positive else 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(0 if positive else -largest, largest + 1, (rows, 2048), generator=generator)
    weights = torch.randint(-127, 128, (520, 2048), generator=generator)
    states[:, 0], weights[:, 0] = largest, 127  # the scales are 1
    states[0], weights[1], weights[2] = largest, 127, -127
    found = pack_linear(weights.float(), torch.zeros(520), "int8", positive=positive)(states.float())
    torch.testing.assert_close(found.double(), (states @ weights.T).double(), rtol=1e-6, atol=1e-2)


@needs_fbgemm
@pytest.mark.parametrize("positive", [False, True])
@torch.inference_mode()
def test_a_row_in_int8_does_not_depend_on_its_neighbours(positive):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(600, 512, generator=generator) / 5, torch.randn(6, 512, generator=generator)
    x = x.abs() if positive else x
    multiply = pack_linear(weight, torch.randn(600, generator=generator), "int8", positive=positive)
    together = multiply(torch.cat([x, 1000 * x, torch.zeros(1, 512), x.repeat(50, 1)]))
    assert torch.equal(together[:6], together[-6:])
    for number in range(6):
        assert torch.equal(multiply(x[None, number, None])[0], together[None, number])


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 4}], ids=["greedy", "beams"])
def test_a_sentence_is_decoded_alike_alone_and_in_a_batch(lively_model, padded, compute_type, options):
    model, (ids, mask) = lively_model(), padded((9, 4, 7, 2, 9, 5, 3, 8))
    options = {**options, "compute_type": compute_type, "compiled": False, "max_new_tokens": 20}
    together = model.generate(ids, attention_mask=mask, **options)
    for number, length in enumerate(mask.sum(dim=1).tolist()):
        alone = model.generate(ids[number, None, :length], **options)[0]
        assert torch.equal(together[number, : len(alone)], alone)
        assert torch.isin(together[number, len(alone) :], torch.tensor([0, 2])).all()  # padding


def test_packing_int8_leaves_the_process_s_quantisation_engine(tiny_model):
    before = torch.backends.quantized.engine
    PackedTransformer(tiny_model(), "int8")
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize("compute_type", [None, *COMPUTE_TYPES])
@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 4}], ids=["greedy", "beams"])
def test_sharp_models_decode_alike_in_every_type(lively_model, source, compute_type, options):
    """The likeliest of a sharp distribution stays so when numbers are rounded."""
    model = lively_model()
    model.lm_head.weight.data.mul_(8.0)
    expected = model.generate(**source, **options, max_new_tokens=5)
    rounded = model.generate(**source, **options, max_new_tokens=5, compute_type=compute_type)
    same = (expected[:, :2] == rounded[:, :2]).all(dim=1)
    assert same.float().mean() >= 0.75


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_s_own_dtype_is_what_it_decodes_in(tiny_model, source, dtype):
    model = tiny_model().to(dtype)
    output = model.generate(**source, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
    assert output.past_key_values is None
    assert output.logits[0].dtype == torch.float32
    expected = tiny_model()(**source, decoder_input_ids=torch.ones(4, 1, dtype=torch.long)).logits[:, 0]
    error = (output.logits[0].view(4, 4, -1)[:, 0] - expected).abs().max() / expected.std()
    # float16 weights are computed with in float32, being rounded less.
    assert error < (0.2 if dtype == torch.bfloat16 else 0.02)


def test_autocast_decides_the_type(tiny_model, source):
    model = tiny_model()
    arguments = {**source, "max_new_tokens": 6, "return_dict_in_generate": True}
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.generate(**arguments)
    asked = model.generate(**arguments, compute_type="bfloat16")
    assert torch.equal(inside.sequences, asked.sequences)
    assert torch.equal(inside.sequences_scores, asked.sequences_scores)
    assert not torch.equal(inside.sequences_scores, model.generate(**arguments).sequences_scores)


@pytest.mark.parametrize("wrong", ["float16", "int4", ""])
def test_an_unknown_type_is_an_error(tiny_model, source, wrong):
    with pytest.raises(ValueError, match=f"compute_type='{wrong}'.*float32, bfloat16, int8"):
        tiny_model().generate(**source, compute_type=wrong)


def test_the_encoder_reads_a_source_once(lively_model, source, monkeypatch):
    model, calls = lively_model(), []
    encode = PackedTransformer.encode
    monkeypatch.setattr(PackedTransformer, "encode", lambda *args: calls.append(1) or encode(*args))
    model.generate(**source, max_new_tokens=3)
    assert len(calls) == 1
    assert model.last_engine.name == "packed"


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
        with pytest.raises(ValueError, match=rf"model\.decoder\.layers\.1\.fc2\.bias holds {wrong}"):
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
        model, is_of = lively_model(), inference._Copy.is_of
        expected = model.generate(**source, max_new_tokens=6)

        def is_of_and_dropped(self, found):
            inference._COPIES[model].clear()
            return is_of(self, found)

        monkeypatch.setattr(inference._Copy, "is_of", is_of_and_dropped)
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
        with inference._packing:
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


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 4}, {"num_beams": 1, "do_sample": True}])
def test_outputs_are_ordinary_tensors_that_one_may_change(lively_model, source, options):
    model = lively_model()
    told = model.generate(
        **source, **options, max_new_tokens=4, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    for tensor in (model.generate(**source, **options, max_new_tokens=4), told.sequences, *told.scores, *told.logits):
        assert not tensor.is_inference()
        tensor[0] = 0


class TestTargetCache:
    """Beams that die and split at random: each sees its own ancestors and nothing else, in little memory."""

    @pytest.mark.parametrize("capacity", [1, 32])
    @pytest.mark.parametrize("width", [1, 2, 5])
    def test_hypotheses_see_their_ancestors(self, monkeypatch, width, capacity):
        monkeypatch.setattr(TargetCache, "CAPACITY", capacity)
        generator = torch.Generator().manual_seed(width)
        rows, heads, layers = 6, 2, 2
        cache = TargetCache(layers, rows, heads, 3, 4, True, torch.device("cpu"))
        histories: list[list[list[float]]] = [[[]] for _ in range(rows)]  # values by row and hypothesis
        wide = 1
        for step in range(60):
            cache.make_room(wide)
            new = torch.rand(rows, wide, generator=generator)
            for layer in range(layers):
                sign = 1 - 2 * layer
                keys, values = cache.append(
                    layer,
                    (sign * new)[:, :, None, None].expand(rows, wide, heads, 3),
                    (sign * new + 1)[:, :, None, None].expand(rows, wide, heads, 4),
                )
                mask = cache.mask_for_heads()
                assert keys.shape == (rows * heads, cache.length, 3)
                assert values.shape == (rows * heads, cache.length, 4)
                assert mask.shape == (rows * heads, wide, cache.length)
                for row in range(len(histories)):
                    for beam in range(wide):
                        history = torch.tensor([*histories[row][beam], float(new[row, beam])])
                        for head in range(heads):
                            seen = mask[row * heads + head, beam] == 0
                            mine = keys[row * heads + head, seen], values[row * heads + head, seen]
                            assert torch.equal(mine[0], (sign * history)[:, None].expand(-1, 3))
                            assert torch.equal(mine[1], (sign * history + 1)[:, None].expand(-1, 4))
            grown = [
                [[*histories[row][beam], float(new[row, beam])] for beam in range(wide)]
                for row in range(len(histories))
            ]
            parents = torch.randint(0, wide, (rows, width), generator=generator)
            cache.move_beams(parents)
            histories = [[grown[row][parent] for parent in parents[row].tolist()] for row in range(rows)]
            wide = width
            if step in (20, 40):  # sentences leave
                kept = torch.tensor([0, 2, 3]) if step == 20 else torch.tensor([1, 2])
                cache.keep(kept)
                histories, rows = [histories[row] for row in kept.tolist()], len(kept)

    def test_memory_follows_the_distinct_histories(self):
        width, steps = 8, 400
        cache = TargetCache(1, 2, 1, 1, 1, True, torch.device("cpu"))
        for step in range(steps):
            wide = width if step else 1
            cache.make_room(wide)
            cache.append(0, torch.zeros(2, wide, 1, 1), torch.zeros(2, wide, 1, 1))
            # All continue the best: what they have in common is stored once.
            cache.move_beams(torch.zeros(2, width, dtype=torch.long))
            columns = cache.keys[0].shape[2]
            assert columns <= max(32, 1.6 * (step + 1) + 16 * width)
        assert columns < steps * width / 4

    @pytest.mark.parametrize("options", [{"num_beams": 5}, {"num_beams": 1}, {"num_beams": 6, "num_beam_groups": 2}])
    def test_its_size_changes_no_output(self, lively_model, source, monkeypatch, options):
        model = lively_model()
        arguments = {**source, **options, "max_new_tokens": 60, "min_new_tokens": 45, "return_dict_in_generate": True}
        outputs = []
        for capacity in (1000, 1):
            monkeypatch.setattr(TargetCache, "CAPACITY", capacity)
            outputs.append(model.generate(**arguments))
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        if "num_beam_groups" not in options:
            assert torch.equal(outputs[0].sequences, GenerationMixin.generate(model, **arguments).sequences)


# What only transformers' loops do, as arguments of `generate`, and what an error is to name.
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
        monkeypatch.setattr(generation, name, lambda *_: pytest.fail("our search was called"))


def filled(arguments: dict, model, source: dict) -> dict:
    """The arguments with what cannot be written in a table."""
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
            with pytest.raises(ValueError, match=f"{own} does not go with .*{name}"):
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


class Wrapped(nn.Linear):
    """A layer as a quantiser or an adapter leaves it: it computes something else than `nn.Linear`."""

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
    """As a user subclasses a model."""

    forward = loudly(VanillaTransformerForConditionalGeneration.forward)


class Shy(VanillaTransformerForConditionalGeneration):
    """It reads the first token of the target only."""

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        return super().prepare_inputs_for_generation(input_ids[:, :1].expand_as(input_ids), *args, **kwargs)


class Forgetful(VanillaTransformerForConditionalGeneration):
    """It does not reorder the cache with the beams. Older models of transformers have this method; ours do not."""

    def _reorder_cache(self, past_key_values, beam_idx):
        return past_key_values


class Picky(VanillaTransformerForConditionalGeneration):
    """It searches with other scores of beams."""

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
    """As it is done to see how sure a model is."""
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
    """`monkeypatch`, which also takes back what is no attribute."""
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
    with pytest.raises(ValueError, match="coverage_penalty does not go with"):
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
    """There the loss is taken without it otherwise."""
    model, labels = lively_model(dropout=0.0, label_smoothing=0.0).train(), source["input_ids"]
    if change == "hook":
        model.lm_head.register_forward_hook(lambda module, args, output: 0.5 * output)
    else:
        model.lm_head.forward = lambda x: 0.5 * nn.functional.linear(x, model.lm_head.weight, model.lm_head.bias)
    loss = model(**source, labels=labels).loss
    logits = model(**source, labels=labels, return_logits=True).logits
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_a_model_that_has_told_its_attention_is_still_decoded_here(lively_model, source):
    """transformers leaves hooks in the layers, which do nothing unless something is to be recorded."""
    model = lively_model(attention="eager")
    model(**source, decoder_input_ids=torch.ones(4, 1, dtype=torch.long), output_attentions=True)
    assert inspect_model(model).unknown is None

"""Packed products against the products that they stand for, and the type that a call computes in."""

import pytest
import torch

from vanilla_transformer import engine_products
from vanilla_transformer.engine_packed import PackedTransformer
from vanilla_transformer.engine_products import COMPUTE_TYPES, FEW_INPUTS, is_native, pack_linear


pytestmark = pytest.mark.usefixtures("packed_engine", "small_matrices_in_int8_too")


CPU = torch.device("cpu")


needs_fbgemm = pytest.mark.skipif(not is_native("int8", CPU), reason="whole numbers are FBGEMM's, on x86")


@pytest.fixture(scope="session")
def source(padded):
    return dict(zip(("input_ids", "attention_mask"), padded(side="left"), strict=True))


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
    monkeypatch.setattr(engine_products, "is_native", lambda compute_type, device: compute_type == "float32")
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(600, 512, generator=generator), torch.randn(4, 512, generator=generator)
    scales = weight.double().abs().amax(dim=1, keepdim=True) / 127
    rounded = {"bfloat16": weight.bfloat16().double(), "int8": (weight.double() / scales).round() * scales}
    found = pack_linear(weight, torch.zeros(600), compute_type)(x)
    torch.testing.assert_close(found, (x.double() @ rounded[compute_type].T).float(), rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_int8_leaves_small_matrices_in_float32(monkeypatch):
    monkeypatch.setattr(engine_products, "FEW_INPUTS", FEW_INPUTS)
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
    bits = engine_products._state_bits()
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


def test_packing_int8_leaves_the_process_s_quantisation_engine(tiny_model):
    before = torch.backends.quantized.engine
    PackedTransformer(tiny_model(), "int8")
    assert torch.backends.quantized.engine == before


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

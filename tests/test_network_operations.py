"""The fast dropout compared with independent draws; one cast with several; products with float64."""

import pytest
import torch
from torch.nn import functional as F

from vanilla_transformer.network_operations import (
    FEW_PRODUCTS,
    Dropout,
    Linear,
    cast_once,
    fast_dropout,
    linear,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_the_rate_and_the_scale_are_right(p, dtype):
    torch.manual_seed(0)
    x = torch.full((1001, 1003), 2.0, dtype=dtype)
    dropped = fast_dropout(x, p, training=True)
    zeros = (dropped == 0).double()
    # Within five standard deviations of a million coins.
    assert zeros.mean() == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 2 / (1 - p)))


def test_coins_are_independent():
    """Four elements share a random number; they, and elements of other draws, must still be independent."""
    torch.manual_seed(0)
    zeros = (fast_dropout(torch.ones(400_000), 0.4, training=True) == 0).double()
    for distance in (1, 2, 3, 4, 5, 8):
        together = (zeros[distance:] * zeros[:-distance]).mean()
        assert together == pytest.approx(0.16, abs=0.004), distance


def test_the_gradient_passes_where_the_value_did():
    torch.manual_seed(0)
    x = torch.randn(7, 13, dtype=torch.float64, requires_grad=True)  # not a multiple of four
    dropped = fast_dropout(x, 0.3, training=True)
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    torch.testing.assert_close(gradient * x, dropped)
    assert set(gradient.unique().tolist()) == {0.0, 1 / 0.7}


def test_torchs_seed_decides_the_mask():
    module, masks = Dropout(0.5), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(module(torch.ones(100)))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True)])
def test_nothing_is_dropped_in_evaluation_or_at_rate_0(p, training):
    x = torch.randn(5, 3)
    assert torch.equal(Dropout(p).train(training)(x), x)


def test_one_cast_serves_all_who_read_it():
    torch.manual_seed(0)
    x, projections = torch.randn(5, 8, requires_grad=True), [torch.nn.Linear(8, 8) for _ in range(3)]
    found = {}
    for cast in (lambda x: x, cast_once):
        kept: set[int] = set()

        def note(tensor, kept=kept):
            if tensor.shape == x.shape:
                kept.add(tensor.data_ptr())
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            read = cast(x * 1)  # of a leaf, autocast itself would keep the cast
            outputs = [projection(read) for projection in projections]
        (gradient,) = torch.autograd.grad(sum(output.float().square().sum() for output in outputs), x)
        found[cast] = (outputs, gradient, len(kept))
    (plain, plain_gradient, copies), (once, gradient, copy) = found.values()
    assert all(torch.equal(a, b) for a, b in zip(plain, once, strict=True))
    torch.testing.assert_close(gradient, plain_gradient, rtol=2e-2, atol=2e-2)  # summed in bfloat16, not in float32
    assert (copies, copy) == (3, 1)


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_cast_that_autocast_would_not_cast(enabled):
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert cast_once(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
        assert cast_once(torch.ones(2)).dtype == (torch.bfloat16 if enabled else torch.float32)


def with_gradients(product, x, weight, bias):
    """The product, its gradients, and gradients of those, by `product`."""
    leaves = [each.detach().clone().requires_grad_() for each in (x, weight, bias) if each is not None]
    result = product(*leaves)
    first = torch.autograd.grad((result**2).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum((each**2).sum() for each in first), leaves)
    return [result, *first, *second]


# Too little for oneDNN, and enough for it; with rows in two dimensions, and without a bias.
@pytest.mark.parametrize("shape", [(2, 3, 5), (600, 24), (20, 30, 24)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_and_their_gradients_are_torch_s_to_single_precision(shape, has_bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(40, shape[-1], generator=generator) / shape[-1] ** 0.5
    bias = torch.randn(40, generator=generator) if has_bias else None
    by_onednn = x.numel() * 40 > FEW_PRODUCTS
    assert (type(linear(x.requires_grad_(), weight, bias).grad_fn).__name__ == "_ProductBackward") == by_onednn

    found, torchs = (with_gradients(product, x, weight, bias) for product in (linear, F.linear))
    wide = [None if each is None else each.double() for each in (x, weight, bias)]
    for ours, theirs, exact in zip(found, torchs, with_gradients(F.linear, *wide), strict=True):
        assert ours.dtype == torch.float32
        scale = exact.abs().max()
        assert (ours - exact).abs().max() < max(4 * (theirs - exact).abs().max(), 1e-6 * scale)


def test_products_of_other_kinds_are_torch_s():
    x, weight = torch.randn(600, 24), torch.randn(40, 24)
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert torch.equal(linear(x.bfloat16(), weight.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    meta = linear(x.to("meta"), weight.to("meta"))
    assert meta.shape == (600, 40)


def test_a_linear_layer_learns_what_torch_s_learns():
    torch.manual_seed(0)
    ours, theirs = Linear(24, 40), torch.nn.Linear(24, 40)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(600, 24)
    for layer in (ours, theirs):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, theirs.get_parameter(name), rtol=1e-5, atol=1e-6)

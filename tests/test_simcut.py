"""SimCut: the divergence, which tokens are cut, and the loss by hand in float64."""

import copy
import os
from unittest import mock

import pytest
import torch
from conftest import TINY
from processes import forked_ranks
from test_r_drop import assert_same_update, make_trainer, passes_in_each_dtype
from torch.nn import functional as F

from vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration
from vanilla_transformer.modeling_vanilla_transformer import Decoder, Encoder
from vanilla_transformer.training.loop import two_passes
from vanilla_transformer.training.loop.simcut import cut_batch, cutting, divergence


@pytest.fixture
def inputs(padded) -> dict[str, torch.Tensor]:
    """A batch of uneven rows."""
    sources, mask = padded()
    labels = padded(lengths=(2, 6, 5, 1), seed=3)[0]
    return {"input_ids": sources, "attention_mask": mask, "labels": labels.masked_fill(labels == 0, -100)}


def test_the_divergence_and_its_gradient_are_those_of_torch_in_float64(monkeypatch):
    monkeypatch.setattr(two_passes, "CHUNK", 4)
    for labels, logits, reference, p, q in passes_in_each_dtype():
        dtype = logits.dtype
        expected = F.kl_div(q, p, log_target=True, reduction="sum")  # torch's order: KL(P || Q)
        found = divergence(logits, labels)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12 if dtype == torch.float64 else 1e-6)
        (3.0 * found).backward()
        (3.0 * expected).backward()
        error = (logits.grad - reference.grad).abs().max() / reference.grad.abs().max()
        assert error < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]


def test_only_the_second_pass_is_cut_but_neither_the_sources_end_nor_the_targets_start(tiny_model, inputs):
    """With p = 1, all that can be cut is."""
    rows, mask = len(inputs["labels"]), inputs["attention_mask"]
    twice, kept = cut_batch(inputs, tiny_model().config, p=1.0)
    assert kept.source[:rows].all()
    assert kept.target[:rows].all()
    ends = [[int(column) for column in row.nonzero()] for row in kept.source[rows:] & mask.bool()]
    assert ends == [[int(row.nonzero().max())] for row in mask]
    assert kept.target[rows:, 0].all()
    assert not kept.target[rows:, 1:].any()
    assert (twice["labels"][:rows] == inputs["labels"]).all()
    assert (twice["labels"][rows:] == -100).all()


def test_tokens_are_cut_at_the_rate_that_is_asked_for(tiny_model):
    torch.manual_seed(0)
    ids = torch.randint(3, 61, (200, 100))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    _, kept = cut_batch(batch, tiny_model().config, p=0.05)
    for side in kept:
        assert 1 - side[200:].double().mean().item() == pytest.approx(0.05 * 0.99, abs=5e-3)
    assert not torch.equal(kept.source, kept.target)


def test_labels_that_are_padded_on_the_left_keep_their_start(tiny_model):
    ids = torch.tensor([[7, 8, 9, 2], [7, 2, 0, 0]])
    labels = torch.tensor([[7, 8, 9, 2], [-100, -100, 7, 2]])
    _, kept = cut_batch(
        {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}, tiny_model().config, 1.0
    )
    assert kept.target[2:].tolist() == [[True, False, False, False], [True, True, True, False]]


def by_hand(model, inputs, kept, alpha: float, count: int) -> torch.Tensor:
    """
    The loss in float64, from its definition: both passes are calls of the model with embeddings that were multiplied
    outside of it, and the sums run token by token.
    """
    embeds = {}
    for name, stack, ids, keep in (
        ("inputs_embeds", model.model.encoder, inputs["input_ids"], kept.source),
        ("decoder_inputs_embeds", model.model.decoder, shifted(inputs["labels"], model.config), kept.target),
    ):
        table = stack.embed_tokens.weight
        embeds[name] = table[torch.cat([ids, ids])] * keep[..., None].double()
    mask = torch.cat([inputs["attention_mask"]] * 2)
    logits = model(attention_mask=mask, **embeds).logits
    whole, cut = (half.softmax(-1) for half in logits.chunk(2))
    total, smoothing = torch.zeros((), dtype=torch.float64), model.config.label_smoothing
    for row, column in (inputs["labels"] != -100).nonzero().tolist():
        p, q, label = whole[row, column], cut[row, column], inputs["labels"][row, column]
        total = (
            total - (1 - smoothing) * p[label].log() - smoothing * p.log().mean() + alpha * (p * (p / q).log()).sum()
        )
    return total / count


def shifted(labels: torch.Tensor, config) -> torch.Tensor:
    start = torch.full((len(labels), 1), config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, config.pad_token_id)], dim=1)


@pytest.mark.parametrize("shared", [True, False])
def test_loss_and_gradient_are_the_papers_by_hand_in_float64(shared, tiny_model, inputs, tmp_path, monkeypatch):
    alpha, count = 3.0, 40
    model = tiny_model(
        dropout=0.3, label_smoothing=0.1, share_encoder_decoder_embeddings=shared, tie_word_embeddings=shared
    ).train()
    trainer = make_trainer(model, tmp_path, simcut_alpha=alpha, simcut_p=0.4)
    reference = copy.deepcopy(model).double()
    kept = cut_batch(inputs, model.config, 0.4)[1]
    monkeypatch.setattr(
        "vanilla_transformer.training.loop.trainer.cut_batch",
        lambda *given: (cut_batch(*given)[0], kept),
    )

    state = torch.random.get_rng_state()
    cut_batch(inputs, model.config, 0.4)  # draws, as the trainer does before its passes
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    loss = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(count))
    loss.backward()
    # On a CPU, dropout's masks depend on the seed and not on the dtype.
    torch.random.set_rng_state(after)
    expected = by_hand(reference, inputs, kept, alpha, count)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        error = (one.grad - other.grad).abs().max() / other.grad.abs().max()
        assert error < 1e-4 or other.grad.abs().max() < 1e-6, name


def test_one_table_for_both_sides_is_cut_on_each_side_by_its_own_tokens(tiny_model, inputs, tmp_path):
    """`set_input_embeddings` gives encoder and decoder one module."""
    model = tiny_model(dropout=0.0).train()
    twice, kept = cut_batch(inputs, model.config, 0.4)
    with cutting(model, kept):
        apart = model(**twice).logits
    model.set_input_embeddings(model.get_input_embeddings())
    assert model.model.encoder.embed_tokens is model.model.decoder.embed_tokens
    with cutting(model, kept):
        assert torch.equal(model(**twice).logits, apart)


def test_nothing_is_cut_outside_and_no_hook_is_left(tiny_model, inputs, tmp_path):
    model = tiny_model(dropout=0.0).train()
    trainer = make_trainer(model, tmp_path, simcut_alpha=3.0, simcut_p=0.5)
    before = model(**inputs, return_logits=True).logits
    trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(9))
    assert torch.equal(model(**inputs, return_logits=True).logits, before)
    stacks = [module for module in model.modules() if isinstance(module, Encoder | Decoder)]
    assert len(stacks) == 2
    assert not any(stack._forward_pre_hooks for stack in stacks)
    with pytest.raises(KeyError), cutting(model, None):
        raise KeyError
    assert not any(stack._forward_pre_hooks for stack in stacks)


def test_in_evaluation_and_where_both_passes_are_equal_it_changes_nothing(tiny_model, inputs, tmp_path):
    options = {"num_items_in_batch": (inputs["labels"] != -100).sum()}
    for model, p in ((tiny_model(dropout=0.3).eval(), 0.5), (tiny_model(dropout=0.0).train(), 0.0)):
        with_it = make_trainer(model, tmp_path, simcut_alpha=3.0, simcut_p=p).compute_loss(model, inputs, **options)
        without = make_trainer(model, tmp_path).compute_loss(model, inputs, **options)
        assert with_it.item() == pytest.approx(without.item(), rel=1e-6)


def test_a_run_with_simcut_learns_by_another_loss(tiny_model, tmp_path):
    losses = []
    for alpha in (0.0, 3.0):
        torch.manual_seed(0)
        trainer = make_trainer(tiny_model(dropout=0.0), tmp_path, simcut_alpha=alpha, simcut_p=0.5)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] > losses[0] + 0.001


def cut_even_tokens(inputs, config, p):
    """Stands in for `cut_batch`: what is cut depends on the tokens alone, so that a batch can be split."""
    twice, kept = cut_batch(inputs, config, p)
    rows = len(inputs["labels"])
    for side, ids in ((kept.source, twice["input_ids"]), (kept.target, twice["decoder_input_ids"])):
        side[rows:] = ids[rows:] % 2 == 1
    return twice, kept


def one_update(folder, batch: int, accumulation: int = 1) -> dict[str, torch.Tensor]:
    """The loss of one update over eight uneven rows, and by how much it moved each weight."""
    torch.manual_seed(0)
    config = VanillaTransformerConfig(**TINY, dropout=0.0, label_smoothing=0.1)
    model = VanillaTransformerForConditionalGeneration(config)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    with mock.patch("vanilla_transformer.training.loop.trainer.cut_batch", cut_even_tokens):
        trainer = make_trainer(model, folder, simcut_alpha=3.0, **options)
        trainer.train()
    moved = {name: value - start[name] for name, value in model.state_dict().items()}
    return moved | {"loss": torch.tensor(trainer.state.log_history[0]["loss"])}


def one_of_two(folder) -> None:
    torch.save(one_update(folder, batch=4), folder / f"{os.environ['RANK']}.pt")


def test_one_update_is_the_same_however_its_batch_is_split(tmp_path):
    whole = one_update(tmp_path, batch=8)
    assert_same_update(whole, one_update(tmp_path, batch=2, accumulation=4))
    forked_ranks(one_of_two, tmp_path, CUDA_VISIBLE_DEVICES="")
    for process in (0, 1):
        assert_same_update(whole, torch.load(tmp_path / f"{process}.pt"))

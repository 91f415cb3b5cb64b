"""R-Drop: the divergence, the loss, and that results do not depend on how a batch is split."""

import copy
import os

import pytest
import torch
from conftest import TINY
from processes import forked_ranks
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq

from vanilla_transformer import (
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
    train_tokenizer,
)
from vanilla_transformer.training.loop import two_passes
from vanilla_transformer.training.loop.r_drop import symmetric_divergence
from vanilla_transformer.training.loop.trainer import TranslationTrainer
from vanilla_transformer.training.settings.arguments import TrainingArguments


def make_trainer(model, folder, **options) -> TranslationTrainer:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (16,), generator=generator).tolist()
    tokens = [torch.randint(3, 61, (length,), generator=generator).tolist() for length in lengths]
    rows = [{"input_ids": a, "labels": b} for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", eval_strategy="no", save_strategy="no", load_best_model_at_end=False,
        learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", warmup_steps=0, disable_tqdm=True,
        train_sampling_strategy="sequential", max_steps=1, logging_steps=1, **options,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(train_tokenizer(["text"], 300))  # it only pads, with 0 and -100
    return TranslationTrainer(model=model, args=args, train_dataset=rows, data_collator=collator)


def passes_in_each_dtype():
    """Yields labels, logits of two passes, these logits in float64, and from them log p and log q where they count."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 13, (3, 5), generator=generator)
    labels[0, 3:] = labels[2, 1:] = -100  # eleven positions count
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        logits = torch.randn(6, 5, 13, generator=generator).mul(8).to(dtype)
        # Predictions at padding must have no effect.
        logits[0, 3:] = 1e4
        reference = logits.double().requires_grad_()
        p, q = (half.log_softmax(-1)[labels != -100] for half in reference.chunk(2))
        yield labels, logits.requires_grad_(), reference, p, q


def test_the_divergence_and_its_gradient_are_those_of_torch_in_float64(monkeypatch):
    monkeypatch.setattr(two_passes, "CHUNK", 4)
    for labels, logits, reference, p, q in passes_in_each_dtype():
        dtype = logits.dtype
        both = F.kl_div(p, q, log_target=True, reduction="sum") + F.kl_div(q, p, log_target=True, reduction="sum")
        divergence = symmetric_divergence(logits, labels)
        assert divergence.dtype == torch.promote_types(dtype, torch.float32)
        assert divergence.item() == pytest.approx(both.item() / 2, rel=1e-12 if dtype == torch.float64 else 1e-6)
        (3.0 * divergence).backward()
        (1.5 * both).backward()
        error = (logits.grad - reference.grad).abs().max() / reference.grad.abs().max()
        assert error < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]


def test_small_gradients_of_half_precision_are_not_lost():
    """They are multiplied by the loss scale before they are rounded."""
    logits, scale = torch.tensor([[[0.0, -16.0]], [[0.0, -15.0]]], dtype=torch.float16).requires_grad_(), 2.0**16
    (scale * symmetric_divergence(logits, torch.tensor([[0]]))).backward()
    p, q = logits.detach().double().softmax(dim=-1)[:, 0]
    d = p.log() - q.log()
    expected = scale * (p * (d - (p * d).sum()) + p - q) / 2
    assert abs(expected[1]) / scale < 2e-7  # where float16 has steps of 6e-8
    assert logits.grad[0, 0, 1].item() == pytest.approx(expected[1].item(), rel=1e-3)


def by_hand(logits: torch.Tensor, labels: torch.Tensor, smoothing: float, alpha: float, count: int) -> torch.Tensor:
    """The loss of float64 logits `[2 B, T, V]`, token by token from its definition."""
    total = torch.zeros((), dtype=torch.float64)
    for row, sentence in enumerate(labels):
        for position, label in enumerate(sentence):
            if label == -100:
                continue
            p, q = (logits[half * len(labels) + row, position].softmax(0) for half in (0, 1))
            for prediction in (p, q):
                cross_entropy = -(1 - smoothing) * prediction[label].log() - smoothing * prediction.log().mean()
                total = total + cross_entropy / 2
            divergence = (p * (p / q).log()).sum() + (q * (q / p).log()).sum()
            total = total + alpha / 2 * divergence / 2
    return total / count


def test_loss_and_gradient_are_the_papers_by_hand_in_float64(tiny_model, padded, tmp_path):
    alpha, count = 3.0, 40
    model = tiny_model(dropout=0.3, activation_dropout=0.2, label_smoothing=0.1).train()
    trainer = make_trainer(model, tmp_path, r_drop_alpha=alpha)
    sources, mask = padded()
    labels = padded(lengths=(2, 6, 5, 1), seed=3)[0]
    labels = labels.masked_fill(labels == 0, -100)
    inputs = {"input_ids": sources, "attention_mask": mask, "labels": labels}
    reference = copy.deepcopy(model).double()

    torch.manual_seed(5)
    loss = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(count))
    loss.backward()
    # On a CPU, dropout's masks depend on the seed and not on the dtype.
    torch.manual_seed(5)
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    logits = reference(**twice, return_logits=True).logits
    assert not torch.allclose(*logits.chunk(2))
    expected = by_hand(logits, labels, 0.1, alpha, count)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected.item() - by_hand(logits, labels, 0.1, 0, count).item() > 0.1
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        error = (one.grad - other.grad).abs().max() / other.grad.abs().max()
        assert error < 1e-4 or other.grad.abs().max() < 1e-6, name


def test_without_dropout_and_in_evaluation_it_changes_nothing(tiny_model, padded, tmp_path):
    sources, mask = padded()
    inputs = {"input_ids": sources, "attention_mask": mask, "labels": sources.masked_fill(mask == 0, -100)}
    options = {"num_items_in_batch": mask.sum()}
    for model in (tiny_model(dropout=0.0).train(), tiny_model(dropout=0.3).eval()):
        with_it = make_trainer(model, tmp_path, r_drop_alpha=5.0).compute_loss(model, inputs, **options)
        without = make_trainer(model, tmp_path, r_drop_alpha=0.0).compute_loss(model, inputs, **options)
        assert with_it.item() == pytest.approx(without.item(), rel=1e-6)


def halve_differently(module, inputs, output):
    """Replaces dropout: the second pass drops other features, the same ones in every row."""
    rows, width = len(output) // 2, output.shape[-1]
    kept = torch.ones(2, width)
    kept[0, ::3], kept[1, 1::3] = 0, 0
    return output * kept.repeat_interleave(rows, dim=0)[:, None]


def one_update(folder, batch: int, accumulation: int = 1, alpha: float = 5.0) -> dict[str, torch.Tensor]:
    """The loss of one update over eight uneven rows, and the change of each weight."""
    torch.manual_seed(0)
    model = VanillaTransformerForConditionalGeneration(
        VanillaTransformerConfig(**TINY, dropout=0.0, label_smoothing=0.1)
    )
    model.model.encoder.layers[-1].register_forward_hook(halve_differently)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(model, folder, r_drop_alpha=alpha, **options)
    trainer.train()
    moved = {name: value - start[name] for name, value in model.state_dict().items()}
    return moved | {"loss": torch.tensor(trainer.state.log_history[0]["loss"])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, torch.Tensor]:
    return one_update(tmp_path_factory.mktemp("whole"), batch=8)


def assert_same_update(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        assert (value - other[name]).abs().max() <= 1e-6 + 1e-5 * value.abs().max(), name


@pytest.mark.parametrize("batch", [4, 2, 1])
def test_one_update_is_the_same_however_its_batch_is_split(batch, whole, tmp_path):
    assert_same_update(whole, one_update(tmp_path, batch, accumulation=8 // batch))


def one_of_two(folder) -> None:
    torch.save(one_update(folder, batch=4), folder / f"{os.environ['RANK']}.pt")


def test_one_update_of_two_processes_is_that_of_one(whole, tmp_path):
    forked_ranks(one_of_two, tmp_path, CUDA_VISIBLE_DEVICES="")
    for process in (0, 1):
        assert_same_update(whole, torch.load(tmp_path / f"{process}.pt"))


def test_the_divergence_takes_part_in_an_update(whole, tmp_path):
    assert whole["loss"] > one_update(tmp_path, batch=8, alpha=0.0)["loss"] + 0.01

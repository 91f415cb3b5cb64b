"""Compares the loss with its definition; it does not depend on how the tokens of an update are split."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers import DataCollatorForSeq2Seq, MarianConfig, MarianMTModel

from vanilla_transformer import train_tokenizer
from vanilla_transformer.network_loss import CHUNK, label_smoothed_cross_entropy, projected_cross_entropy


@pytest.fixture
def batch(padded):
    """Eight sentence pairs of uneven lengths."""
    input_ids, attention_mask = padded((5, 3, 7, 1, 4, 6, 2, 5))
    labels, label_mask = padded((4, 6, 1, 5, 3, 2, 6, 1), seed=1)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels.where(label_mask == 1, -100)}


def smoothed_by_hand(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Section 5.4 token by token, in float64: the target has 1 - e on the truth and e spread over all V tokens."""
    losses = []
    for scores, label in zip(logits.double().flatten(0, 1), labels.flatten(), strict=True):
        if label != -100:
            target = torch.full_like(scores, smoothing / len(scores))
            target[label] += 1 - smoothing
            losses.append(-(target * scores.log_softmax(-1)).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_the_loss_is_its_definition(batch, smoothing):
    logits = torch.randn(8, 6, 61, generator=torch.Generator().manual_seed(0)) * 3
    loss = label_smoothed_cross_entropy(logits, batch["labels"], smoothing)
    torch.testing.assert_close(loss.double(), smoothed_by_hand(logits, batch["labels"], smoothing).mean())
    mean = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(loss, mean)


def test_the_model_smooths_in_training_and_never_in_evaluation(tiny_model, batch):
    model = tiny_model(dropout=0, label_smoothing=0.3)
    for training, smoothing in ((True, 0.3), (False, 0.0)):
        outputs = model.train(training)(**batch, return_logits=True)
        expected = smoothed_by_hand(outputs.logits, batch["labels"], smoothing).mean()
        torch.testing.assert_close(outputs.loss.double(), expected, rtol=1e-6, atol=0)


def test_labels_are_shifted_right_to_make_the_input_of_the_decoder(tiny_model, batch):
    model = tiny_model(decoder_start_token_id=5)
    labels = batch.pop("labels")
    decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels)
    assert decoder_input_ids[0].tolist() == [5, *labels[0, :4].tolist(), 0]
    expected = model(**batch, decoder_input_ids=decoder_input_ids)
    outputs = model(**batch, labels=labels)
    assert torch.equal(outputs.logits, expected.logits)
    assert expected.loss is None
    given = model(**batch, labels=labels, decoder_input_ids=decoder_input_ids.clamp(min=7))
    assert not torch.equal(given.logits, outputs.logits)


@pytest.mark.parametrize("rows", [4, 2, 1])
def test_loss_and_gradient_do_not_depend_on_how_an_update_is_split(tiny_model, batch, rows):
    model = tiny_model(dropout=0).train()
    tokens = (batch["labels"] != -100).sum()

    def accumulated(rows):
        model.zero_grad()
        parts = [{name: value[start : start + rows] for name, value in batch.items()} for start in range(0, 8, rows)]
        losses = [model(**part, num_items_in_batch=tokens).loss for part in parts]
        sum(losses).backward()
        return sum(losses), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    whole_loss, whole_gradients = accumulated(8)
    loss, gradients = accumulated(rows)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole_loss, model(**batch).loss, rtol=1e-6, atol=0)
    norm = torch.stack([gradient.norm() for gradient in whole_gradients.values()]).norm()
    for name, gradient in whole_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-6 * norm, name


def test_the_count_of_tokens_may_be_a_number(tiny_model, batch):
    model = tiny_model()
    tokens = int((batch["labels"] != -100).sum())
    torch.testing.assert_close(
        model(**batch, num_items_in_batch=tokens).loss, model(**batch, num_items_in_batch=torch.tensor(tokens)).loss
    )


def test_labels_that_are_all_ignored_give_zero_and_zero_gradients(tiny_model, batch):
    model = tiny_model().train()
    loss = model(**batch | {"labels": torch.full((8, 6), -100)}).loss
    loss.backward()
    assert loss == 0
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_logits_in_half_precision_are_summed_in_float32():
    """Smoothing adds up V small terms: in bfloat16 the sum would be off by percents."""
    logits = torch.randn(2, 5, 4000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    labels = torch.arange(10).view(2, 5)
    loss = label_smoothed_cross_entropy(logits, labels, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), smoothed_by_hand(logits, labels, 0.1).mean(), rtol=1e-6, atol=0)


def test_a_float64_model_keeps_a_float64_loss(tiny_model, batch):
    assert tiny_model().double()(**batch).loss.dtype == torch.float64


def projection(dtype: torch.dtype, rows: int = 2 * CHUNK + 37) -> tuple[list[torch.Tensor], torch.Tensor]:
    """States, output matrix and bias that need gradients, and labels of which a quarter do not count."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, rows, 24), (301, 24), (301,))
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(0, 301, (1, rows), generator=generator)
    return tensors, labels.masked_fill(torch.rand(1, rows, generator=generator) < 0.25, -100)


def reference(tensors, labels, smoothing) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """torch's own projection and loss one after the other, in float64."""
    states, weight, bias = (tensor.detach().double().requires_grad_() for tensor in tensors)
    logits = F.linear(states, weight, bias)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    return loss, list(torch.autograd.grad(loss, (states, weight, bias)))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_projection_and_loss_in_one_agree_with_one_after_the_other(dtype, bound, smoothing):
    tensors, labels = projection(dtype)
    loss = projected_cross_entropy(*tensors, labels, smoothing)
    expected, gradients = reference(tensors, labels, smoothing)
    assert abs(loss.item() - expected.item()) <= bound * expected.item()
    for found, gradient in zip(torch.autograd.grad(loss, tensors), gradients, strict=True):
        assert relative(found, gradient) <= bound
        assert found.dtype == dtype


def test_projection_and_loss_in_one_agree_under_autocast():
    """Its value is that of torch under autocast; its gradients are no further from the exact ones than torch's."""
    tensors, labels = projection(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = projected_cross_entropy(*tensors, labels, 0.1)
        logits = F.linear(*tensors)
    by_torch = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_torch.item(), rel=1e-6)
    _, exact = reference(tensors, labels, 0.1)
    pairs = zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(by_torch, tensors), exact, strict=True)
    for found, torchs, gradient in pairs:
        assert found.dtype == torch.float32
        assert relative(found, gradient) <= 1.1 * relative(torchs, gradient) + 1e-6


def test_the_gradient_scales_with_what_follows_the_loss():
    tensors, labels = projection(torch.float64, rows=9)
    once, thrice = (torch.autograd.grad(k * projected_cross_entropy(*tensors, labels, 0.1), tensors) for k in (1, 3))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_training_never_holds_the_logits_of_all_tokens(tiny_model, batch):
    """No tensor of the size [tokens, vocabulary] is created or kept between forward and backward."""
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            shapes.extend(tuple(tensor.shape) for tensor in [result] if isinstance(tensor, torch.Tensor))
            return result

    model = tiny_model(vocab_size=997, dropout=0).train()
    labels = batch["labels"].clamp(min=3).repeat(1, 60)  # 8 x 360, more than one chunk
    with Watch():
        outputs = model(**batch | {"labels": labels})
        outputs.loss.backward()
    assert outputs.logits is None
    largest = max(shape[0] for shape in shapes if len(shape) == 2 and shape[-1] == 997)
    assert largest == CHUNK < labels.numel()
    assert not any(len(shape) == 3 and shape[-1] == 997 for shape in shapes)


def test_with_and_without_logits_training_is_the_same(tiny_model, batch):
    found = []
    for return_logits in (False, True):
        model = tiny_model(dropout=0, label_smoothing=0.1).train()
        outputs = model(**batch, return_logits=return_logits)
        outputs.loss.backward()
        assert (outputs.logits is not None) == return_logits
        found.append([outputs.loss, *(parameter.grad for parameter in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_compiled_training_is_the_same_and_is_not_compiled_anew_for_each_length(tiny_model, padded):
    model = tiny_model(dropout=0, attention="eager").train()
    compiles = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=compiles)
    counts = []
    for shift in range(5):
        sources, mask = padded((5 + shift, 3, 7 + 2 * shift))
        labels = padded((4, 2 + shift, 6 + shift), seed=shift)[0]
        found = []
        for run in (model, compiled):
            model.zero_grad()
            loss = run(input_ids=sources, attention_mask=mask, labels=labels).loss
            loss.backward()
            found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        counts.append(compiles.frame_count)
    assert counts[0] > 0
    assert counts[1:] == [counts[1]] * 4


def moved_left(tokens: torch.Tensor, padding: int) -> torch.Tensor:
    """The same rows, padded on the other side."""
    rows = []
    for row in tokens:
        kept = row[row != padding]
        rows.append(F.pad(kept, (len(row) - len(kept), 0), value=padding))
    return torch.stack(rows)


class TestPaddingOnTheLeft:
    """Loss, gradients and scores do not depend on the side of the padding."""

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("fields", [{}, {"position_embedding_type": "learned"}], ids=["sinusoids", "learned"])
    @pytest.mark.parametrize("training", [True, False])
    def test_loss_and_gradients_are_those_of_padding_on_the_right(self, tiny_model, batch, attention, fields, training):
        left = {
            "input_ids": moved_left(batch["input_ids"], 0),
            "attention_mask": moved_left(batch["attention_mask"], 0),
            "labels": moved_left(batch["labels"], -100),
        }
        mask = (left["labels"] != -100).long()
        found = []
        for inputs in (batch, left, left | {"decoder_attention_mask": mask}, batch | {"labels": left["labels"]}):
            model = tiny_model(attention=attention, dropout=0, **fields).double().train(training)
            loss = model(**inputs).loss
            loss.backward()
            found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        for other in found[1:]:
            for expected, got in zip(found[0], other, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)

    def test_a_compiled_model_sees_it_too(self, tiny_model, batch):
        model = tiny_model(dropout=0, attention="eager").train()
        compiled = torch.compile(model, backend="eager")
        expected = model(**batch).loss
        torch.testing.assert_close(compiled(**batch | {"labels": moved_left(batch["labels"], -100)}).loss, expected)
        torch.testing.assert_close(compiled(**batch).loss, expected)

    def test_score_takes_it_on_either_side(self, tiny_model, batch):
        model = tiny_model().double()
        right = model.score(batch["input_ids"], batch["attention_mask"], batch["labels"])
        left = model.score(batch["input_ids"], batch["attention_mask"], moved_left(batch["labels"], -100))
        torch.testing.assert_close(left.sequence_log_probs, right.sequence_log_probs)

    def test_a_gap_between_tokens_is_refused_unless_the_input_of_the_decoder_is_given(self, tiny_model):
        model = tiny_model()
        source, labels = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[5, 6, 2, -100], [5, -100, -100, 2]])
        for call in (
            lambda: model(input_ids=source, labels=labels),
            lambda: model.prepare_decoder_input_ids_from_labels(labels),
            lambda: model.score(source, labels=labels),
        ):
            with pytest.raises(ValueError, match="labels: row 1 has -100 between two tokens"):
                call()
        given = torch.tensor([[1, 5, 6, 2], [1, 5, 9, 9]])
        logits = model(input_ids=source, decoder_input_ids=given).logits
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(model(input_ids=source, decoder_input_ids=given, labels=labels).loss, expected)

    def test_a_collator_that_pads_on_the_left_is_refused(self, tiny_model):
        """`decoder_input_ids` alone do not show the padding."""
        tokenizer = train_tokenizer(["some text"], 300)
        tokenizer.padding_side = "left"
        collator = DataCollatorForSeq2Seq(tokenizer, model=tiny_model(vocab_size=300))
        with pytest.raises(ValueError, match=r"labels are padded on the left: .*tokenizer.padding_side"):
            collator([{"input_ids": [5, 2], "labels": [5, 6, 2]}, {"input_ids": [5, 2], "labels": [5, 2]}])


class TestOutputsByNumber:
    """If training leaves the logits out, no other output may take their place."""

    @pytest.mark.parametrize("place", [1, -1, slice(1, None), slice(None)], ids=str)
    def test_training_without_logits_has_nothing_behind_the_loss(self, tiny_model, batch, place):
        outputs = tiny_model().train()(**batch)
        assert outputs[0] is outputs.loss is outputs["loss"]
        assert outputs.encoder_last_hidden_state is not None
        with pytest.raises(ValueError, match="without logits: set return_logits=True"):
            outputs[place]
        with pytest.raises(ValueError, match="without logits: set return_logits=True"):
            outputs.to_tuple()

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("by_config", [True, False])
    def test_a_tuple_has_the_places_of_marians(self, tiny_model, batch, training, by_config):
        model = tiny_model(dropout=0).train(training)
        expected = model(**batch, return_logits=True)
        ids = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2}
        sizes = {"vocab_size": 61, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
        marian = MarianMTModel(MarianConfig(**sizes, **ids)).train(training)
        places = list(marian(**batch))
        if by_config:
            model.config.return_dict = False
            outputs = model(**batch)
            assert model.score(**batch).tokens.tolist() == [4, 6, 1, 5, 3, 2, 6, 1]
        else:
            outputs = model(**batch, return_dict=False)
        assert type(outputs) is tuple
        assert len(outputs) == len(places)
        for got, name in zip(outputs, places, strict=True):
            torch.testing.assert_close(got, expected[name])

    def test_what_distributed_training_does_to_outputs_keeps_them(self, tiny_model, batch):
        outputs = tiny_model().train()(**batch)
        doubled = tree_map(lambda tensor: tensor * 2, outputs)
        assert type(doubled) is type(outputs)
        torch.testing.assert_close(doubled.loss, outputs.loss * 2)
        with pytest.raises(ValueError, match="without logits"):
            doubled[1]

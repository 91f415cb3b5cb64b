"""conversion/onnx.py: compares onnxruntime's output of the graphs with the model."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from networks import EXTREMES
from transformers import PreTrainedModel


onnxruntime = pytest.importorskip("onnxruntime", reason="the dev extra installs onnxruntime and onnxscript")
from vanilla_transformer.conversion.onnx import to_onnx  # noqa: E402  (it needs onnxscript)


NEW_TOKENS = 20


class Converted(NamedTuple):
    """A model, and its two graphs in onnxruntime."""

    model: PreTrainedModel
    encoder: "onnxruntime.InferenceSession"
    decoder: "onnxruntime.InferenceSession"

    def encode(self, source: torch.Tensor, mask: torch.Tensor) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the encoder's states, and prepares the decoder's first inputs."""
        states, keys, values = self.encoder.run(None, {"input_ids": source.numpy(), "attention_mask": mask.numpy()})
        past = {"past_keys": keys[:, :, :, :0], "past_values": values[:, :, :, :0]}
        return states, {"attention_mask": mask.numpy(), "cross_keys": keys, "cross_values": values, **past}

    def decode(self, target: torch.Tensor, inputs: dict[str, np.ndarray]) -> torch.Tensor:
        """Logits of these target tokens. They are then part of the past."""
        logits, inputs["past_keys"], inputs["past_values"] = self.decoder.run(
            None, {**inputs, "decoder_input_ids": target.numpy()}
        )
        return torch.from_numpy(logits)


@pytest.fixture(scope="module", params=EXTREMES.values(), ids=EXTREMES)
def converted(request, lively_model, tmp_path_factory):
    model = lively_model(**request.param)
    folder = tmp_path_factory.mktemp("onnx")
    to_onnx(model, folder)
    # The weights are in the files themselves.
    assert sorted(path.name for path in folder.iterdir()) == ["decoder.onnx", "encoder.onnx"]
    sessions = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder"))
    return Converted(model, *sessions)


# Sentences of other numbers and lengths than those that the graphs were made with; the smallest are 1.
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [(7, 4, 1, 6), (3,), (1,), (2, 9)], ids=str)
@torch.no_grad()
def test_logits_are_the_models_for_any_sizes_and_any_steps(lengths, side, converted, padded):
    source, mask = padded(lengths, side)
    target, _ = padded((8,) * len(lengths), vocab_size=53, seed=1)
    expected = converted.model(source, mask, decoder_input_ids=target)
    states, inputs = converted.encode(source, mask)
    seen = mask.bool()
    torch.testing.assert_close(
        torch.from_numpy(states)[seen], expected.encoder_last_hidden_state[seen], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(converted.decode(target, dict(inputs)), expected.logits, atol=1e-5, rtol=0)
    steps = [converted.decode(target[:, start:end], inputs) for start, end in ((0, 1), (1, 2), (2, 5), (5, 8))]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected.logits, atol=1e-5, rtol=0)
    assert inputs["past_keys"].shape[3] == target.shape[1]


def test_a_greedy_search_by_onnxruntime_is_that_of_generate(converted, padded):
    config = converted.model.config
    source, mask = padded((7, 4, 1, 6, 9, 3), vocab_size=53)
    expected = converted.model.generate(source, attention_mask=mask, num_beams=1, max_new_tokens=NEW_TOKENS)
    _, inputs = converted.encode(source, mask)
    tokens = torch.full((len(source), 1), config.decoder_start_token_id)
    while tokens.shape[1] < expected.shape[1]:
        best = converted.decode(tokens[:, -1:], inputs)[:, -1].argmax(dim=-1)
        ended = (tokens[:, 1:] == config.eos_token_id).any(dim=1)
        tokens = torch.cat([tokens, best.masked_fill(ended, config.pad_token_id)[:, None]], dim=1)
    assert tokens.tolist() == expected.tolist()
    assert expected.unique(dim=0).shape[0] > 1


def test_the_sizes_that_may_differ_have_names(converted):
    shapes = {entry.name: entry.shape for entry in (*converted.decoder.get_inputs(), *converted.decoder.get_outputs())}
    config = converted.model.config
    d_k, d_v = config.d_kv or config.d_model // 2, config.d_v or config.d_model // 2
    assert shapes == {
        "decoder_input_ids": ["batch", "target"],
        "attention_mask": ["batch", "source"],
        "cross_keys": [2, "batch", 2, "source", d_k],
        "cross_values": [2, "batch", 2, "source", d_v],
        "past_keys": [2, "batch", 2, "past", d_k],
        "past_values": [2, "batch", 2, "past", d_v],
        "logits": ["batch", "target", config.decoder_vocab_size],
        "keys": [2, "batch", 2, "past + target", d_k],
        "values": [2, "batch", 2, "past + target", d_v],
    }

"""conversion/export.py: the programs of torch.export give the model's output, in a process without our code."""

import subprocess
import sys

import pytest
import torch
from networks import EXTREMES

from vanilla_transformer.conversion.export import to_torch_export


# Nothing is needed but torch. Reads a file of inputs, and writes logits: of all target tokens at once, and one by one.
WITHOUT_US = """
import sys
sys.modules["vanilla_transformer"] = sys.modules["transformers"] = None  # importing them fails
import torch

folder = sys.argv[1]
encoder, decoder = (torch.export.load(f"{folder}/{name}.pt2").module() for name in ("encoder", "decoder"))
found = []
for source, mask, target in torch.load(f"{folder}/inputs.pt"):
    states, cross_keys, cross_values = encoder(source, mask)
    nothing = cross_keys[:, :, :, :0], cross_values[:, :, :, :0]
    whole, _, _ = decoder(target, mask, cross_keys, cross_values, *nothing)
    past, steps = nothing, []
    # the first token alone, then two, then the rest, one at a time
    for start, end in [(0, 1), (1, 3), *((step, step + 1) for step in range(3, target.shape[1]))]:
        logits, *past = decoder(target[:, start:end], mask, cross_keys, cross_values, *past)
        steps.append(logits)
    found.append((states, whole, torch.cat(steps, dim=1)))
torch.save(found, f"{folder}/found.pt")
"""
# Sentences of other numbers and lengths than those that the programs were made with; the smallest are 1.
BATCHES = [((7, 4, 1, 6), "right", 6), ((7, 4, 1, 6), "left", 4), ((3,), "right", 9), ((1,), "right", 5)]


@pytest.mark.parametrize("fields", EXTREMES.values(), ids=EXTREMES)
@torch.no_grad()
def test_a_process_without_our_code_computes_the_same(fields, tiny_model, padded, tmp_path):
    model = tiny_model(**fields)
    inputs = []
    for lengths, side, target_length in BATCHES:
        source, mask = padded(lengths, side)
        target, _ = padded((target_length,) * len(lengths), vocab_size=53, seed=1)
        inputs.append((source, mask, target))
    to_torch_export(model, tmp_path / "exported")
    torch.save(inputs, tmp_path / "exported" / "inputs.pt")
    result = subprocess.run([sys.executable, "-c", WITHOUT_US, tmp_path / "exported"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = torch.load(tmp_path / "exported" / "found.pt")
    for (source, mask, target), (states, whole, steps) in zip(inputs, found, strict=True):
        expected = model(source, mask, decoder_input_ids=target)
        seen = mask.bool()
        torch.testing.assert_close(states[seen], expected.encoder_last_hidden_state[seen], atol=1e-5, rtol=0)
        torch.testing.assert_close(whole, expected.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(steps, expected.logits, atol=1e-5, rtol=0)


def test_a_model_in_bfloat16_and_training_is_exported_in_float32_and_evaluation(tiny_model, padded, tmp_path):
    model = tiny_model(dropout=0.5).bfloat16().train()
    to_torch_export(model, tmp_path)
    assert model.training
    assert model.dtype == torch.bfloat16
    encoder = torch.export.load(tmp_path / "encoder.pt2").module()
    source, mask = padded()
    with torch.no_grad():
        expected = model.float().eval().model.encoder(source, mask).last_hidden_state
    torch.testing.assert_close(encoder(source, mask)[0], expected, atol=1e-5, rtol=0)

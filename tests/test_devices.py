"""Which device a program takes: the one that accelerate names. No test machine has them all, so some are pretended."""

import pytest
import torch
from accelerate import PartialState

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training import machine
from vanilla_transformer.training.saved_model import load_model


@pytest.fixture
def meta_device(monkeypatch):
    """A device that every build of torch has, as accelerate's choice."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    PartialState._reset_state()
    yield torch.device("meta")
    PartialState._reset_state()


def test_a_model_is_loaded_to_the_device_that_accelerate_names(meta_device, tiny_model, tmp_path):
    tokenizer = train_tokenizer(["one two three"] * 9, 262)
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    assert model.device == meta_device


@pytest.mark.parametrize(("kind", "has_own"), [("cpu", False), ("mps", False), ("cuda", True), ("xpu", True)])
def test_memory_is_that_of_the_device_where_it_has_its_own(kind, has_own):
    counts = machine.memory_counts(torch.device(kind))
    assert (counts is not None) == has_own
    if has_own:
        for name in ("mem_get_info", "max_memory_allocated", "reset_peak_memory_stats"):
            assert callable(getattr(counts, name))


@pytest.mark.parametrize(("kind", "words"), [("mps", "2 x MPS"), ("xpu", "2 x Some Card")])
def test_a_card_names_the_accelerator(kind, words, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda: "Some Card")
    assert machine.machine() == words

"""Shared fixtures: a tiny model whose parameters all have values that reveal mistakes, and batches for it."""

import gc
import importlib.util
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from vanilla_transformer import (
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
    engine_choice,
    engine_products,
)
from vanilla_transformer import engine_program as program
from vanilla_transformer.training.machine import processor


# transformers' own tests are downloaded: `make conformance` puts them on the path, and only then are they collected.
collect_ignore = [] if importlib.util.find_spec("transformers_tests") else ["conformance"]

# No two sizes that could be taken for each other are equal.
TINY = {
    "vocab_size": 61,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 48,
}


def pytest_report_header() -> str:
    """The first line of a test run names the machine."""
    return f"processor: {processor()}"


def pytest_collection_finish() -> None:
    """
    What is imported by now stays: no collection of garbage looks at it again. accelerate collects whenever training
    begins, which took longer than most runs of these tests.
    """
    gc.freeze()


@pytest.fixture(autouse=True)
def wait_for_compiler(monkeypatch) -> None:
    """`generate()` waits for the compiler, so the default engine does not depend on its speed."""
    monkeypatch.setattr(engine_choice, "load_soon", program.load)


@pytest.fixture
def packed_engine(monkeypatch, wait_for_compiler) -> None:
    """`generate()` decodes without the compiled program unless a test says `compiled=True`."""
    monkeypatch.setattr(engine_choice, "load_soon", lambda: None)


@pytest.fixture
def small_matrices_in_int8_too(monkeypatch) -> None:
    """Lets the packed engine round matrices with few inputs to int8 too, since tiny networks have no others."""
    monkeypatch.setattr(engine_products, "FEW_INPUTS", 0)


@pytest.fixture(params=["as this machine does it", "in float32"])
def way(request, monkeypatch) -> None:
    """Each data type, with this machine's instructions and without them."""
    if request.param == "in float32":
        monkeypatch.setattr(engine_products, "is_native", lambda compute_type, device: compute_type == "float32")


@pytest.fixture
def program_cache(monkeypatch, tmp_path) -> Iterator[Path]:
    """An empty cache folder for the compiled program, and no program loaded in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program.forget()
    yield tmp_path / "cache" / "vanilla_transformer"
    program.forget()


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., VanillaTransformerConfig]:
    """Builds the tiny configuration, with some of its fields changed."""
    return lambda **fields: VanillaTransformerConfig(**{**TINY, **fields})


@pytest.fixture(scope="session")
def tiny_model(tiny_config) -> Callable[..., PreTrainedModel]:
    """Builds a tiny model in evaluation mode, seeded, with random values in every bias and norm too."""

    def build(
        model_class=VanillaTransformerForConditionalGeneration, attention="sdpa", seed=0, **fields
    ) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = model_class._from_config(tiny_config(**fields), attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def padded() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Builds rows of random tokens of these lengths, padded on one side, `[B, L]`, and their mask."""

    def build(lengths=(7, 4, 1, 6), side="right", vocab_size=61, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
        columns = torch.arange(max(lengths))
        if side == "left":
            columns = columns.flip(0)
        mask = (columns < torch.tensor(lengths)[:, None]).long()
        tokens = torch.empty_like(mask)
        # Filled row by row in the order of the tokens, so that both sides of padding hold the same sentences.
        generator = torch.Generator().manual_seed(seed)
        for row, length in enumerate(lengths):
            sentence = torch.randint(3, vocab_size, (length,), generator=generator)
            tokens[row] = 0
            tokens[row, mask[row].bool()] = sentence
        return tokens, mask

    return build


@pytest.fixture(scope="session")
def lively_model(tiny_model, padded) -> Callable[..., PreTrainedModel]:
    """
    Builds a tiny model whose outputs are worth searching: they depend on the source and on all that precedes, a token
    seldom follows itself, and about one token in eight ends the sentence.
    """

    def build(seed=0, tie_word_embeddings=False, **fields) -> PreTrainedModel:
        model = tiny_model(tie_word_embeddings=tie_word_embeddings, seed=seed, **fields)
        with torch.no_grad():
            for layer in model.model.decoder.layers:
                # What is added to the last token's embedding must not drown it.
                layer.self_attn.out_proj.weight.mul_(0.4)
                layer.fc2.weight.mul_(0.4)
            if not tie_word_embeddings:
                tokens = torch.randperm(model.config.decoder_vocab_size)
                model.lm_head.weight.copy_(model.model.decoder.embed_tokens.weight[tokens])
            sources, mask = padded((7, 5, 3, 8), vocab_size=model.config.vocab_size, seed=seed)
            targets = padded((12, 12, 12, 12), vocab_size=model.config.decoder_vocab_size, seed=seed)[0]
            logits = model(sources, mask, decoder_input_ids=targets).logits
            behind = logits.amax(dim=-1) - logits[..., 2]  # of the likeliest token
            model.lm_head.bias[2] += behind.quantile(1 / 8)
        return model

    return build


@pytest.fixture(scope="session")
def peer_python() -> Callable[[str], Path]:
    """Finds the interpreter of the environment that `make peers` makes for a framework."""

    def find(name: str) -> Path:
        environment = Path(__file__).parents[1] / ".peers" / name
        assert (environment / "installed").exists(), f"{name} is not installed in {environment}: make peers"
        return environment / "bin" / "python"

    return find


@pytest.fixture(scope="session")
def run_peer(peer_python) -> Callable[..., None]:
    """Runs tests/peers/NAME_driver.py in that environment."""

    def run(name: str, *arguments: str | Path) -> None:
        driver = Path(__file__).parent / "peers" / f"{name}_driver.py"
        done = subprocess.run([peer_python(name), driver, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return run

"""What the tests share: one tiny model with no parameter at a value that hides a mistake, and batches for it."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration


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


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., VanillaTransformerConfig]:
    """Builds the tiny configuration, with some of its fields changed."""
    return lambda **fields: VanillaTransformerConfig(**{**TINY, **fields})


@pytest.fixture(scope="session")
def tiny_model(tiny_config) -> Callable[..., PreTrainedModel]:
    """Builds a tiny model in evaluation mode, seeded, with random values in every bias and norm too."""

    def build(model_class=VanillaTransformerForConditionalGeneration, attention="sdpa", **fields) -> PreTrainedModel:
        torch.manual_seed(0)
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

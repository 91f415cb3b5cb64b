"""conversion/torch_transformer.py: torch.nn.Transformer's own forward pass, and a greedy loop over it."""

import math
import re

import pytest
import torch
from torch import nn

from vanilla_transformer.conversion.checkpoints import pack_tokenizer, word_tokenizer
from vanilla_transformer.conversion.torch_transformer import from_torch_transformer
from vanilla_transformer.tokenization_vanilla_transformer import SPECIAL_TOKENS


D_MODEL, HEADS, SOURCE_SIZE, TARGET_SIZE, LONGEST = 16, 4, 61, 53, 24
LENGTHS = (7, 4, 1, 6)
NAMES = {"prefix": "transformer.", "source_embedding": "source.weight"}
ENCODER, DECODER = "transformer.encoder.layers", "transformer.decoder.layers"
SEPARATE = {"target_embedding": "target.weight", "output": "generator.weight"}


class Translator(nn.Module):
    """A typical model around torch.nn.Transformer."""

    def __init__(self, shared=False, positions=False, scaled=True, final_norm=True, **options):
        super().__init__()
        self.transformer = nn.Transformer(
            D_MODEL, HEADS, 3, 2, dim_feedforward=24, dropout=0.0, batch_first=True, **options
        )
        if not final_norm:
            self.transformer.encoder.norm = self.transformer.decoder.norm = None
        self.scale = math.sqrt(D_MODEL) if scaled else 1.0
        self.source = nn.Embedding(SOURCE_SIZE, D_MODEL)
        self.target = self.source if shared else nn.Embedding(TARGET_SIZE, D_MODEL)
        self.generator = nn.Linear(D_MODEL, SOURCE_SIZE if shared else TARGET_SIZE, bias=not shared)
        if shared:
            self.generator.weight = self.source.weight
        table = torch.randn(1, LONGEST, D_MODEL) if positions else sinusoids()[None]
        self.register_buffer("positions", table, persistent=positions)

    def forward(self, source, source_mask, target):
        def embed(table, ids):
            return table(ids) * self.scale + self.positions[:, : ids.shape[1]]

        padding = source_mask == 0
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=self.source.weight.dtype)
        decoded = self.transformer(
            embed(self.source, source),
            embed(self.target, target),
            tgt_mask=causal,
            src_key_padding_mask=padding.float().masked_fill(padding, -math.inf),
            memory_key_padding_mask=padding.float().masked_fill(padding, -math.inf),
        )
        return self.generator(decoded)


def sinusoids() -> torch.Tensor:
    angles = torch.arange(LONGEST)[:, None] / 10000 ** (torch.arange(0, D_MODEL, 2) / D_MODEL)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def translator(**options) -> Translator:
    torch.manual_seed(0)
    module = Translator(**options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module.eval()


def tokenizer(size=TARGET_SIZE):
    tokens = [*SPECIAL_TOKENS.values(), *(f"w{number}" for number in range(len(SPECIAL_TOKENS), size))]
    return pack_tokenizer(word_tokenizer(tokens, "<unk>"), SPECIAL_TOKENS, append_eos=True)


@torch.no_grad()
def greedy(module, source, mask, new_tokens=LONGEST - 1) -> list[list[int]]:
    """Greedy search row by row, from the start token to eos."""
    rows = []
    for ids, kept in zip(source, mask, strict=True):
        row, length = [1], int(kept.sum())
        while len(row) <= new_tokens and row[-1] != 2:
            logits = module(ids[None, :length], torch.ones(1, length), torch.tensor([row]))
            row.append(int(logits[0, -1].argmax()))
        rows.append(row)
    return rows


SETTINGS = {
    "post-norm, as torch has it": ({}, SEPARATE, {}),
    "pre-norm": ({"norm_first": True}, SEPARATE, {"normalize_before": True}),
    "post-norm, as in the paper": ({"final_norm": False}, SEPARATE, {}),
    "no biases": ({"bias": False}, SEPARATE, {}),
    "one table": ({"shared": True}, {}, {}),
    "a table of positions": ({"positions": True}, SEPARATE, {"positions": "positions"}),
    "gelu, another epsilon": (
        {"activation": "gelu", "layer_norm_eps": 1e-2, "final_norm": False},
        SEPARATE,
        {"activation_function": "gelu", "layer_norm_eps": 1e-2},
    ),
    "unscaled": ({"scaled": False}, SEPARATE, {"scale_embedding": False}),
}


@pytest.mark.parametrize(("options", "tables", "fields"), SETTINGS.values(), ids=SETTINGS)
def test_logits_and_greedy_output_stay(options, tables, fields, padded):
    module = translator(**options)
    state = module.state_dict()
    if not tables:
        del state["target.weight"], state["generator.weight"]
    model = from_torch_transformer(state, tokenizer(), heads=HEADS, **NAMES, **tables, **fields)

    source, mask = padded(LENGTHS)
    target = padded((5, 5, 5, 5), vocab_size=TARGET_SIZE)[0]
    with torch.no_grad():
        expected = module(source, mask, target)
        found = model(source, mask, decoder_input_ids=target).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    outputs = model.generate(source, attention_mask=mask, num_beams=1, max_new_tokens=LONGEST - 1)
    assert [row[: len(true)] for row, true in zip(outputs.tolist(), greedy(module, source, mask), strict=True)] == (
        greedy(module, source, mask)
    )


def lacking(name):
    return lambda state: state.pop(name)


def reshaped(name):
    return lambda state: state.update({name: state[name][:-1]})


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lacking("transformer.decoder.layers.1.multihead_attn.in_proj_bias"),
            {},
            "lacks the tensor transformer.decoder",
        ),
        (
            lacking("transformer.encoder.layers.2.linear2.weight"),
            {},
            "lacks the tensor transformer.encoder.layers.2.lin",
        ),
        (
            lambda state: state.update({"more": torch.zeros(2)}),
            {},
            "holds more, which its configuration does not use",
        ),
        (reshaped(f"{ENCODER}.0.linear2.weight"), {}, "linear2.weight has shape [15, 24]"),
        (reshaped("generator.weight"), {}, "the output projection have shape [52, 16]"),
        (lambda state: state.update({"source.weight": "x"}), {}, "has str where a tensor should be, at source.weight"),
        (lambda state: None, {"prefix": "net."}, "is prefix='net.' right?"),
        (lambda state: None, {"source_embedding": "src.weight"}, "lacks the tensor src.weight"),
        (
            lambda state: None,
            {"source_embedding": "generator.bias"},
            "generator.bias has shape [53], so it is",
        ),
        (
            lambda state: [state.pop(f"transformer.encoder.norm.{kind}") for kind in ("weight", "bias")],
            {"normalize_before": True},
            "a pre-norm encoder ends in a norm",
        ),
        (lambda state: None, {"tokenizer": tokenizer(60)}, "the tokenizer has 60 tokens"),
        (lambda state: state.clear(), {}, "must be a dictionary of tensors"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, options, message):
    state = translator().state_dict()
    change(state)
    arguments = {"tokenizer": tokenizer(), "heads": HEADS, **NAMES, **SEPARATE, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        from_torch_transformer(state, **arguments)

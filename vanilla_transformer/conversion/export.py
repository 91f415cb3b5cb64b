"""Exports a model with `torch.export` (https://docs.pytorch.org/docs/stable/export.html), as two programs.

    to_torch_export(model, "folder")
    encoder, decoder = (torch.export.load(f"folder/{name}.pt2").module() for name in ("encoder", "decoder"))

The programs run without this package. The encoder reads the source once, and also computes the keys and values for each
decoder layer's cross-attention. The decoder reads the next target tokens. It takes keys and values of earlier tokens,
and returns those of all tokens. conversion/onnx.py converts these two programs to ONNX. Sizes:

    B sentences    S source tokens    T target tokens, at least one    P target tokens read before, at first none
    N decoder layers    H decoder heads    d_k, d_v widths of a head's keys and values    V vocabulary

All sizes but N, H, d_k, d_v and V may differ from call to call.
"""

import copy
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..modeling_vanilla_transformer import MultiHeadAttention, VanillaTransformerForConditionalGeneration


TEXT, TARGET = {0: "batch", 1: "source"}, {0: "batch", 1: "target"}
CROSS, PAST = {1: "batch", 3: "source"}, {1: "batch", 3: "past"}


class EncoderProgram(nn.Module):
    """The encoder, and the keys and values of each decoder layer's cross-attention."""

    # the axes of each input whose sizes may differ from call to call
    INPUTS = {"input_ids": TEXT, "attention_mask": TEXT}
    OUTPUTS = ("encoder_hidden_states", "cross_keys", "cross_values")

    def __init__(self, model: VanillaTransformerForConditionalGeneration):
        super().__init__()
        self.encoder = model.model.encoder
        self.attentions = nn.ModuleList([layer.get_submodule("encoder_attn") for layer in model.model.decoder.layers])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Ids `[B, S]` and 1 for tokens `[B, S]` -> states `[B, S, d_model]`, keys and values `[N, B, H, S, d]`."""
        states = self.encoder(input_ids, attention_mask).last_hidden_state
        keys, values = [], []
        for attention in self.attentions:
            assert isinstance(attention, MultiHeadAttention)
            key, value = attention._keys_and_values(states, states, None)
            keys.append(key)
            values.append(value)
        return states, torch.stack(keys), torch.stack(values)


class DecoderProgram(nn.Module):
    """The decoder and the output projection, for the tokens after those whose keys and values are given."""

    INPUTS = {
        "decoder_input_ids": TARGET,
        "attention_mask": TEXT,
        **dict.fromkeys(("cross_keys", "cross_values"), CROSS),
        **dict.fromkeys(("past_keys", "past_values"), PAST),
    }
    OUTPUTS = ("logits", "keys", "values")

    def __init__(self, model: VanillaTransformerForConditionalGeneration):
        super().__init__()
        self.decoder = model.model.decoder
        self.lm_head = model.lm_head

    def forward(
        self,
        decoder_input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        cross_keys: torch.Tensor,
        cross_values: torch.Tensor,
        past_keys: torch.Tensor,
        past_values: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            decoder_input_ids: `[B, T]`, at first beginning with `decoder_start_token_id`.
            attention_mask: the source's, `[B, S]`.
            cross_keys, cross_values: from the encoder, `[N, B, H, S, d]`.
            past_keys, past_values: from the previous call, `[N, B, H, P, d]`; at first P is 0.

        Returns:
            Logits `[B, T, V]`, and keys and values of all target tokens so far, `[N, B, H, P + T, d]`.
        """
        target = _cache_of(past_keys, past_values)
        output = self.decoder(
            decoder_input_ids,
            # Keys and values are cached, so only the length of the encoder's states matters.
            encoder_hidden_states=cross_keys[0].transpose(1, 2).flatten(2),  # [B, S, H * d_k]
            encoder_attention_mask=attention_mask,
            past_key_values=EncoderDecoderCache(target, _cache_of(cross_keys, cross_values)),
        )
        keys = torch.stack([layer.keys for layer in target.layers])
        values = torch.stack([layer.values for layer in target.layers])
        return self.lm_head(output.last_hidden_state), keys, values


def _cache_of(keys: torch.Tensor, values: torch.Tensor) -> DynamicCache:
    """A cache that holds these keys and values of each layer, `[N, B, H, L, d]`."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key, value, layer)
    return cache


def export_programs(model: VanillaTransformerForConditionalGeneration) -> tuple[ExportedProgram, ExportedProgram]:
    """
    Exports encoder and decoder, in float32, on the CPU.

    Args:
        model: on any device, in any dtype. It is not changed.
    """
    model = copy.deepcopy(model).float().cpu().eval()
    model.set_attn_implementation("eager")
    encoder, decoder = EncoderProgram(model), DecoderProgram(model)
    # All sizes of the example differ: torch.export would treat a size of 0 or 1, or two equal sizes, as fixed.
    ids, target = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        _, keys, values = encoder(ids, mask)
        past_keys, past_values = (states[:, :, :, :4].clone() for states in (keys, values))
        return _export(encoder, ids, mask), _export(decoder, target, mask, keys, values, past_keys, past_values)


def _export(program: EncoderProgram | DecoderProgram, *example: torch.Tensor) -> ExportedProgram:
    sizes = {name: Dim(name) for name in ("batch", "source", "target", "past")}
    shapes = {name: {axis: sizes[size] for axis, size in axes.items()} for name, axes in program.INPUTS.items()}
    return torch.export.export(program, example, dynamic_shapes=shapes)


def to_torch_export(model: VanillaTransformerForConditionalGeneration, folder: str | Path) -> None:
    """
    Writes `encoder.pt2` and `decoder.pt2`, for `torch.export.load`, into a folder.

    Args:
        model: on any device, in any dtype. It is not changed.
        folder: the output folder, which is created if necessary. Files of these names are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in zip(("encoder", "decoder"), export_programs(model), strict=True):
        torch.export.save(program, folder / f"{name}.pt2")

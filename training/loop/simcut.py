"""
SimCut (Gao et al., 2022, "Bi-SimCut: A Simple Strategy for Boosting Neural Machine Translation",
https://arxiv.org/abs/2206.02368).

Every batch passes through the network twice. In the second pass each token of source and target is cut out with
probability p: its embedding is 0, its position stays. The loss makes the network predict the same:

    loss = CE + alpha * KL(P || P_cut)        per target token

CE is that of the first pass, with label smoothing. Both passes have dropout, and gradients flow through both. As in the
authors' code, the source's last token (its end) and the target's start are never cut. The paper has alpha = 3 and
p = 0.05.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from vanilla_transformer.modeling_vanilla_transformer import Decoder, Encoder
from vanilla_transformer.network_loss import IGNORE_INDEX, decoder_inputs

from .two_passes import compare_passes


class Kept(NamedTuple):
    """Which tokens of a doubled batch keep their embeddings: of the source `[2 B, S]`, and of the target `[2 B, T]`."""

    source: torch.Tensor
    target: torch.Tensor


def cut_batch(inputs: dict[str, Any], config: PreTrainedConfig, p: float) -> tuple[dict[str, Any], Kept]:
    """
    Both passes as one batch, the whole rows before the cut ones.

    Args:
        inputs: `input_ids` and `attention_mask`, `[B, S]`, and `labels`, `[B, T]`.
        config: the model's, for its special tokens.
        p: probability that a token is cut out.

    Returns:
        The model's inputs, in which the cut rows have no labels: their cross-entropy does not count. And which tokens
        are kept.
    """
    sources, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    ids, target_mask = decoder_inputs(labels, config.pad_token_id, config.decoder_start_token_id)
    tokens = torch.ones_like(ids) if target_mask is None else target_mask
    end = mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True)  # from the last token on
    start = tokens.cumsum(dim=1) <= 1  # up to the first token
    kept = [(torch.rand(fixed.shape, device=fixed.device) >= p) | fixed for fixed in (end, start)]
    twice = {
        "input_ids": torch.cat([sources, sources]),
        "attention_mask": torch.cat([mask, mask]),
        "decoder_input_ids": torch.cat([ids, ids]),
        "decoder_attention_mask": torch.cat([tokens, tokens]),
        "labels": torch.cat([labels, torch.full_like(labels, IGNORE_INDEX)]),
        "return_logits": True,
    }
    return twice, Kept(*(torch.cat([torch.ones_like(side), side]) for side in kept))


@contextmanager
def cutting(model: nn.Module, kept: Kept) -> Iterator[None]:
    """
    While it is open, encoder and decoder read embeddings of 0 in place of the tokens that are not kept.

    Hooks do it, because embeddings that were computed outside of the model's forward pass would not go through FSDP.
    They are removed again, because `generate()` obeys hooks by decoding slowly.
    """

    def cut(stack: Encoder | Decoder, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = dict(zip(("input_ids", "attention_mask", "inputs_embeds"), args, strict=False)) | kwargs
        embedded = stack.embed_tokens(given.pop("input_ids"))
        kept_here = kept.source if isinstance(stack, Encoder) else kept.target
        return (), given | {"inputs_embeds": embedded * kept_here[..., None]}

    stacks = [module for module in model.modules() if isinstance(module, Encoder | Decoder)]
    hooks = [stack.register_forward_pre_hook(cut, with_kwargs=True) for stack in stacks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def divergence(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    KL(P || P_cut) in nats, summed over target tokens. It supports first derivatives only.

    Args:
        logits: of the whole rows, then of the cut ones, `[2 B, T, V]`.
        labels: `[B, T]`; positions with -100 do not count.

    Returns:
        A scalar in float32 or wider.
    """
    return compare_passes(logits, labels, _one_sided)


def _one_sided(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With d = log p - log q, the gradient of p's logits is p (d - KL(P || Q)), that of q's is q - p."""
    p, d = log_p.exp(), log_p - log_q
    divergences = (p * d).sum(dim=-1, keepdim=True)
    return divergences.sum(), p * (d - divergences), log_q.exp() - p

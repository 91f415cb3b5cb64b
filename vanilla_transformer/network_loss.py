"""The training loss: cross-entropy with label smoothing (Vaswani et al., 2017, section 5.4).

This file also makes the decoder's input from the labels, and has the model's output class for training.
"""

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import Seq2SeqLMOutput

from .network_operations import linear, weight_gradient


IGNORE_INDEX = -100

# Rows of logits computed at a time in training. A few hundred give full speed and need little memory.
CHUNK = 256


def decoder_inputs(
    labels: torch.Tensor, pad_token_id: int, decoder_start_token_id: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Shifts the labels right to make the decoder's input, `[start, y_1, ..., y_{T-1}]` (Figure 1). In a row padded on the
    left, the start token stands at the first label's position.

    Args:
        labels: ids of the true tokens, -100 before the first and after the last one, `[B, T]`.
        pad_token_id: replaces -100.
        decoder_start_token_id: comes before the first token of each row.

    Returns:
        The ids, `[B, T]`, and their mask, 1 from the start token on, `[B, T]`. The mask is None if no row is padded on
        the left.

    Raises:
        ValueError: a row has -100 between two tokens, so the decoder's input there is unknown.
    """
    token = labels != IGNORE_INDEX
    first = token & (token.cumsum(dim=1) == 1)
    ids = labels.roll(1, dims=1)
    ids[:, 0] = pad_token_id
    ids = ids.masked_fill(ids == IGNORE_INDEX, pad_token_id).masked_fill(first, decoder_start_token_id)
    after_padding = token[:, 1:] & ~token[:, :-1]
    # A compiled graph cannot inspect values, so it always gets the mask.
    if not torch.compiler.is_compiling():
        if not after_padding.any():
            return ids, None
        several = after_padding.sum(dim=1) + token[:, 0] > 1
        if several.any():
            raise ValueError(
                f"labels: row {several.long().argmax()} has {IGNORE_INDEX} between two tokens, where the decoder needs "
                "a true token as its input: pad at the ends only, or call the model with decoder_input_ids"
            )
    return ids, (token.cumsum(dim=1) > 0).long()


def label_smoothed_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Cross-entropy in nats per target token, against a target that has `1 - label_smoothing` on the true token and
    `label_smoothing` spread evenly over the vocabulary (the definition of `torch.nn.functional.cross_entropy`).

    The sum over tokens is divided by `num_items_in_batch`, which the Trainer counts over every micro-batch and
    process of one update. So the loss and its gradient are the same however an update's tokens are split.

    Args:
        logits: scores before the softmax, `[B, T, V]`.
        labels: ids of the true tokens, `[B, T]`; positions with -100 do not count.
        label_smoothing: mass spread over the vocabulary, in [0, 1).
        num_items_in_batch: number of target tokens in the whole update. Default: those in `labels`.

    Returns:
        A scalar, float32 or wider. 0 where no position counts.
    """
    # Reduce in float32: half precision loses the small probabilities that smoothing sums.
    logits = logits.flatten(0, 1).to(_reduction_dtype(logits))  # [B*T, V]
    labels = labels.flatten().to(logits.device)  # [B*T]
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction="sum")
    return _per_token(total, labels, num_items_in_batch)


# Not compiled: a graph with the chunks unrolled would be recompiled for every number of tokens.
@torch.compiler.disable
def projected_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    `label_smoothed_cross_entropy` of the logits `hidden_states x weight^T + bias`, without storing all logits at once.

    Value and gradient equal those of projection followed by loss, also under autocast. There are no second derivatives.

    Args:
        hidden_states: the decoder's last states, `[B, T, d_model]`.
        weight: the output matrix, `[V, d_model]`.
        bias: `[V]`.
        labels, label_smoothing, num_items_in_batch: as above.

    Returns:
        As above.
    """
    labels = labels.flatten().to(hidden_states.device)  # [B*T]
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    total = _ProjectedCrossEntropy.apply(hidden_states.flatten(0, 1), weight, bias, labels, label_smoothing, dtype)
    return _per_token(total, labels, num_items_in_batch)


def _reduction_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _per_token(total: torch.Tensor, labels: torch.Tensor, count: torch.Tensor | int | None) -> torch.Tensor:
    if count is None:
        count = (labels != IGNORE_INDEX).sum().clamp(min=1)
    elif isinstance(count, torch.Tensor):
        count = count.to(total.device)
    return total / count


class _ProjectedCrossEntropy(torch.autograd.Function):
    """
    The summed loss of `[N, d_model]` states. The forward pass also computes the gradient, chunk by chunk, while it has
    the probabilities: the gradient of a row's loss with respect to its logits is p - target, with p = softmax(logits).
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels, smoothing, dtype):
        """Multiplies matrices in `dtype`, as autocast would, and does the rest in float32 or wider."""
        wide = _reduction_dtype(hidden_states)
        kept = labels != IGNORE_INDEX  # [N]
        # Padding has no loss, so a CPU skips it. On an accelerator, finding it would wait for the device.
        on_cpu = hidden_states.device.type == "cpu"
        counted = kept.nonzero()[:, 0] if on_cpu else torch.arange(len(labels), device=labels.device)
        true, kept = labels.clamp(min=0), kept.to(wide)[:, None]
        total = hidden_states.new_zeros((), dtype=wide)
        grad_hidden = torch.zeros_like(hidden_states, dtype=wide)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        grad_bias = torch.zeros_like(bias, dtype=wide)
        with torch.autocast(hidden_states.device.type, enabled=False):
            # 1. unnormalised p (p times its row's sum), and its share of the loss and the gradients
            matrix, offset = weight.to(dtype), bias.to(dtype)
            mean_logit = hidden_states.to(wide) @ weight.to(wide).mean(dim=0) + bias.to(wide).mean()  # [N]
            for rows in counted.split(CHUNK):
                states = hidden_states[rows].to(dtype)
                logits = linear(states, matrix, offset).to(wide)  # [n, V]
                target_logits = (1 - smoothing) * logits.gather(1, true[rows, None])
                target_logits += smoothing * mean_logit[rows, None]
                highest = logits.amax(dim=1, keepdim=True)
                p = logits.sub_(highest).exp_()
                sums = p.sum(dim=1, keepdim=True)
                total += ((highest + sums.log() - target_logits) * kept[rows]).sum()
                scale = kept[rows] / sums  # normalises p; cheaper to apply to d_model than to V columns
                grad_bias.addmv_(p.T, scale[:, 0])
                p = p.to(dtype)
                grad_hidden[rows] = linear(p, matrix.T).to(wide) * scale
                weight_gradient(p, (states * scale).to(dtype), total=grad_weight)
            # 2. minus the target: 1 - smoothing on the true token, plus an even share for every token
            even = smoothing / len(bias)
            states = hidden_states.to(wide) * kept
            grad_hidden -= kept * ((1 - smoothing) * weight.to(wide)[true] + even * weight.to(wide).sum(dim=0))
            grad_weight.index_add_(0, true, states, alpha=smoothing - 1).sub_(even * states.sum(dim=0))
            grad_bias.index_add_(0, true, kept[:, 0], alpha=smoothing - 1).sub_(even * kept.sum())
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden_states.dtype, weight.dtype, bias.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):
        """Scales the stored gradients in place: a copy of the matrix's gradient would raise the peak memory."""
        scaled = (grad.mul_(grad_total).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *scaled, None, None, None


class OutputWithoutLogits(Seq2SeqLMOutput):
    """The output in training. An index gives only the loss: at 1, users expect logits, which are not computed."""

    def __getitem__(self, key):
        if isinstance(key, str):
            return super().__getitem__(key)
        return self.loss if key == 0 else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        """
        Raises:
            ValueError: always.
        """
        raise ValueError(
            "training with labels returns the loss without logits: set return_logits=True, or get outputs by name"
        )

"""Checks that transformers does not make when it loads a model: shards outside the folder, NaN or inf in the weights,
the tokenizer of another model. Also finds text that a tokenizer cannot read.

transformers itself reads weights from safetensors, and pickles only as plain tensors (`weights_only`), so that no code
from the folder runs. It also refuses weights whose shapes do not match the config.
"""

import json
import os
import reprlib
from pathlib import Path
from typing import Any

from torch.nn import Parameter
from transformers import PreTrainedTokenizerBase


# A table may end in fewer unused rows than this, if they pad it to a multiple of 8, which is faster on GPUs
# (`resize_token_embeddings(pad_to_multiple_of=...)`).
MOST_UNUSED_ROWS = 128


def refuse_strange_shards(folder: Path) -> None:
    """
    Checks the files that a shard index names: transformers would follow it out of the folder, and from safetensors to
    pickles.

    Raises:
        ValueError: an index is malformed, or names a file in another folder or of another format.
    """
    for index in folder.glob("*.index*.json"):
        suffix = ".safetensors" if ".safetensors." in index.name else ".bin"
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            strange = sorted(name for name in shards if os.path.basename(name) != name or not name.endswith(suffix))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a valid shard index: {error!r}") from error
        if strange:
            raise ValueError(f"{index} names {strange[0]!r}: shards must be {suffix} files in the same folder")


class GuardedLoading:
    """`from_pretrained` for a `PreTrainedModel`, with that check."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Checks which files would be opened, then calls transformers' own."""
        if pretrained_model_name_or_path is not None:
            refuse_strange_shards(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]


def refuse_nonfinite_weights(model: Any) -> None:
    """
    Checks for the weights of a diverged training run.

    Raises:
        ValueError: the weights contain NaN or infinity.
    """
    for name, weight in model.named_parameters():
        # Quantised weights are of other classes, which have no isfinite().
        if type(weight) is Parameter and not (finite := weight.isfinite()).all():
            wrong = weight[~finite][0].item()
            raise ValueError(f"{name} contains {wrong}: use a checkpoint from before training diverged")


def refuse_other_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """
    Checks that a tokenizer fits a model.

    Raises:
        ValueError: the number of tokens does not match the number of embeddings, or a special token has different ids.
    """
    advice = "use the tokenizer that the model was trained with"
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, config.vocab_size
    if tokens > rows or rows - tokens >= MOST_UNUSED_ROWS or (rows > tokens and rows % 8):
        raise ValueError(f"the tokenizer has {tokens} tokens, but the model has vocab_size={rows}: {advice}")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        theirs, ours = getattr(tokenizer, name), getattr(config, name)
        if None not in (theirs, ours) and theirs not in (ours if isinstance(ours, list) else [ours]):
            raise ValueError(f"the tokenizer has {name}={theirs}, but the model has {name}={ours}: {advice}")


def text_fault(text: Any) -> str | None:
    """Why a tokenizer cannot read a text, as a phrase to follow the text's name; None if it can."""
    if not isinstance(text, str):
        return f"is {reprlib.repr(text)}, and must be text"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])
        return f"has half of a surrogate pair, {found}, at character {error.start + 1}, and must be Unicode text"
    return None

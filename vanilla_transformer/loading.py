"""What is refused where a model is loaded, because transformers would take it: shards from outside the folder, weights
that are no numbers, and the tokenizer of another model. And texts that no tokenizer can read.

transformers itself reads weights from safetensors, and a pickle only as plain tensors (`weights_only`), so that no code
of a folder runs; it refuses shapes that differ from those of the config.
"""

import json
import os
import reprlib
from pathlib import Path
from typing import Any

from torch.nn import Parameter
from transformers import PreTrainedTokenizerBase


# A table may have unused rows at its end: fewer than this, which make their number a multiple of 8 at least, as GPUs
# like it (`resize_token_embeddings(pad_to_multiple_of=...)`).
MOST_UNUSED_ROWS = 128


def refuse_strange_shards(folder: Path) -> None:
    """
    Looks at what an index of shards would have opened: transformers follows it out of the folder, and from safetensors
    to pickles.

    Raises:
        ValueError: an index in the folder is none, or names a file that does not lie beside it or is of another format.
    """
    for index in folder.glob("*.index*.json"):
        suffix = ".safetensors" if ".safetensors." in index.name else ".bin"
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            strange = sorted(name for name in shards if os.path.basename(name) != name or not name.endswith(suffix))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of shards: {error!r}") from error
        if strange:
            raise ValueError(f"{index} names {strange[0]!r}: its shards are {suffix} files that lie in its own folder")


class GuardedLoading:
    """`from_pretrained` for a `PreTrainedModel`, with that look."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, after a look at which files it would open."""
        if pretrained_model_name_or_path is not None:
            refuse_strange_shards(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]


def refuse_nonfinite_weights(model: Any) -> None:
    """
    Looks for what training that has diverged leaves behind.

    Raises:
        ValueError: the weights contain NaN or infinity.
    """
    for name, weight in model.named_parameters():
        # Quantised weights are of other classes, which have no isfinite().
        if type(weight) is Parameter and not (finite := weight.isfinite()).all():
            wrong = weight[~finite][0].item()
            raise ValueError(f"{name} holds {wrong}: take a checkpoint from before training diverged")


def refuse_other_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """
    Compares a tokenizer with the model that is to read its ids.

    Raises:
        ValueError: the model has not as many embeddings as the tokenizer has tokens, or the two mean different tokens
            by a special one.
    """
    advice = "take the tokenizer that the model was trained with"
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, config.vocab_size
    if tokens > rows or rows - tokens >= MOST_UNUSED_ROWS or (rows > tokens and rows % 8):
        raise ValueError(f"the tokenizer has {tokens} tokens, and the model vocab_size={rows}: {advice}")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        theirs, ours = getattr(tokenizer, name), getattr(config, name)
        if None not in (theirs, ours) and theirs not in (ours if isinstance(ours, list) else [ours]):
            raise ValueError(f"the tokenizer has {name}={theirs}, and the model {name}={ours}: {advice}")


def text_fault(text: Any) -> str | None:
    """What keeps a tokenizer from reading a text, in words that go on from its name; None if nothing does."""
    if not isinstance(text, str):
        return f"is {reprlib.repr(text)}, and must be text"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])
        return f"holds {found}, half of a surrogate pair, as its character {error.start + 1}, and must be Unicode text"
    return None

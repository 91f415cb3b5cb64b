"""What is made of a model's weights once and kept beside it, until the model changes."""

import os
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from .engine_eligibility import Inspected
from .loading import refuse_nonfinite_weights


class _Copy:
    """What was made of a model, and what tells whether that has changed since."""

    def __init__(self, made: Any, found: Inspected):
        self.made = made
        self.kinds = found.kinds
        self.versions = self._versions(found)
        # Views: they change with the weights.
        self.last = [parameter.detach()[(-1,) * parameter.dim()] for parameter in found.parameters]
        self.last_values = torch.stack(self.last)

    def is_of(self, found: Inspected) -> bool:
        """By torch's count of changes, and for what avoids it by the last value of each weight."""
        if self.kinds != found.kinds or self.versions != self._versions(found):
            return False
        return torch.equal(torch.stack(self.last), self.last_values)

    @staticmethod
    def _versions(found: Inspected) -> list[tuple[int, int]]:
        try:
            return [(parameter.data_ptr(), parameter._version) for parameter in found.parameters]
        except RuntimeError:  # made in inference mode, where torch counts no changes
            return [(parameter.data_ptr(), 0) for parameter in found.parameters]


_COPIES: WeakKeyDictionary[PreTrainedModel, dict[Any, _Copy]] = WeakKeyDictionary()
# One thread packs, and the others wait for what it makes.
_packing = threading.Lock()


def _renew_lock() -> None:
    global _packing
    _packing = threading.Lock()


# A thread that packs is not in the child of a fork, and would never release the lock there.
if os.name == "posix":
    os.register_at_fork(after_in_child=_renew_lock)


def copy_of(model: PreTrainedModel, found: Inspected, make: Callable, *arguments: Any) -> Any:
    """
    `make(model, *arguments)`, made at the first use and again after the model has changed. Threads may call it.

    Args:
        found: of `inspect_model`.
        make: a class of packed weights, such as `PackedTransformer`.

    Raises:
        ValueError: the weights contain NaN or infinity.
    """
    copies, kind = _COPIES.setdefault(model, {}), (make, *arguments)
    # Read once: another thread may take it out.
    copy = copies.get(kind)
    if copy is None or not copy.is_of(found):
        with _packing:
            copy = copies.get(kind)
            if copy is None or not copy.is_of(found):
                copies.pop(kind, None)
                refuse_nonfinite_weights(model)
                copies[kind] = copy = _Copy(make(model, *arguments), found)
    return copy.made

"""Copies of a model's weights, packed once and kept until the model changes."""

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
    """A packed copy, and what is needed to detect that the model has changed."""

    def __init__(self, made: Any, found: Inspected):
        self.made = made
        self.kinds = found.kinds
        self.versions = self._versions(found)
        # Views of the last value of each weight, so they change with the weights.
        self.last = [parameter.detach()[(-1,) * parameter.dim()] for parameter in found.parameters]
        self.last_values = torch.stack(self.last)

    def is_of(self, found: Inspected) -> bool:
        """Whether the copy is current: by torch's version counters, and by last values for changes they miss."""
        if self.kinds != found.kinds or self.versions != self._versions(found):
            return False
        return torch.equal(torch.stack(self.last), self.last_values)

    @staticmethod
    def _versions(found: Inspected) -> list[tuple[int, int]]:
        try:
            return [(parameter.data_ptr(), parameter._version) for parameter in found.parameters]
        except RuntimeError:  # created in inference mode, without version counters
            return [(parameter.data_ptr(), 0) for parameter in found.parameters]


_COPIES: WeakKeyDictionary[PreTrainedModel, dict[Any, _Copy]] = WeakKeyDictionary()
# One thread packs while the others wait for the result.
_packing = threading.Lock()


def _renew_lock() -> None:
    global _packing
    _packing = threading.Lock()


# A fork copies a held lock but not the thread that holds it, so the child would wait forever.
if os.name == "posix":
    os.register_at_fork(after_in_child=_renew_lock)


def copy_of(model: PreTrainedModel, found: Inspected, make: Callable, *arguments: Any) -> Any:
    """
    Returns `make(model, *arguments)`, which is called at the first use and after the model has changed. Thread-safe.

    Args:
        found: the result of `inspect_model`.
        make: a class of packed weights, such as `PackedTransformer`.

    Raises:
        ValueError: the weights contain NaN or infinity.
    """
    copies, kind = _COPIES.setdefault(model, {}), (make, *arguments)
    # Read once: another thread may remove it.
    copy = copies.get(kind)
    if copy is None or not copy.is_of(found):
        with _packing:
            copy = copies.get(kind)
            if copy is None or not copy.is_of(found):
                copies.pop(kind, None)
                refuse_nonfinite_weights(model)
                copies[kind] = copy = _Copy(make(model, *arguments), found)
    return copy.made

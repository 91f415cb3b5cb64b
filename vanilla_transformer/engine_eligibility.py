"""Checks whether our engines can decode a model: they know all its modules, and nobody has changed one.

transformers' loops decode models that were wrapped, hooked or subclassed (PEFT, quantisation, parallelism).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .network_operations import Dropout, Linear


# The classes that may hold weights. A wrapped layer (LoRA, quantisation, parallelism) has another class.
_PLAIN = (nn.Linear, Linear, nn.Embedding, nn.LayerNorm)
_PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The methods that decide what a module computes, and the model's methods that transformers' loops call.
_COMPUTING = ("__call__", "forward", "residual", "feed_forward", "embed", "_split_heads", "_keys_and_values")
_LOOPING = (*(name for name, method in vars(GenerationMixin).items() if callable(method)), "_reorder_cache")
# Modules of wrappers around `forward` that do not change the result: accelerate's, which cast a model's inputs and
# outputs in training, and gradient checkpointing.
_WRAPPERS = ("accelerate.utils.operations", "torch.amp.autocast_mode", "transformers.modeling_layers")
# transformers leaves these hooks in a model that has once returned its attention weights. They do nothing here.
_CAPTURING = "transformers.utils.output_capturing"

# For each class that the engines know, its methods at the time of `know`.
_KNOWN: dict[type, dict[str, Any]] = {}


class Inspected(NamedTuple):
    """The result of `inspect_model`."""

    parameters: list[torch.Tensor]  # a tied one as often as it is used
    kinds: list[type]  # the classes of all modules
    unknown: str | None = None  # what the engines do not know about the model


def know(*classes: type) -> None:
    """Declares that the engines compute what these classes and their subclasses do, with their present methods."""
    for each in classes:
        names = [name for name in _COMPUTING if hasattr(each, name)]
        if issubclass(each, GenerationMixin):
            names += [name for name in _LOOPING if name != "generate"]
        _KNOWN[each] = {name: getattr(each, name, None) for name in names}


# These compute the same in training mode, which is the mode of new modules.
_WITHOUT_MODE = {*_PLAIN, nn.Identity, nn.ModuleList}
_WITHOUT_MODE |= {each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()}
know(*_WITHOUT_MODE, nn.Dropout, Dropout)


def _known_methods(kind: type) -> dict[str, Any] | None:
    return next((_KNOWN[base] for base in kind.__mro__ if base in _KNOWN), None)


def _unwrapped(method: Any) -> Any:
    """The function inside all wrappers of a method."""
    while True:
        method = getattr(method, "__func__", method)
        home = getattr(method, "__globals__", {}).get("__name__") or type(method).__module__
        if home not in _WRAPPERS:
            return method
        method = method.__wrapped__


def _why_unknown_class(kind: type) -> str | None:
    """Which class or method is unknown; None if all are known."""
    known = _known_methods(kind)
    if known is None:
        return f"the class {kind.__module__}.{kind.__qualname__}"
    for name, method in known.items():
        found = getattr(kind, name, None)
        if found is not method and _unwrapped(found) is not _unwrapped(method):
            return f"{kind.__name__}.{name}, which is not this package's own"
    return None


def _why_unknown_module(module: nn.Module) -> str | None:
    """How a module of a known class differs from others of its class; None if it does not."""
    if module.training and type(module) not in _WITHOUT_MODE:
        return "training mode"
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks):
        return "a hook"
    for name, method in (_known_methods(type(module)) or {}).items():
        if name in module.__dict__ and _unwrapped(module.__dict__[name]) is not _unwrapped(method):
            return f"a {name} of its own"
    return None


def is_unchanged(module: nn.Module) -> bool:
    """Whether a module computes what its class does: it has no hooks, and no `forward` of its own."""
    return not _hooks_on_all_modules() and _why_unknown_module(module) is None


def _hooks_on_all_modules() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def inspect_model(model: PreTrainedModel) -> Inspected:
    """
    Checks whether the engines can decode the model: all its modules are known (see `know`) and have no hooks, and all
    weights are plain parameters on one device, in one supported dtype.
    """
    positions = (model.model.encoder.embed_positions, model.model.decoder.embed_positions)
    parameters: list[Any] = []
    kinds: list[type] = []
    methods: dict[type, dict[str, Any]] = {}
    # This runs at each call of `generate()`, and torch's `modules()` would take three times as long.
    modules: list[nn.Module] = [model]
    for module in modules:
        if module is None:
            continue
        kind, state, why = type(module), module.__dict__, None
        if kind not in methods:
            methods[kind], why = _known_methods(kind) or {}, _why_unknown_class(kind)
        kinds.append(kind)
        # Most modules are leaves, for which only `forward` matters.
        changed = "forward" in state or (state["_modules"] and not state.keys().isdisjoint(methods[kind]))
        if changed or state["training"] or state["_forward_hooks"] or state["_forward_pre_hooks"]:
            why = why or _why_unknown_module(module)
        if own := state["_parameters"]:
            parameters += own.values()
            if kind not in _PLAIN and module not in positions:
                why = why or f"the class {kind.__module__}.{kind.__qualname__}"
        if why:
            name = next(name for name, each in model.named_modules() if each is module)
            return Inspected(parameters, kinds, f"{why} ({name or 'the model'})")
        modules.extend(state["_modules"].values())
    return Inspected(parameters, kinds, _why_unknown_weights(parameters) or _why_unknown_setting(model))


def _why_unknown_weights(parameters: list[torch.Tensor]) -> str | None:
    kinds = set(map(type, parameters))
    if type(None) in kinds:
        return "a layer without bias"
    if kinds != {nn.Parameter}:
        return "weights that are not plain parameters"
    dtypes, devices = {each.dtype for each in parameters}, {each.device for each in parameters}
    if len(devices) > 1:
        return "weights on several devices"
    if len(dtypes) > 1:
        return "weights of several dtypes"
    return None if dtypes <= set(_PACKED_DTYPES) else f"weights in {dtypes.pop()}"


def _why_unknown_setting(model: PreTrainedModel) -> str | None:
    if _hooks_on_all_modules():
        return "a hook on all modules"
    name = model.config._attn_implementation
    attention: Any = ALL_ATTENTION_FUNCTIONS.get(name)  # None for "eager"
    attention = attention.func if isinstance(attention, partial) else attention
    if attention is not None and not attention.__module__.startswith("transformers."):
        return f"the attention implementation {name!r}"
    return None

"""Whether the engines compute what a model does: all its modules are known to them, and nobody has changed one.

A model that has been wrapped, hooked or subclassed (PEFT, quantisation, parallelism) is left to transformers' loops.
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


# What holds weights. A layer that something has wrapped (LoRA, quantisation, parallelism) is of another class.
_PLAIN = (nn.Linear, Linear, nn.Embedding, nn.LayerNorm)
_PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The methods that decide what a module computes, and those that transformers' loops call of a model.
_COMPUTING = ("__call__", "forward", "residual", "feed_forward", "embed", "_split_heads", "_keys_and_values")
_LOOPING = (*(name for name, method in vars(GenerationMixin).items() if callable(method)), "_reorder_cache")
# Functions around `forward` that compute nothing, by their module: accelerate's, which cast the inputs and outputs of a
# model in training, and that of gradient checkpointing.
_WRAPPERS = ("accelerate.utils.operations", "torch.amp.autocast_mode", "transformers.modeling_layers")
# The hooks that transformers leaves in a model that was once asked for its attention weights do nothing here.
_CAPTURING = "transformers.utils.output_capturing"

# For each class that the engines know, its methods as they were then.
_KNOWN: dict[type, dict[str, Any]] = {}


class Inspected(NamedTuple):
    """What a model is made of, as `inspect_model` finds it."""

    parameters: list[torch.Tensor]  # tied ones as often as they are used
    kinds: list[type]  # the classes of all modules
    unknown: str | None = None  # what the engines do not know, in words


def know(*classes: type) -> None:
    """The engines compute what modules of these classes do, and of subclasses, with the methods of this moment."""
    for each in classes:
        names = [name for name in _COMPUTING if hasattr(each, name)]
        if issubclass(each, GenerationMixin):
            names += [name for name in _LOOPING if name != "generate"]
        _KNOWN[each] = {name: getattr(each, name, None) for name in names}


# They compute the same in training mode, in which new ones are.
_WITHOUT_MODE = {*_PLAIN, nn.Identity, nn.ModuleList}
_WITHOUT_MODE |= {each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()}
know(*_WITHOUT_MODE, nn.Dropout, Dropout)


def _known_methods(kind: type) -> dict[str, Any] | None:
    return next((_KNOWN[base] for base in kind.__mro__ if base in _KNOWN), None)


def _unwrapped(method: Any) -> Any:
    """The function that a method calls in the end."""
    while True:
        method = getattr(method, "__func__", method)
        home = getattr(method, "__globals__", {}).get("__name__") or type(method).__module__
        if home not in _WRAPPERS:
            return method
        method = method.__wrapped__


def _why_unknown_class(kind: type) -> str | None:
    """Which of its methods is not known, in words; None if all are."""
    known = _known_methods(kind)
    if known is None:
        return f"the class {kind.__module__}.{kind.__qualname__}"
    for name, method in known.items():
        found = getattr(kind, name, None)
        if found is not method and _unwrapped(found) is not _unwrapped(method):
            return f"{kind.__name__}.{name}, which is not this package's own"
    return None


def _why_unknown_module(module: nn.Module) -> str | None:
    """What a module of a known class does otherwise than others of its class, in words; None if nothing."""
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
    """Whether its class alone decides what a module computes: there is no hook, and no `forward` of its own."""
    return not _hooks_on_all_modules() and _why_unknown_module(module) is None


def _hooks_on_all_modules() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def inspect_model(model: PreTrainedModel) -> Inspected:
    """
    Looks whether the engines compute what the model does: whether all modules are known, as `know` has it, nobody's
    hook wants them to be called, and all weights are torch's own, on one device, in one dtype that is packed.
    """
    positions = (model.model.encoder.embed_positions, model.model.decoder.embed_positions)
    parameters: list[Any] = []
    kinds: list[type] = []
    methods: dict[type, dict[str, Any]] = {}
    # torch's `modules()` takes three times as long, and this is done at each call of `generate()`.
    modules: list[nn.Module] = [model]
    for module in modules:
        if module is None:
            continue
        kind, state, why = type(module), module.__dict__, None
        if kind not in methods:
            methods[kind], why = _known_methods(kind) or {}, _why_unknown_class(kind)
        kinds.append(kind)
        # Most modules are leaves, which have one method.
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
        return "weights that are no plain tensors"
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
    attention: Any = ALL_ATTENTION_FUNCTIONS.get(name)  # none for "eager"
    attention = attention.func if isinstance(attention, partial) else attention
    if attention is not None and not attention.__module__.startswith("transformers."):
        return f"the attention implementation {name!r}"
    return None

"""Chooses the engine that decodes a call of `generate()`. No other file decides this.

Three engines give the same output. From the fastest:

- "compiled": search and network as one C++ program (`engine_compiled.py`), for greedy and beam search on a
  CPU in float32 or int8;
- "packed": our searches in torch (`decoding_beams.py`, `decoding_rows.py`) on packed weights (`engine_packed.py`), for
  all searches, types and devices;
- "transformers": its own loops on the modules, for everything else that its `generate()` can do, and for models with
  replaced or hooked modules.
"""

from typing import NamedTuple

from transformers.generation import GenerationMode
from transformers.utils import logging

from .decoding_call import Call
from .engine_compiled import ACTIVATIONS, COMPUTE_TYPES
from .engine_program import ProgramError, load, load_soon


logger = logging.get_logger(__name__)

# What our searches support. transformers' loops handle all other modes and model inputs.
MODES = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.GROUP_BEAM_SEARCH,
}
MODEL_INPUTS = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "use_cache"}


class Engine(NamedTuple):
    """The engine's name ("compiled", "packed" or "transformers"), and the reason why a faster one cannot decode."""

    name: str
    reason: str


def choose_engine(call: Call) -> Engine:
    """
    Returns the fastest engine that supports everything in the call.

    Unless transformers' loops decode, this also prepares the call, because the choice depends on its score processors
    and stopping criteria. It waits for the compiler only if `compiled` is True.

    Raises:
        ProgramError: `compiled` is True, but the program cannot be compiled or loaded here.
        ValueError: as in `Call.prepare`; `compiled` is True, but the program does not support this type or device; or
            an argument of ours is combined with one that only transformers' loops support.
    """
    if reason := _why_transformers(call) or call.found.unknown:
        call.extras.refuse_beside(reason)
        return Engine("transformers", reason)
    call.prepare()
    if reason := _why_packed(call):
        return Engine("packed", reason)
    return Engine("compiled", "")


def _why_transformers(call: Call) -> str | None:
    """What the call needs that only transformers' loops support; None if our searches support everything."""
    config, kwargs, model_inputs = call.config, call.kwargs, call.model_inputs
    mode, mask = config.get_generation_mode(kwargs.get("assistant_model")), model_inputs.get("attention_mask")
    unknown = sorted({name for name, value in model_inputs.items() if value is not None} - MODEL_INPUTS)
    asked = {
        f"the generation mode {mode}": mode not in MODES,
        "use_cache=False": not config.use_cache,
        # transformers returns the cache by default. Here a caller must ask for it with use_cache=True.
        "past_key_values, for use_cache=True with return_dict_in_generate": kwargs.get("use_cache") is True
        and bool(config.return_dict_in_generate),
        f"cache_implementation={config.cache_implementation!r}": config.cache_implementation is not None,
        "custom_generate": kwargs.get("custom_generate") is not None,
        "synced_gpus": bool(kwargs.get("synced_gpus")),
        "stop_strings": config.stop_strings is not None,
        "guidance_scale": config.guidance_scale not in (None, 1),
        "low_memory": bool(config.low_memory),
        "token_healing": bool(config.token_healing),
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
        "a streamer for beams": kwargs.get("streamer") is not None and config.num_beams > 1,
        f"the argument {unknown[:1]}": bool(unknown),
        "inputs other than token ids": call.source is None,
        "an attention_mask of more than two dimensions": mask is not None and mask.dim() > 2,
        "a repetition_penalty after a padded prefix": config.repetition_penalty not in (None, 1.0)
        and model_inputs.get("decoder_attention_mask") is not None,
        "a model in training mode": call.model.training,
    }
    return next((reason for reason, is_asked in asked.items() if is_asked), None)


def _why_packed(call: Call) -> str | None:
    """Why the compiled program cannot decode the call; None if it can."""
    insists = call.extras.compiled
    wrong_type = _why_not_computed(call)
    if insists and wrong_type:
        raise ValueError(f"compiled=True: the compiled program {wrong_type}")
    if insists is False:
        return "compiled=False"
    if len(call.members) > 1:
        return "the compiled program does not support ensembles"
    if unknown := wrong_type or _why_not_searched(call):
        return f"the compiled program {unknown}"
    try:
        program = load() if insists else load_soon()
    except ProgramError as error:
        if insists:
            raise
        logger.warning_once(f"generate() runs without its compiled program, several times slower: {error}")
        return str(error)
    if program is None:
        logger.info("generate() runs without its compiled program until the compiler is done")
        return "the program is being compiled"
    return None


def _why_not_computed(call: Call) -> str | None:
    """Why the program cannot compute in this type or on this device; None if it can."""
    if call.device.type != "cpu":
        return f"runs on CPUs only, and this model is on {call.device}"
    if call.compute_type not in COMPUTE_TYPES:
        return f"computes in {' or '.join(COMPUTE_TYPES)}, not in {call.compute_type}"
    return None


def _why_not_searched(call: Call) -> str | None:
    """What the model or the search needs that the program does not support; None if it supports everything."""
    model, job, config = call.model, call.job, call.job.config
    activations = {type(layer.activation_fn) for layer in [*model.model.encoder.layers, *model.model.decoder.layers]}
    learned = model.config.position_embedding_type == "learned"
    unknown = {
        f"the activation {' and '.join(sorted(kind.__name__ for kind in activations))}": len(activations) > 1
        or not activations <= {*ACTIVATIONS},
        "sampling": config.do_sample,
        "groups of beams": (config.num_beam_groups or 1) > 1,
        "a coverage penalty": job.options.coverage_penalty != 0.0,
        "processors of scores other than a minimum length": job.minimum_length is None,
        "phrases, criteria, streamers, or scores of each step": not job.may_leave,
        "padded prefixes": job.prefix_mask is not None and not bool(job.prefix_mask.all()),
        "outputs that may be longer than learned positions": learned
        and config.max_length > model.config.max_position_embeddings,
    }
    return next((f"does not support {name}" for name, is_asked in unknown.items() if is_asked), None)

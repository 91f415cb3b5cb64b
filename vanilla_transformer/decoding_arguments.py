"""The checks of the arguments of `generate()` and of the pipeline: type and range, before anything is computed.

transformers checks only a few of its arguments. A wrong value of the others would raise an obscure torch error in the
middle of a search, or silently change the output.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig


class Rule(NamedTuple):
    """What a value must be: a test, and a description for the error message."""

    holds: Callable[[Any], bool]
    words: str


def whole_number(least: int) -> Rule:
    """A whole number of at least `least`."""
    return Rule(lambda value: _is_whole(value) and value >= least, f"a whole number of at least {least}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _are_ids(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype in (torch.int32, torch.int64) and value.numel() > 0
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_whole, value))


def _are_phrases(value: Any) -> bool:
    """A list of lists of phrases. `checked_phrases` checks the phrases themselves."""
    lists = (list, tuple)
    return isinstance(value, lists) and all(
        isinstance(several, lists)
        and all(all(map(_is_whole, phrase)) for phrase in several if isinstance(phrase, lists))
        for several in value
    )


def _are_callable(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(callable, value))


WHOLE = Rule(_is_whole, "a whole number")
FLAG = Rule(lambda value: isinstance(value, bool | Integral) and value in (0, 1), "True or False")
FINITE = Rule(_is_number, "a finite number")
POSITIVE = Rule(lambda value: _is_number(value) and value > 0, "a finite number above 0")
SHARE = Rule(lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
# transformers' processors accept 2.0 but not 2.
PENALTY = Rule(lambda value: value == 1 or (isinstance(value, float) and POSITIVE.holds(value)), "a float above 0")
ONE_ID = whole_number(0)._replace(words="a token id")
ONE_ID_OR_MORE = Rule(lambda value: _is_whole(value) or _are_ids(value), "a token id, or a list of token ids")
IDS = Rule(_are_ids, "a list of token ids")
LISTS_OF_IDS = Rule(
    lambda value: isinstance(value, list | tuple) and all(map(_are_ids, value)), "a list of lists of token ids"
)
PHRASES = Rule(_are_phrases, "a list for each sentence, of phrases, each a list of token ids")
TENSOR = Rule(lambda value: isinstance(value, torch.Tensor), "a tensor")

GENERATION_OPTIONS: dict[str, Rule] = {
    # inputs
    **dict.fromkeys(("inputs", "input_ids", "attention_mask"), TENSOR),
    **dict.fromkeys(("decoder_input_ids", "decoder_attention_mask"), TENSOR),
    # lengths and numbers of outputs
    # transformers itself refuses lengths that leave no room for new tokens.
    **dict.fromkeys(("max_length", "max_new_tokens"), WHOLE),
    **dict.fromkeys(("min_length", "min_new_tokens"), whole_number(0)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), whole_number(1)),
    "max_time": POSITIVE,
    "early_stopping": Rule(lambda value: value is True or value is False or value == "never", "a bool or 'never'"),
    # what changes scores
    # 0 is often given without sampling. With sampling, transformers refuses it.
    "temperature": Rule(lambda value: _is_number(value) and value >= 0, "a finite number above 0"),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), PENALTY),
    # Beyond this, a length to this power soon overflows a float.
    "length_penalty": Rule(lambda value: _is_number(value) and abs(value) <= 50, "a number from -50 to 50"),
    **dict.fromkeys(("diversity_penalty", "coverage_penalty"), FINITE),
    **dict.fromkeys(("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), SHARE),
    **dict.fromkeys(("top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), whole_number(0)),
    "exponential_decay_length_penalty": Rule(
        lambda value: (
            isinstance(value, list | tuple) and len(value) == 2 and _is_whole(value[0]) and FINITE.holds(value[1])
        ),
        "a pair: the number of tokens after which it begins, and a factor",
    ),
    "guidance_scale": Rule(lambda value: value == 1, "1: transformers has no guidance for encoder-decoders"),
    # token ids
    **dict.fromkeys(("pad_token_id", "bos_token_id", "forced_bos_token_id"), ONE_ID),
    **dict.fromkeys(("eos_token_id", "decoder_start_token_id", "forced_eos_token_id"), ONE_ID_OR_MORE),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), IDS),
    "bad_words_ids": LISTS_OF_IDS,
    **dict.fromkeys(("required_phrases", "forbidden_phrases"), PHRASES),
    # what to do, and what to return
    **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "compiled"), FLAG),
    **dict.fromkeys(("output_attentions", "output_scores", "output_logits", "return_dict_in_generate"), FLAG),
    **dict.fromkeys(("token_healing", "low_memory", "disable_compile", "synced_gpus"), FLAG),
    "output_hidden_states": Rule(lambda value: FLAG.holds(value) or ONE_ID_OR_MORE.holds(value), "True or False"),
    # objects
    "generation_config": Rule(lambda value: isinstance(value, GenerationConfig), "a GenerationConfig"),
    **dict.fromkeys(("logits_processor", "stopping_criteria"), Rule(_are_callable, "a list of functions")),
    "prefix_allowed_tokens_fn": Rule(callable, "a function"),
    "streamer": Rule(lambda value: callable(getattr(value, "put", None)), "a streamer, with put() and end()"),
    "ensemble": Rule(
        lambda value: isinstance(value, list | tuple) and all(hasattr(model, "config") for model in value),
        "a list of models",
    ),
}
# The arguments that can hold the source.
SOURCES = ("inputs", "input_ids", "inputs_embeds", "encoder_outputs")
# For these None means the default, but transformers fails on None, or decodes differently (use_cache).
NEVER_NONE = ("num_beams", "num_return_sequences", "length_penalty", "use_cache")


def refuse_wrong_values(rules: Mapping[str, Rule], values: Mapping[str, Any]) -> None:
    """
    Checks every value that has a rule. None means the default and is always allowed.

    Raises:
        ValueError: a value breaks its rule.
    """
    for name, value in values.items():
        rule = rules.get(name)
        if rule is not None and value is not None and not rule.holds(value):
            raise ValueError(f"{name}={value!r} must be {rule.words}")


def checked_options(model: Any, options: Mapping[str, Any], **named: Any) -> dict[str, Any]:
    """
    Checks the arguments of `generate()`, and the generation config that it uses.

    Args:
        model: its generation config is used if the caller gives none.
        options: the arguments in `generate()`'s `**kwargs`.
        named: those in its signature.

    Returns:
        `options`, without a None that means the default but that transformers cannot handle.

    Raises:
        ValueError: a value has the wrong type or is out of range.
    """
    config, given = model.config, {**named, **options}
    refuse_wrong_values(GENERATION_OPTIONS, given)
    saved = vars(given.get("generation_config") or model.generation_config)
    refuse_wrong_values(GENERATION_OPTIONS, saved)
    for name in ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        ids = given.get(name, saved.get(name))
        # No new tensor here: it would be created on torch's default device, which may be another one.
        for number in ids if isinstance(ids, list | tuple | torch.Tensor) else [ids]:
            if number is not None and not 0 <= number < config.decoder_vocab_size:
                raise ValueError(_outside(name, number, config.decoder_vocab_size))
    if given.get("attention_mask") is not None and all(given.get(name) is None for name in SOURCES):
        raise ValueError("attention_mask is given without inputs or input_ids")
    source = "inputs" if given.get("inputs") is not None else "input_ids"
    _refuse_odd_ids(source, given.get(source), "attention_mask", given.get("attention_mask"), config.vocab_size)
    prefix, mask = given.get("decoder_input_ids"), given.get("decoder_attention_mask")
    _refuse_odd_ids("decoder_input_ids", prefix, "decoder_attention_mask", mask, config.decoder_vocab_size)
    if prefix is not None and mask is None:
        # If the decoder's start token is the padding token, the first one is not padding.
        starts = int(config.decoder_start_token_id == config.pad_token_id)
        begins = prefix[:, : starts + 1] == config.pad_token_id
        if begins.shape[1] > starts and begins.all(dim=1).any():
            raise ValueError("decoder_input_ids begins with padding: give decoder_attention_mask too")
    return {name: value for name, value in options.items() if value is not None or name not in NEVER_NONE}


def _refuse_odd_ids(
    name: str, ids: torch.Tensor | None, mask_name: str, mask: torch.Tensor | None, vocab_size: int
) -> None:
    if ids is None:
        return
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"{name} must be whole numbers, [B, L], and has shape {list(ids.shape)} and dtype {ids.dtype}")
    refuse_other_ids(name, ids, vocab_size)
    if mask is not None and mask.dim() == 2:
        refuse_other_shape(mask_name, mask, name, ids)


def refuse_other_shape(mask_name: str, mask: torch.Tensor, name: str, ids: torch.Tensor) -> None:
    """
    Raises:
        ValueError: the mask and the ids differ in shape.
    """
    if mask.shape != ids.shape:
        raise ValueError(f"{mask_name} has shape {list(mask.shape)}, {name} {list(ids.shape)}: they must be the same")


def refuse_other_ids(name: str, ids: torch.Tensor, vocab_size: int) -> None:
    """
    Raises:
        ValueError: an id is outside the vocabulary.
    """
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        raise ValueError(_outside(name, ids[outside][0], vocab_size))


def _outside(name: str, number: Any, vocab_size: int) -> str:
    return f"{name} holds id {number}, outside the vocabulary: its ids are 0 to {vocab_size - 1}"

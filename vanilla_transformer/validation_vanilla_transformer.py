"""What the arguments of `generate()` and of the pipeline may be: a value of another type, or out of its range, is
refused by name before anything is computed.

transformers looks at few of its own. The others would break off deep in a search with words of torch, or change the
output without a word.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch


class Rule(NamedTuple):
    """What a value must be: a test, and the same in words."""

    holds: Callable[[Any], bool]
    words: str


def whole_number(least: int) -> Rule:
    """A whole number, not below `least`."""
    return Rule(lambda value: isinstance(value, Integral) and value >= least, f"a whole number of at least {least}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are_ids(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point()
    return all(map(_is_whole, value)) if isinstance(value, list | tuple) else _is_whole(value)


FLAG = Rule(lambda value: isinstance(value, bool | int) and value in (0, 1), "True or False")
FINITE = Rule(lambda value: isinstance(value, Real) and math.isfinite(value), "a finite number")
POSITIVE = Rule(lambda value: isinstance(value, Real) and 0 < value < math.inf, "a finite number above 0")
SHARE = Rule(lambda value: isinstance(value, Real) and 0 <= value <= 1, "a number from 0 to 1")
IDS = Rule(_are_ids, "a token id, or a list of them")
LISTS_OF_IDS = Rule(
    lambda value: (
        isinstance(value, list | tuple) and all(isinstance(ids, list | tuple) and _are_ids(ids) for ids in value)
    ),
    "a list of lists of token ids",
)

GENERATION_OPTIONS: dict[str, Rule] = {
    # lengths and numbers of outputs
    **dict.fromkeys(("max_length", "max_new_tokens"), whole_number(1)),
    **dict.fromkeys(("min_length", "min_new_tokens"), whole_number(0)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), whole_number(1)),
    "max_time": POSITIVE,
    # what changes scores
    **dict.fromkeys(("temperature", "repetition_penalty", "encoder_repetition_penalty"), POSITIVE),
    **dict.fromkeys(("length_penalty", "diversity_penalty", "coverage_penalty", "guidance_scale"), FINITE),
    **dict.fromkeys(("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), SHARE),
    **dict.fromkeys(("top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), whole_number(0)),
    # token ids
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), IDS),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), IDS),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), IDS),
    "bad_words_ids": LISTS_OF_IDS,
    # what to do, and what to tell
    **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "compiled"), FLAG),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), FLAG),
    **dict.fromkeys(("return_dict_in_generate", "token_healing", "low_memory", "disable_compile"), FLAG),
}


def refuse_wrong_values(rules: Mapping[str, Rule], values: Mapping[str, Any]) -> None:
    """
    Looks at every value that has a rule. None asks for the default.

    Raises:
        ValueError: a value breaks its rule.
    """
    for name, rule in rules.items():
        value = values.get(name)
        if value is not None and not rule.holds(value):
            raise ValueError(f"{name}={value!r} must be {rule.words}")

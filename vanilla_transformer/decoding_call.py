"""One call of `generate()`: its arguments, and the phases from them to the output tokens.

transformers' own methods merge the generation configs and make prefixes, lengths, score processors and stopping
criteria. They are called here in the order of `GenerationMixin.generate`.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import StoppingCriteriaList

from .decoding_beams import search_beams
from .decoding_constraints import (
    ForbiddenPhrases,
    RequiredPhrases,
    checked_phrases,
    refuse_impossible_phrases,
    refuse_long_phrases,
)
from .decoding_job import Options, SearchJob
from .decoding_rows import search_rows
from .engine_compiled import CompiledTransformer
from .engine_copies import copy_of
from .engine_eligibility import Inspected, inspect_model
from .engine_packed import PackedTransformer
from .engine_products import resolve_compute_type


class Extras(NamedTuple):
    """The arguments that our `generate()` adds to those of transformers. Its docstring explains them."""

    compute_type: str | None = None
    compiled: bool | None = None
    length_penalty_form: str | None = None
    coverage_penalty: float | None = None
    ensemble: Sequence[Any] | None = None
    required_phrases: Sequence | None = None
    forbidden_phrases: Sequence | None = None

    def or_saved(self, config: GenerationConfig) -> "Extras":
        """
        Fills in missing values from the model's generation config, then from the defaults.

        Raises:
            ValueError: `length_penalty_form` is unknown.
        """

        def first(name: str, default: Any = None) -> Any:
            values = (getattr(self, name), getattr(config, name, None), default)
            return next((value for value in values if value is not None), None)

        completed = self._replace(
            compute_type=first("compute_type"),
            compiled=first("compiled"),
            length_penalty_form=first("length_penalty_form", "power"),
            coverage_penalty=first("coverage_penalty", 0.0),
        )
        if completed.length_penalty_form not in ("power", "gnmt"):
            raise ValueError(f"length_penalty_form={completed.length_penalty_form!r} must be 'power' or 'gnmt'")
        return completed

    def refuse_beside(self, reason: str) -> None:
        """
        Refuses these arguments when transformers' own loops decode, because they would be ignored.

        Args:
            reason: why transformers' loops decode.

        Raises:
            ValueError: one of the arguments is given.
        """
        given = {
            "compute_type": self.compute_type is not None,
            "length_penalty_form": self.length_penalty_form != "power",
            "coverage_penalty": self.coverage_penalty != 0.0,
            "ensemble": bool(self.ensemble),
            "required_phrases": self.required_phrases is not None,
            "forbidden_phrases": self.forbidden_phrases is not None,
        }
        for name, is_given in given.items():
            if is_given:
                raise ValueError(f"{name} cannot be combined with {reason}")


class Call:
    """
    A call of `generate()`, in three phases: `__init__` reads the arguments, then come `prepare` and `run`.

    Args:
        model: a `VanillaTransformerForConditionalGeneration`.
        inputs, generation_config, kwargs: the arguments of `generate()`, already checked.
        extras: the arguments that transformers does not have.

    Attributes:
        config: all options of the call, in one generation config.
        model_inputs: the arguments that are inputs of the model.
        source: source ids `[B, S]`, or None if the source is not given as ids.
        found: the result of `inspect_model`.
        members: this model and the others of the ensemble, each with its `inspect_model`. Set by `prepare`.
        device, compute_type: where and in which type the matrix products are computed. Set by `prepare`.
        job: what to search for. Set by `prepare`.

    Raises:
        ValueError: as in `Extras.or_saved`.
    """

    def __init__(
        self,
        model: Any,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
        extras: Extras,
    ):
        self.model, self.kwargs = model, kwargs
        options = {name: value for name, value in kwargs.items() if name not in _NO_OPTIONS}
        self.config, self.model_inputs = model._prepare_generation_config(generation_config, **options)
        self.extras = extras.or_saved(self.config)
        self.source = _source(inputs, self.model_inputs)
        self.found = inspect_model(model)
        # Whether the limits of the output's length are left at their defaults.
        configs = [each for each in (generation_config, model.generation_config) if each is not None]
        self.has_default_length = {
            name: kwargs.get(name) is None and all(getattr(config, name) is None for config in configs)
            for name in ("max_length", "min_length")
        }

    def prepare(self) -> None:
        """
        Sets `members`, `device`, `compute_type` and `job`.

        Raises:
            ValueError: phrases, members of the ensemble, lengths or the compute type are wrong.
        """
        required, processors = self._constraints()
        others = enumerate(self.extras.ensemble or (), start=1)
        self.device = self.found.parameters[0].device
        self.compute_type = resolve_compute_type(self.extras.compute_type, self.model)
        self.members = [(self.model, self.found), *((other, _member(self.model, other, n)) for n, other in others)]
        self.job = self._job(required, processors)

    def _constraints(self) -> tuple[list[list[list[int]]] | None, LogitsProcessorList]:
        """The required phrases, and the caller's score processors plus one for the forbidden phrases."""
        assert self.source is not None
        sentences, vocabulary = len(self.source), self.model.config.decoder_vocab_size
        required = checked_phrases("required_phrases", self.extras.required_phrases, sentences, vocabulary)
        forbidden = checked_phrases("forbidden_phrases", self.extras.forbidden_phrases, sentences, vocabulary)
        processors = LogitsProcessorList(self.kwargs.get("logits_processor") or [])
        if forbidden is not None:
            processors.append(ForbiddenPhrases(forbidden))
        if required is not None:
            refuse_impossible_phrases(required, forbidden, self.config)
        return required, processors

    def _job(self, required: list[list[list[int]]] | None, processors: LogitsProcessorList) -> SearchJob:
        assert self.source is not None
        source, mask = self.source, self.model_inputs.get("attention_mask")
        prefix, prefix_mask = self._prefix(source, mask)
        self._set_lengths(source, prefix)
        if required is not None:
            refuse_long_phrases(required, self.config.max_length - prefix.shape[1])
        return SearchJob(
            source=source.to(self.device),
            source_mask=None if mask is None else mask.to(self.device),
            input_ids=prefix,
            prefix_mask=prefix_mask,
            processors=self.model._get_logits_processor(
                generation_config=self.config,
                input_ids_seq_length=prefix.shape[1],
                encoder_input_ids=source,
                prefix_allowed_tokens_fn=self.kwargs.get("prefix_allowed_tokens_fn"),
                logits_processor=processors,
                device=source.device,
                model_kwargs=self.model_inputs,
            ),
            criteria=self.model._get_stopping_criteria(
                generation_config=self.config,
                stopping_criteria=self.kwargs.get("stopping_criteria") or StoppingCriteriaList(),
            ),
            config=self.config,
            streamer=self.kwargs.get("streamer"),
            options=Options(
                self.extras.length_penalty_form or "power",
                self.extras.coverage_penalty or 0.0,
                None if required is None else RequiredPhrases(required, self.config.num_beams),
            ),
        )

    def _prefix(self, source: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens that every output begins with, `[B, T]`, and their mask if they are padded."""
        self.model._prepare_special_tokens(self.config, mask is not None, device=source.device, batch_size=len(source))
        prefix, model_inputs = self.model._prepare_decoder_input_ids_for_generation(
            batch_size=len(source),
            model_input_name="input_ids",
            model_kwargs={name: value for name, value in self.model_inputs.items() if name != "input_ids"},
            decoder_start_token_id=self.config._decoder_start_token_tensor,
            device=source.device,
        )
        return prefix, model_inputs.get("decoder_attention_mask")

    def _set_lengths(self, source: torch.Tensor, prefix: torch.Tensor) -> None:
        """
        Sets `max_length` and `min_length` from all options that limit the output's length.

        Raises:
            ValueError: there is no room for a token after the prefix.
        """
        self.config = self.model._prepare_generated_length(
            generation_config=self.config,
            has_default_max_length=self.has_default_length["max_length"],
            has_default_min_length=self.has_default_length["min_length"],
            model_input_name="input_ids",
            inputs_tensor=source,
            input_ids_length=prefix.shape[1],
        )
        self.model._validate_generated_length(self.config, prefix.shape[1], self.has_default_length["max_length"])

    def run(self, engine: str) -> Any:
        """
        Decodes with this engine, "compiled" or "packed". Returns what `generate()` returns.

        Raises:
            ValueError: the weights contain NaN or infinity.
        """
        if self.job.streamer is not None:
            self.job.streamer.put(self.job.input_ids.cpu())
        # No gradients, no version counters, and no casts other than those of the compute type.
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            result = self._search(engine)
        return _outside_inference_mode(result)

    def _search(self, engine: str) -> Any:
        if engine == "compiled":
            return copy_of(*self.members[0], CompiledTransformer, self.compute_type).search(self.job)
        engines = [copy_of(*member, PackedTransformer, self.compute_type) for member in self.members]
        return search_beams(self.job, engines) if self.config.num_beams > 1 else search_rows(self.job, engines)


# Arguments of `generate()` that are neither fields of the generation config nor inputs of the model.
_NO_OPTIONS = {*inspect.signature(GenerationMixin.generate).parameters}
_NO_OPTIONS |= {"trust_remote_code", "tokenizer", "assistant_tokenizer"}


def _source(inputs: torch.Tensor | None, model_inputs: dict) -> torch.Tensor | None:
    """The source ids `[B, S]`, or None. Then transformers creates the inputs or reports what is wrong."""
    ids = inputs if inputs is not None else model_inputs.get("input_ids")
    both = inputs is not None and model_inputs.get("input_ids") is not None
    return ids if isinstance(ids, torch.Tensor) and ids.dim() == 2 and ids.numel() and not both else None


def _member(model: Any, other: Any, number: int) -> Inspected:
    """
    Inspects another model of an ensemble.

    Raises:
        ValueError: its vocabulary differs, or it cannot be packed.
    """
    for field in ("vocab_size", "decoder_vocab_size", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        ours, theirs = getattr(model.config, field), getattr(other.config, field)
        if ours != theirs:
            raise ValueError(
                f"ensemble: model {number} has {field}={theirs}, this one has {ours}: an ensemble needs one vocabulary"
            )
    found = inspect_model(other)
    if found.unknown:
        raise ValueError(
            f"ensemble: model {number} cannot be packed ({found.unknown}): it must be in evaluation mode, with "
            "this package's own layers, on one device"
        )
    return found


def _outside_inference_mode(result: Any) -> Any:
    """Copies the result into ordinary tensors, which a user may change."""
    if isinstance(result, torch.Tensor):
        return result.clone()
    for name, value in result.items():
        if isinstance(value, torch.Tensor):
            result[name] = value.clone()
        elif isinstance(value, tuple):
            result[name] = tuple(step.clone() for step in value)
    return result

"""How `generate()` decodes this model: the paper's beam search (Vaswani et al., 2017, section 6.1) by default.

`generate()` here takes all that transformers' own takes, and what translators ask for besides. Three engines give the
same output, and `choose_engine` takes the fastest that knows what is asked for: the compiled program of
`native_vanilla_transformer.py`; the searches of `search_vanilla_transformer.py` on the packed network of
`inference_vanilla_transformer.py`; and transformers' own loops, which alone offer attention weights and states of each
step, static caches, assistants and custom loops.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import GenerationMode, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from .constraints_vanilla_transformer import ForbiddenPhrases, RequiredPhrases
from .inference_vanilla_transformer import (
    Inspected,
    PackedTransformer,
    copy_of,
    inspect_model,
    resolve_compute_type,
)
from .native_vanilla_transformer import NativeTransformer, why_not_compiled, why_not_searched
from .program_vanilla_transformer import ProgramError, load, load_soon
from .search_vanilla_transformer import Options, SearchJob, search_beams, search_rows
from .validation_vanilla_transformer import checked_options


logger = logging.get_logger(__name__)

# Section 6.1: "maximum output length during inference to input length + 50".
MAX_EXTRA_TOKENS = 50

SEARCHES = {
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.GROUP_BEAM_SEARCH,
}
# What our searches know how to take. With any other argument of the model, transformers' loops decode.
KNOWN_INPUTS = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "use_cache"}


# transformers looks several times in each call which of its own arguments the model and a custom search name. The
# search names none of them, and for the model the answer is kept, for it takes long to find.
_NO_PARAMETERS = inspect.Signature()


class Engine(NamedTuple):
    """What decodes: "compiled", "packed" or "transformers"; and why nothing faster does, in words."""

    name: str
    reason: str


class SharedEncoding(BaseModelOutput):
    """
    Stands in transformers' `generate()` for the encoder's output, which our searches compute. It brings there what ours
    has prepared: `prepared`, the generation config and the model's inputs.
    """


class VanillaTransformerGenerationMixin(GenerationMixin):
    """
    transformers' `generate()` with the paper's defaults: beam 4, and outputs at most 50 tokens over the source.

    Attributes:
        last_engine: what decoded in the last call of `generate()`, and why nothing faster did.
    """

    last_engine: Engine | None = None

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls.forward.__signature__ = inspect.signature(cls.forward)

    def _set_paper_defaults(self) -> None:
        """Beam 4. A saved `generation_config.json` and arguments of `generate()` both come before it."""
        self.generation_config.num_beams = 4
        # Or transformers would save options of ours with the others, but not load them.
        self.generation_config._from_model_config = False

    def adjust_generation_fn(self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any) -> None:
        """What `from_pretrained` does at its end: without a `generation_config.json` the defaults are the paper's."""
        super().adjust_generation_fn(generation_config, *args, **kwargs)
        if self.generation_config._from_model_config:
            self._set_paper_defaults()

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        compute_type: str | None = None,
        compiled: bool | None = None,
        length_penalty_form: str | None = None,
        coverage_penalty: float | None = None,
        ensemble: Sequence["VanillaTransformerGenerationMixin"] = (),
        required_phrases: Sequence[Sequence[Sequence[int]]] | None = None,
        forbidden_phrases: Sequence[Sequence[Sequence[int]]] | None = None,
        **kwargs,
    ) -> Any:
        """
        Takes what `transformers.GenerationMixin.generate` takes and returns what that returns, faster, and:

        Args:
            compute_type: what products with weights are computed in: "float32", "bfloat16", or "int8".
                Default: the model's dtype. The weights are packed at the first call and kept beside the model.
            compiled: whether greedy and beam search run as one compiled program, in float32 or int8 on a CPU: several
                times faster in small networks (`native_vanilla_transformer.py`). Default: as soon as it is there. It
                needs a C++ compiler, which works in the background at the first use on a machine; without one the
                output is the same, but slower. True waits for the compiler and raises an error where the program
                cannot be had. False never takes it. What the program does not know (sampling, groups, ensembles,
                phrases, coverage, scores of steps, processors but a minimum length) is decoded without it in any case.
            length_penalty_form: what the log-probability of a hypothesis of n tokens is divided by, with
                `length_penalty` as alpha: "power", n^alpha, as in transformers and fairseq (default); "gnmt",
                ((5 + n) / 6)^alpha, as in the paper, which has alpha = 0.6 (Wu et al., 2016, equation 14).
            coverage_penalty: Wu et al.'s beta: a hypothesis that ends gets beta * sum_i log(min(sum_j p_ij, 1)) added,
                p_ij being the last layer's cross-attention from target token j to source token i, averaged over heads.
                Default: 0.
            ensemble: models with the same vocabularies, whose probabilities are averaged with this one's.
            required_phrases: for each sentence a list of phrases, each a list of token ids, all of which every output
                contains (Post and Vilar, 2018). Needs beams; more phrases need more of them.
            forbidden_phrases: likewise, none of which any output contains.
            kwargs: all else, as in transformers. `num_beam_groups` and `diversity_penalty` (Vijayakumar et al., 2018)
                work without code from the Hub. Prefixes that differ by sentence are `decoder_input_ids` padded on the
                left, with their `decoder_attention_mask`.

        Returns:
            As in transformers. With `return_dict_in_generate=True` beam search always tells `sequences_scores`.
            `past_key_values` is None unless transformers' own loop has decoded: say `use_cache=True` to be given it.

        Raises:
            ValueError: an argument is wrong, or does not go with another one that only transformers' loops know; the
                weights contain NaN or infinity; `compiled=True`, and the program cannot be had.
        """
        kwargs = checked_options(
            self, kwargs, inputs=inputs, generation_config=generation_config, ensemble=ensemble, compiled=compiled,
            coverage_penalty=coverage_penalty, required_phrases=required_phrases, forbidden_phrases=forbidden_phrases,
        )  # fmt: skip
        ensemble = ensemble or ()
        config, model_inputs = self._prepare_generation_config(generation_config, **_without_extras(kwargs))
        compute_type = _first(compute_type, getattr(config, "compute_type", None))
        compiled = _first(compiled, getattr(config, "compiled", None))
        options = _options(config, length_penalty_form, coverage_penalty)
        sentences = _sentences(inputs, model_inputs)
        found = inspect_model(self)
        reason = self._why_not_here(config, model_inputs, sentences, kwargs) or found.unknown
        if reason is not None:
            _refuse_in_stock_loops(
                reason,
                compute_type=compute_type is not None,
                length_penalty_form=options.length_penalty_form != "power",
                coverage_penalty=options.coverage_penalty != 0.0,
                ensemble=bool(ensemble),
                required_phrases=required_phrases is not None,
                forbidden_phrases=forbidden_phrases is not None,
            )
            self.last_engine = Engine("transformers", reason)
            return super().generate(inputs, generation_config, **kwargs)

        assert sentences is not None
        # 1. what constrains the outputs
        required = _checked_phrases("required_phrases", required_phrases, len(sentences), self.config)
        forbidden = _checked_phrases("forbidden_phrases", forbidden_phrases, len(sentences), self.config)
        if forbidden is not None:
            processors = kwargs.get("logits_processor") or []
            kwargs["logits_processor"] = LogitsProcessorList([*processors, ForbiddenPhrases(forbidden)])
        if required is not None:
            _refuse_impossible_phrases(required, forbidden, config)
            options = options._replace(required=RequiredPhrases(required, config.num_beams))

        # 2. the models
        device, compute_type = found.parameters[0].device, resolve_compute_type(compute_type, self)
        members = [
            (self, found),
            *((model, _member(self, model, number)) for number, model in enumerate(ensemble, 1)),
        ]
        if compiled and (why := why_not_compiled(compute_type, device)):
            raise ValueError(f"compiled=True: {why}")

        # 3. transformers prepares lengths, prefixes, processors and criteria, and calls this to search
        def search(
            model: Any,
            input_ids: torch.Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> Any:
            if required is not None:
                _refuse_long_phrases(required, generation_config.max_length - input_ids.shape[1])
            mask = model_inputs.get("attention_mask")
            job = SearchJob(
                source=sentences.to(device),
                source_mask=None if mask is None else mask.to(device),
                input_ids=input_ids,
                prefix_mask=model_kwargs.get("decoder_attention_mask"),
                processors=logits_processor,
                criteria=stopping_criteria,
                config=generation_config,
                streamer=kwargs.get("streamer"),
                options=options,
            )
            # No gradients, no counting of changes, and no casts but those of the compute type.
            with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                # Not read back from the model: another thread may have decoded meanwhile.
                self.last_engine = engine = choose_engine(job, members, compute_type, compiled)
                result = _searched(job, members, compute_type, engine.name)
            return _outside_inference_mode(result)

        search.__signature__ = _NO_PARAMETERS  # type: ignore[attr-defined]
        encoding = SharedEncoding()
        encoding.prepared = (config, model_inputs)
        return super().generate(
            inputs, generation_config, **{**kwargs, "custom_generate": search, "encoder_outputs": encoding}
        )

    def _why_not_here(
        self, config: GenerationConfig, model_inputs: dict, sentences: torch.Tensor | None, kwargs: dict
    ) -> str | None:
        """What only transformers' own loops can do, in words; None if our searches can do all that is asked for."""
        mode = config.get_generation_mode(kwargs.get("assistant_model"))
        unknown = sorted({name for name, value in model_inputs.items() if value is not None} - KNOWN_INPUTS)
        wanted = {
            f"the generation mode {mode}": mode not in SEARCHES,
            "use_cache=False": not config.use_cache,
            # Asked for by name: what transformers tells by default, the keys and values of beams that never ended.
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
            "inputs that are no ids": sentences is None,
            "a repetition_penalty after a padded prefix": config.repetition_penalty not in (None, 1.0)
            and model_inputs.get("decoder_attention_mask") is not None,
            "a model in training mode": self.training,
        }
        return next((reason for reason, present in wanted.items() if present), None)

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any) -> Any:
        """Once for each call of `generate()`, not twice."""
        encoding = kwargs.get("encoder_outputs")
        if isinstance(encoding, SharedEncoding):
            config, model_inputs = encoding.prepared
            return config, model_inputs | {"encoder_outputs": encoding}
        return super()._prepare_generation_config(generation_config, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict) -> None:
        """What our searches get is known (`_why_not_here`)."""
        if not isinstance(model_kwargs.get("encoder_outputs"), SharedEncoding):
            super()._validate_model_kwargs(model_kwargs)

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:  # type: ignore[override]
        """transformers copies every input for each beam. Our searches need no copies."""
        if isinstance(kwargs.get("encoder_outputs"), SharedEncoding):
            expand_size = 1
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> None:
        """Our searches bring their own cache."""
        if not isinstance(model_kwargs.get("encoder_outputs"), SharedEncoding):
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)

    def _prepare_generated_length(
        self,
        generation_config: GenerationConfig,
        has_default_max_length: bool,
        has_default_min_length: bool,
        model_input_name: str,
        input_ids_length: int,
        inputs_tensor: torch.Tensor,
    ) -> GenerationConfig:
        """Replaces transformers' default of 20 new tokens, which would cut most translations short."""
        if has_default_max_length and generation_config.max_new_tokens is None:
            longest = inputs_tensor.shape[1] + MAX_EXTRA_TOKENS
            if self.config.position_embedding_type == "learned":
                longest = min(longest, self.config.max_position_embeddings)
            generation_config.max_new_tokens = longest - input_ids_length
        return super()._prepare_generated_length(
            generation_config,
            has_default_max_length,
            has_default_min_length,
            model_input_name,
            input_ids_length,
            inputs_tensor,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, decoder_attention_mask: torch.Tensor | None = None, **kwargs
    ) -> dict:
        """Numbers the target tokens by their mask, which a static cache turns into one that tells no positions."""
        if decoder_attention_mask is not None and kwargs.get("decoder_position_ids") is None:
            kwargs["decoder_position_ids"] = (decoder_attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return super().prepare_inputs_for_generation(input_ids, decoder_attention_mask=decoder_attention_mask, **kwargs)


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


# Arguments of `generate()` that are neither fields of a generation config nor inputs of the model.
_EXTRAS = {*inspect.signature(GenerationMixin.generate).parameters}
_EXTRAS |= {"trust_remote_code", "tokenizer", "assistant_tokenizer"}


def _without_extras(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name not in _EXTRAS}


def _options(config: GenerationConfig, length_penalty_form: str | None, coverage_penalty: float | None) -> Options:
    """As the caller says, or as it was saved with the model."""
    options = Options(
        _first(length_penalty_form, getattr(config, "length_penalty_form", None), "power"),
        _first(coverage_penalty, getattr(config, "coverage_penalty", None), 0.0),
    )
    if options.length_penalty_form not in ("power", "gnmt"):
        raise ValueError(f"length_penalty_form={options.length_penalty_form!r} must be 'power' or 'gnmt'")
    return options


def _refuse_in_stock_loops(reason: str, **asked: bool) -> None:
    """What transformers' own loops, which decode because of `reason`, would pass over."""
    for name, wanted in asked.items():
        if wanted:
            raise ValueError(f"{name} does not go with {reason}")


def _sentences(inputs: torch.Tensor | None, model_inputs: dict) -> torch.Tensor | None:
    """The source's ids `[B, S]`, or None: then transformers says what is wrong, or makes them."""
    ids = inputs if inputs is not None else model_inputs.get("input_ids")
    both = inputs is not None and model_inputs.get("input_ids") is not None
    return ids if isinstance(ids, torch.Tensor) and ids.dim() == 2 and ids.numel() and not both else None


def _member(model: Any, other: Any, number: int) -> Inspected:
    """
    Looks at another model of an ensemble.

    Raises:
        ValueError: it has another vocabulary, or cannot be packed.
    """
    for field in ("vocab_size", "decoder_vocab_size", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        ours, theirs = getattr(model.config, field), getattr(other.config, field)
        if ours != theirs:
            raise ValueError(
                f"ensemble: model {number} has {field}={theirs} and this one {ours}: an ensemble needs one vocabulary"
            )
    found = inspect_model(other)
    if found.unknown:
        raise ValueError(
            f"ensemble: model {number} must be in evaluation mode, with this package's own layers on one device, and "
            f"has {found.unknown}"
        )
    return found


def _checked_phrases(name: str, phrases: Sequence | None, sentences: int, config: Any) -> list[list[list[int]]] | None:
    if phrases is None:
        return None
    if len(phrases) != sentences:
        raise ValueError(f"{name} has lists for {len(phrases)} sentences, but there are {sentences}")
    for number, several in enumerate(phrases):
        for phrase in several:
            if not isinstance(phrase, (list, tuple)) or not phrase:
                raise ValueError(f"{name}[{number}] holds {phrase!r}, which is not a list of one or more token ids")
            for token in phrase:
                if not 0 <= token < config.decoder_vocab_size:
                    raise ValueError(
                        f"{name}[{number}] holds the token id {token}; ids go from 0 to {config.decoder_vocab_size - 1}"
                    )
    return [[list(phrase) for phrase in several] for several in phrases]


def _refuse_impossible_phrases(required: list, forbidden: list | None, config: GenerationConfig) -> None:
    if config.num_beams == 1 or config.do_sample or (config.num_beam_groups or 1) > 1:
        raise ValueError("required_phrases needs beam search: num_beams above 1, without sampling or groups")
    eos = config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    for number, phrase in ((number, phrase) for number, several in enumerate(required) for phrase in several):
        if end := set(ends).intersection(phrase):
            raise ValueError(f"required_phrases[{number}] holds {phrase} with {end.pop()}, which ends a sentence")
        for other in forbidden[number] if forbidden is not None else []:
            places = range(len(phrase) - len(other) + 1)
            if any(phrase[place : place + len(other)] == other for place in places):
                raise ValueError(
                    f"required_phrases[{number}] holds {phrase}, of which forbidden_phrases[{number}] forbids {other}"
                )


def _refuse_long_phrases(required: Sequence[Sequence[Sequence[int]]], new_tokens: int) -> None:
    for number, several in enumerate(required):
        tokens = sum(len(phrase) for phrase in several)
        if several and tokens + 1 > new_tokens:
            raise ValueError(
                f"required_phrases[{number}] holds {tokens} tokens, which with the end of the sentence do not fit into "
                f"{new_tokens} new tokens: raise max_new_tokens or max_length"
            )


def choose_engine(job: SearchJob, members: list, compute_type: str, compiled: bool | None) -> Engine:
    """
    The fastest engine of ours that knows all that is asked for. A program that must be compiled first is not waited for
    unless `compiled` is True.

    Args:
        members: the models of an ensemble, or the one model, and what `inspect_model` finds of each.

    Raises:
        ProgramError: `compiled` is True, and the program cannot be compiled or loaded here.
    """
    model, found = members[0]
    if compiled is False:
        return Engine("packed", "compiled=False")
    unknown = (
        ("it does not know ensembles" if len(members) > 1 else None)
        or why_not_compiled(compute_type, found.parameters[0].device)
        or why_not_searched(model, job)
    )
    if unknown:
        return Engine("packed", f"the compiled program: {unknown}")
    try:
        ready = load() if compiled else load_soon()
    except ProgramError as error:
        if compiled:
            raise
        logger.warning_once(f"generate() runs without its compiled program, several times slower: {error}")
        return Engine("packed", str(error))
    if ready is None:
        logger.info("generate() runs without its compiled program until the compiler is done")
        return Engine("packed", "the program is being compiled")
    return Engine("compiled", "")


def _searched(job: SearchJob, members: list, compute_type: str, engine: str) -> Any:
    if engine == "compiled":
        return copy_of(*members[0], NativeTransformer, compute_type).search(job)
    engines = [copy_of(*member, PackedTransformer, compute_type) for member in members]
    return search_beams(job, engines) if job.config.num_beams > 1 else search_rows(job, engines)


def _outside_inference_mode(result: Any) -> Any:
    """Ordinary tensors, which a user may change."""
    if isinstance(result, torch.Tensor):
        return result.clone()
    for name, value in result.items():
        if isinstance(value, torch.Tensor):
            result[name] = value.clone()
        elif isinstance(value, tuple):
            result[name] = tuple(step.clone() for step in value)
    return result

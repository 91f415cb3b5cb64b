"""The input of one search, prepared by transformers: ids, lengths, processors, criteria, options."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import logits_process as processing

from .decoding_constraints import RequiredPhrases


# These processors treat each row of scores by itself, so that sentences can be dropped from the batch.
ROW_BY_ROW = (
    processing.NoBadWordsLogitsProcessor,
    processing.NoRepeatNGramLogitsProcessor,
    processing.ForcedBOSTokenLogitsProcessor,
    processing.ForcedEOSTokenLogitsProcessor,
    processing.SuppressTokensLogitsProcessor,
    processing.SuppressTokensAtBeginLogitsProcessor,
    processing.ExponentialDecayLengthPenalty,
    processing.InfNanRemoveLogitsProcessor,
    processing.LogitNormalization,
)
MINIMUM_LENGTH = (processing.MinLengthLogitsProcessor, processing.MinNewTokensLengthLogitsProcessor)


class Options(NamedTuple):
    """The options that our searches add to those of transformers. See `VanillaTransformerGenerationMixin.generate`."""

    length_penalty_form: str = "power"
    coverage_penalty: float = 0.0
    required: RequiredPhrases | None = None

    def length_penalty(self, length: int, exponent: float) -> float:
        """The divisor of the log-probability of a hypothesis of `length` tokens."""
        return ((5 + length) / 6) ** exponent if self.length_penalty_form == "gnmt" else float(length) ** exponent


@dataclass(frozen=True)
class SearchJob:
    """All that a search needs, as transformers has prepared it."""

    source: torch.Tensor  # [B, S]
    source_mask: torch.Tensor | None  # [B, S]
    input_ids: torch.Tensor  # [B, T]
    prefix_mask: torch.Tensor | None  # [B, T]
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any
    options: Options

    @cached_property
    def minimum_length(self) -> int | None:
        """The least length of an output, prefix included, if the processors do nothing else. Otherwise None."""
        eos = self.config._eos_token_tensor
        for processor in self.processors:
            if type(processor) not in MINIMUM_LENGTH or eos is None or not torch.equal(processor.eos_token_id, eos):
                return None
        lengths = [0]
        for processor in self.processors:
            if isinstance(processor, processing.MinLengthLogitsProcessor):
                lengths.append(processor.min_length)
            else:
                lengths.append(processor.prompt_length_to_skip + processor.min_new_tokens)
        return max(lengths)

    @cached_property
    def ends_by_itself(self) -> bool:
        """Whether outputs end only at an end-of-sentence token or at the maximum length."""
        return all(self._is_ordinary(criterion) for criterion in self.criteria)

    def _is_ordinary(self, criterion: Any) -> bool:
        """Whether a criterion agrees with the generation config. A user may have given one with another length."""
        if type(criterion) is MaxLengthCriteria:
            return criterion.max_length == self.config.max_length
        eos = self.config._eos_token_tensor
        return type(criterion) is EosTokenCriteria and eos is not None and torch.equal(criterion.eos_token_id, eos)

    @property
    def fill(self) -> int:
        """The id that fills an output after its end."""
        pad, eos = self.config._pad_token_tensor, self.config._eos_token_tensor
        if self.config.num_beams == 1:
            return int(pad) if pad is not None else 0
        return -1 if eos is None else int(pad or eos[0])  # as in transformers

    @cached_property
    def may_leave(self) -> bool:
        """Whether finished sentences can be dropped from the batch without changing the result."""
        rows = all(type(processor) in ROW_BY_ROW + MINIMUM_LENGTH for processor in self.processors)
        watched = self.config.output_scores or self.config.output_logits or self.streamer is not None
        return rows and self.ends_by_itself and not watched and not self.config.do_sample and not self.options.required

    def is_eos(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which tokens end an output. For so few ids this is faster than `torch.isin`."""
        eos = self.config._eos_token_tensor
        if eos is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return (tokens[..., None] == eos).any(dim=-1)

    def processed(self, scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Scores `[rows, V]` after the processors. If only a minimum length is set, it is applied in place."""
        if self.minimum_length is None:
            return self.processors(ids.clone(), scores)
        if ids.shape[1] < self.minimum_length:
            scores.index_fill_(1, self.config._eos_token_tensor, float("-inf"))
        return scores

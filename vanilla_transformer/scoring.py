"""Scores given translations, aligns them to their sources, and chooses the best of many.

Alignment follows Garg et al. (2019, https://arxiv.org/abs/1909.02074), section 3. The choice is minimum-Bayes-risk
decoding (Kumar and Byrne, 2004) as in Eikema and Aziz (2020, https://arxiv.org/abs/2005.10283) and Freitag et al.
(2022, https://arxiv.org/abs/2111.09388). Sizes in the comments:

    B sentences    S source tokens    T target tokens    N target tokens of all sentences
    H heads        d_model            V vocabulary
"""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from .decoding_arguments import refuse_other_ids, refuse_other_shape
from .network_loss import CHUNK, IGNORE_INDEX, decoder_inputs


@dataclass
class TranslationScores(ModelOutput):
    """
    The output of `score()`, in float32 or wider.

    Attributes:
        token_log_probs: natural logarithm of each target token's probability, 0 at padding, `[B, T]`.
        sequence_log_probs: their sums, end of the sentence included, `[B]`.
        perplexity: exp(-mean), `[B]`.
        tokens: number of tokens in sum and mean, `[B]`.
    """

    token_log_probs: torch.Tensor | None = None
    sequence_log_probs: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


@dataclass
class TranslationAlignments(ModelOutput):
    """
    The output of `align()`. Positions are columns of `input_ids` and `labels`, padding included, as in a tokenizer's
    `word_ids()`.

    Attributes:
        weights: attention weight of each source token when each target token is predicted, `[B, T, S]`, float32 or
            wider. A row sums to 1, end of the sentence included; rows of padding are 0.
        pairs: for each sentence a list of `(source, target)` positions, in target order: for each target token the
            source token with the largest weight. Special tokens are left out on both sides.
    """

    weights: torch.Tensor | None = None
    pairs: list[list[tuple[int, int]]] | None = None


def word_alignment(
    pairs: Sequence[tuple[int, int]], source_words: Sequence[int | None], target_words: Sequence[int | None]
) -> list[tuple[int, int]]:
    """
    Turns the subword pairs of one sentence into word pairs: two words are aligned if any of their subwords are.

    Args:
        pairs: `(source, target)` positions of subwords, one sentence of `align().pairs`.
        source_words: for each source subword the number of its word, None for special tokens: the tokenizer's
            `word_ids()`. To get words separated by white space, encode `text.split()` with `is_split_into_words=True`.
        target_words: likewise.

    Returns:
        `(source word, target word)`, each pair once, sorted.

    Raises:
        ValueError: a pair has a position beyond the word numbers.
    """
    for side, words, last in (
        ("source", source_words, max((source for source, _ in pairs), default=-1)),
        ("target", target_words, max((target for _, target in pairs), default=-1)),
    ):
        if last >= len(words):
            raise ValueError(
                f"pairs name {side} subword {last}, but {side}_words has {len(words)} entries: give the word_ids() of "
                "the ids that were aligned, padding and special tokens included"
            )
    linked = {(source_words[source], target_words[target]) for source, target in pairs}
    return sorted((source, target) for source, target in linked if source is not None and target is not None)


def to_pharaoh(pairs: Sequence[tuple[int, int]]) -> str:
    """Word pairs in the format of alignment tools, one sentence per line: "0-0 1-2", source first."""
    return " ".join(f"{source}-{target}" for source, target in pairs)


def sentence_chrf(hypothesis: str, reference: str) -> float:
    """
    chrF of one sentence (Popovic, 2015) by sacrebleu, 0 to 100.

    Raises:
        ImportError: sacrebleu is not installed.
    """
    # transformers checks the imports of a copy of this file on the Hub. `try` tells it that this one is optional.
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("chrF needs sacrebleu: `pip install sacrebleu`, or pass your own utility") from error
    return sacrebleu.sentence_chrf(hypothesis, [reference]).score


def minimum_bayes_risk(candidates: Sequence[str], utility: Callable[[str, str], float] | None = None) -> int:
    """
    Chooses the candidate that is most like the others on average: the one with the highest expected utility, where the
    candidates, drawn from the model, also serve as the possible references (Eikema and Aziz, 2020).

    Texts that were drawn more than once have more weight at no extra cost: `utility` is called once for each ordered
    pair of different texts.

    Args:
        candidates: translations of one sentence.
        utility: `utility(hypothesis, reference)`, higher is better. Default: `sentence_chrf`.

    Returns:
        The index of the best in `candidates`; of equals, the first.

    Raises:
        ValueError: there are no candidates.
    """
    if not candidates:
        raise ValueError("candidates is empty: minimum Bayes risk chooses among at least one")
    utility = utility or sentence_chrf
    counts = Counter(candidates)

    def total_utility(hypothesis: str) -> float:
        others = counts - Counter([hypothesis])
        # An exact sum, so that equals stay equal in whatever order they are added.
        return math.fsum(count * utility(hypothesis, reference) for reference, count in others.items())

    # The texts are in the order of their first occurrence, and `max` returns the first of equals.
    return candidates.index(max(counts, key=total_utility))


class VanillaTransformerScoringMixin(GenerationMixin):
    """
    `score()`, `align()` and `generate_minimum_bayes_risk()`.

    All three run in evaluation mode without gradients, and restore the model's mode afterwards.
    """

    @torch.no_grad()
    def score(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> TranslationScores:
        """
        Computes the probability that the model gives to these translations, without label smoothing.

        Args:
            input_ids: source tokens, `[B, S]`.
            attention_mask: 1 for source tokens, 0 for padding, `[B, S]`. Default: all but `pad_token_id`.
            labels: target tokens, without the decoder's start and with the end of the sentence, `[B, T]`: the
                tokenizer's ids of `text_target`, or `generate(...)[:, 1:]`. Ignored as padding are -100, `pad_token_id`
                before the first and after the last token, and everything after the end of the sentence.

        Returns:
            `TranslationScores`, on the model's device.

        Raises:
            ValueError: shapes do not match, an id is outside the vocabulary, a row of `labels` has no token, or
                `labels` begin with the decoder's start.
        """
        with _left_as_found(self):
            outputs, labels, counted = self._decode_forced(input_ids, attention_mask, labels)
            token_log_probs = self._log_probs(outputs.last_hidden_state, labels, counted)  # [B, T]
        sums, tokens = token_log_probs.sum(dim=1), counted.sum(dim=1)
        return TranslationScores(token_log_probs, sums, (-sums / tokens).exp(), tokens)

    @torch.no_grad()
    def align(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        layer: int | None = None,
    ) -> TranslationAlignments:
        """
        Aligns translations to their sources by the cross-attention of one decoder layer, averaged over its heads, while
        it predicts each token of `labels`. Works with every attention implementation.

        The hard alignment takes the source token with the largest weight, special tokens excluded, as in fairseq's
        `extract_hard_alignment`.

        Args:
            input_ids, attention_mask, labels: as `score` takes them.
            layer: the decoder layer, counted from 0, or from the end if negative. Default: the last but one, which Garg
                et al. (2019) found best, or the only one.

        Returns:
            `TranslationAlignments`: weights `[B, T, S]` and pairs.

        Raises:
            ValueError: as in `score`, or the layer does not exist.
        """
        outputs, labels, counted = _eager_twin(self)._decode_forced(
            input_ids, attention_mask, labels, output_attentions=True
        )
        layers = outputs.cross_attentions
        if layer is None:
            layer = max(len(layers) - 2, 0)
        if not -len(layers) <= layer < len(layers):
            raise ValueError(f"layer={layer}: the decoder has {len(layers)} layers, choose 0 to {len(layers) - 1}")
        weights = _widened(layers[layer]).mean(dim=1) * counted[..., None]  # [B, T, S]
        source = input_ids.to(weights.device)
        readable = self._source_mask(source, attention_mask).bool() & ~self._is_special(source)
        wanted = counted & ~self._is_special(labels) & readable.any(dim=1, keepdim=True)
        best = weights.masked_fill(~readable[:, None], -1).argmax(dim=-1)  # [B, T]
        pairs = [
            [(place, column) for column, place in enumerate(places) if keep[column]]
            for places, keep in zip(best.tolist(), wanted.tolist(), strict=True)
        ]
        return TranslationAlignments(weights, pairs)

    @torch.no_grad()
    def generate_minimum_bayes_risk(
        self,
        tokenizer: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_samples: int = 32,
        utility: Callable[[str, str], float] | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """
        Draws translations of each sentence from the model and chooses the one most like the others
        (`minimum_bayes_risk`). Reproducible with `torch.manual_seed`.

        Args:
            tokenizer: turns ids into the texts that `utility` compares.
            input_ids: source tokens, `[B, S]`.
            attention_mask: 1 for source tokens, 0 for padding, `[B, S]`. Default: as in `generate`.
            num_samples: translations to draw for each sentence. B times as many are decoded at once.
            utility: `utility(hypothesis, reference)`, higher is better. Default: `sentence_chrf`. There are up
                to `num_samples` squared comparisons for each sentence, each of which takes chrF 0.2 to 0.5 ms.
            options: other arguments of `generate`, such as `temperature`, `top_p`, `epsilon_cutoff`. By default samples
                come from the whole distribution: `top_k` is 0, not 50 as in transformers.

        Returns:
            The chosen sequences, beginning with the decoder's start, `[B, T]`.

        Raises:
            ValueError: `num_samples` is below 1.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        with _left_as_found(self):
            drawn = self.generate(
                input_ids,
                attention_mask=attention_mask,
                do_sample=True,
                num_beams=1,
                num_return_sequences=num_samples,
                return_dict_in_generate=False,
                **{"top_k": 0, **options},
            )  # [B * num_samples, T]
        texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
        rows = range(0, len(texts), num_samples)
        best = [row + minimum_bayes_risk(texts[row : row + num_samples], utility) for row in rows]
        chosen = drawn[best]
        longest = (chosen != self.config.pad_token_id).any(dim=0).nonzero().max() + 1
        return chosen[:, :longest]

    def _decode_forced(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[ModelOutput, torch.Tensor, torch.Tensor]:
        """Runs the base model on a given target. Returns its outputs, the target, and which tokens count, `[B, T]`."""
        if labels is None:
            raise ValueError("labels is missing: give the target tokens, [B, T]")
        self._check(input_ids, attention_mask, labels)
        input_ids, labels = input_ids.to(self.device), labels.to(self.device)
        counted = self._target_places(labels)
        labels = labels.masked_fill(~counted, IGNORE_INDEX)
        decoder_input_ids, decoder_attention_mask = decoder_inputs(
            labels, self.config.pad_token_id, self.config.decoder_start_token_id
        )
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=self._source_mask(input_ids, attention_mask),
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            use_cache=False,
            return_dict=True,
            **kwargs,
        )
        # A model spread over several devices ends on another device than it begins.
        device = outputs.last_hidden_state.device
        return outputs, labels.to(device), counted.to(device)

    def _target_places(self, labels: torch.Tensor) -> torch.Tensor:
        """Which labels are target tokens and not padding, `[B, T]`."""
        start = self.config.decoder_start_token_id
        token = (labels != IGNORE_INDEX) & (labels != self.config.pad_token_id)
        begun = token.cumsum(dim=1) > 0
        unfinished = token.flip(1).cumsum(dim=1).flip(1) > 0
        # transformers' beam search pads with the end of the sentence if the padding token is 0.
        end = torch.isin(labels, labels.new_tensor(self._eos_ids())).long()
        after_end = end.cumsum(dim=1) - end > 0
        counted = begun & unfinished & ~after_end & (labels != IGNORE_INDEX)
        if not counted.any(dim=1).all():
            row = counted.any(dim=1).long().argmin()
            raise ValueError(f"labels: row {row} has no token; even an empty translation has its end of sentence")
        if (labels[counted & (counted.cumsum(dim=1) == 1)] == start).all() and start not in self._eos_ids():
            raise ValueError(
                f"labels begin with decoder_start_token_id={start}: leave it out, as in generate(...)[:, 1:]"
            )
        return counted

    def _log_probs(self, hidden_states: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the counted labels, 0 elsewhere, `[B, T]`, computed in chunks of rows."""
        head = self.get_output_embeddings()
        log_probs = _widened(torch.zeros_like(labels, dtype=hidden_states.dtype))
        log_probs[counted] = torch.cat(
            [
                -F.cross_entropy(_widened(head(states)).to(true.device), true, reduction="none")
                for states, true in zip(
                    hidden_states[counted].split(CHUNK),  # [N, d_model]
                    labels[counted].split(CHUNK),
                    strict=True,
                )
            ]
        )
        return log_probs

    def _source_mask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if attention_mask is None:
            return (input_ids != self.config.pad_token_id).long()
        return attention_mask.to(input_ids.device)

    def _is_special(self, ids: torch.Tensor) -> torch.Tensor:
        config = self.config
        special = [config.pad_token_id, config.decoder_start_token_id, *self._eos_ids()]
        special += [] if config.bos_token_id is None else [config.bos_token_id]
        return torch.isin(ids, ids.new_tensor(special))

    def _eos_ids(self) -> list[int]:
        eos = self.config.eos_token_id
        if eos is None:
            return []
        return eos if isinstance(eos, list) else [eos]

    def _check(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor) -> None:
        if input_ids.dim() != 2 or labels.dim() != 2 or len(input_ids) != len(labels):
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)} and labels {list(labels.shape)}: they must be [B, S] and "
                "[B, T], with a row for each sentence"
            )
        if attention_mask is not None:
            refuse_other_shape("attention_mask", attention_mask, "input_ids", input_ids)
        refuse_other_ids("input_ids", input_ids, self.config.vocab_size)
        refuse_other_ids("labels", labels[labels != IGNORE_INDEX], self.config.decoder_vocab_size)


def _widened(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def _left_as_found(model: Any) -> Iterator[None]:
    """Sets evaluation mode, and afterwards restores the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _eager_twin(model: Any) -> Any:
    """
    A copy of the model in evaluation mode with eager attention, which returns its weights. Modules and config are
    copied, because other threads may use the model meanwhile. The parameters are shared.
    """
    weights = itertools.chain(model.parameters(), model.buffers())
    twin = copy.deepcopy(model, {id(weight): weight for weight in weights}).eval()
    twin.set_attn_implementation("eager")
    return twin

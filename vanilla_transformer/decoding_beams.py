"""Beam search, beam sampling and diverse beam search on packed networks.

The arithmetic is that of transformers' `GenerationMixin._beam_search`, ties included. It avoids what is slow there:
copies of all inputs for each beam, reordering the caches at every step, and computing sentences long after they have
ended. Sizes: B sentences, W beams, K candidates, S source and T target tokens, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from transformers.generation import GenerateBeamEncoderDecoderOutput

from .decoding_job import SearchJob
from .decoding_steps import Decoder, StepRecord, worth_leaving
from .engine_cache import rows_of
from .engine_packed import PackedTransformer


# Added to the score of whatever must never be chosen (the same value as in transformers).
NEVER = -1.0e9


# For smaller vocabularies torch's top-k is as fast.
_CHUNKED_VOCABULARY, _CHUNK = 2048, 64


def top_of_rows(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `torch.topk` over the last dimension, `[rows, V]` -> values and indices `[rows, k]`, for k much smaller than V.

    The k highest values of a row lie in the k chunks with the highest maxima, and maxima are cheap.
    """
    vocabulary = scores.shape[1]
    if vocabulary < max(_CHUNKED_VOCABULARY, 4 * k * _CHUNK):
        return scores.topk(min(k, vocabulary))
    even = vocabulary // _CHUNK * _CHUNK
    chunks = scores[:, :even].unflatten(1, (-1, _CHUNK))  # [rows, chunks, 64]
    best = chunks.amax(dim=2).topk(k).indices  # [rows, k]
    inside = torch.arange(_CHUNK, device=scores.device)
    indices = (best[:, :, None] * _CHUNK + inside).flatten(1)  # [rows, k * 64]
    tail = torch.arange(even, vocabulary, device=scores.device).expand(len(scores), -1)
    indices = torch.cat([indices, tail], dim=1)
    values, places = scores.gather(1, indices).topk(k)
    return values, indices.gather(1, places)


def _sunk(scores: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The scores, lowered by `NEVER` where `where` is true. (`where * NEVER` would have torch's default dtype.)"""
    return torch.where(where, scores + NEVER, scores)


class _Candidates(NamedTuple):
    """Possible next tokens, each `[rows, K]`: log-probability of the whole hypothesis, its parent beam, the token."""

    scores: torch.Tensor
    parents: torch.Tensor
    tokens: torch.Tensor

    def take(self, places: torch.Tensor) -> "_Candidates":
        """The candidates at these places, `[rows, n]`."""
        return _Candidates(*(field.gather(1, places) for field in self))


def _continuations(log_probs: torch.Tensor, scores: torch.Tensor, k: int, do_sample: bool) -> _Candidates:
    """The K most likely continuations, or K samples: `log_probs` `[rows, W, V]`, `scores` of the beams `[rows, W]`."""
    rows, width, vocabulary = log_probs.shape
    if do_sample:
        total = (log_probs + scores[:, :, None]).flatten(1)
        indices = torch.multinomial(total.softmax(dim=-1), num_samples=k)
        return _Candidates(total.gather(1, indices), indices // vocabulary, indices % vocabulary)
    values, tokens = top_of_rows(log_probs.flatten(0, 1), k)
    values, tokens = values.view(rows, width, -1) + scores[:, :, None], tokens.view(rows, -1)
    per_beam = values.shape[2]
    best, places = values.flatten(1).topk(k)
    return _Candidates(best, places // per_beam, tokens.gather(1, places))


class _Beams:
    """
    The state of a beam search: `w` running and `w` finished hypotheses in every row. A row is a sentence, or a group of
    a sentence's beams (diverse beam search). The arithmetic is transformers' `_beam_search`, ties included.
    """

    def __init__(self, job: SearchJob):
        config, ids = job.config, job.input_ids
        self.job, self.config = job, config
        self.groups = config.num_beam_groups or 1
        if config.num_beams % self.groups:
            raise ValueError(f"num_beams={config.num_beams} cannot be divided into num_beam_groups={self.groups}")
        self.width = config.num_beams // self.groups
        self.prefix_length = self.length = ids.shape[1]
        eos = config._eos_token_tensor
        self.eos = eos
        self.k = max(2, 1 + (len(eos) if eos is not None else 0)) * self.width
        rows = len(ids) * self.groups
        empty = ids.new_full((rows, self.width, config.max_length), job.fill)
        empty[:, :, : self.length] = ids.repeat_interleave(self.groups, dim=0)[:, None]

        self.running = empty[:, :, : self.length].clone()
        self.scores = torch.zeros(rows, self.width, dtype=torch.float32, device=ids.device)
        # All beams are equal at first, so only the first one may be continued.
        self.scores[:, 1:] = NEVER
        # For each beam and step, the beam of the batch that it continued. Recorded only if the caller wants it.
        self.lineage = ids.new_empty(rows, self.width, 0, dtype=torch.int32) if config.return_dict_in_generate else None

        self.finished = empty
        self.finished_scores = torch.full_like(self.scores, NEVER)
        self.finished_lengths = torch.full((rows, self.width), self.length, device=ids.device)
        self.is_finished = torch.zeros(rows, self.width, dtype=torch.bool, device=ids.device)
        self.finished_lineage = None
        if self.lineage is not None:
            steps = config.max_length - self.length
            self.finished_lineage = ids.new_full((rows, self.width, steps), -1, dtype=torch.int32)
        # Whether a row's running hypotheses can still beat its finished ones.
        self.improvable = torch.ones(rows, 1, dtype=torch.bool, device=ids.device)
        self.is_done = torch.zeros(rows, dtype=torch.bool, device=ids.device)
        self.sentences = torch.arange(len(ids), device=ids.device)

    def grow(self, log_probs: torch.Tensor, attended: torch.Tensor | None, scores_so_far: Any) -> torch.Tensor:
        """
        Takes one step: continues, finishes or drops hypotheses, given `log_probs` `[B, W, V]` of the next tokens.

        Returns:
            The parent beams of the new running hypotheses, `[B, W]`. The new tokens are the last of `self.running`.
        """
        if self.groups == 1:
            candidates = self._candidates(log_probs, self.scores)
        else:
            candidates = self._diverse_candidates(log_probs)
        ends = self._ends(candidates, scores_so_far)
        chosen = candidates._replace(scores=_sunk(candidates.scores, ends))
        chosen = chosen.take(chosen.scores.topk(self.width).indices)
        if ends[:, : self.width].any():
            self._finish(candidates, ends, attended)
        if self.job.options.required is not None:
            self.job.options.required.advance(chosen.parents, chosen.tokens)
        self.scores = chosen.scores
        self.running = self._continued(self.running, chosen, chosen.tokens)
        if self.lineage is not None:
            self.lineage = self._continued(self.lineage, chosen, self._beams_of_batch(chosen.parents))
        self.length += 1
        self._judge(ends)
        return self._beams_of_sentence(chosen.parents)

    def _candidates(self, log_probs: torch.Tensor, scores: torch.Tensor) -> _Candidates:
        if self.job.options.required is not None:
            is_last = self.length + 1 >= self.config.max_length
            return _Candidates(*self.job.options.required.candidates(log_probs, scores, self.k, self.eos, is_last))
        return _continuations(log_probs, scores, self.k, self.config.do_sample)

    def _diverse_candidates(self, log_probs: torch.Tensor) -> _Candidates:
        """Penalises tokens that earlier groups have chosen in this step (Vijayakumar et al., 2018)."""
        sentences, _, vocabulary = log_probs.shape
        log_probs = log_probs.view(sentences, self.groups, self.width, vocabulary)
        scores = self.scores.view(sentences, self.groups, self.width)
        chosen_before = log_probs.new_zeros(sentences, vocabulary)
        found = []
        for group in range(self.groups):
            penalised = log_probs[:, group] - self.config.diversity_penalty * chosen_before[:, None]
            candidates = _continuations(penalised, scores[:, group], self.k, do_sample=False)
            scores_to_go_on = _sunk(candidates.scores, self.job.is_eos(candidates.tokens))
            tokens = candidates.tokens.gather(1, scores_to_go_on.topk(self.width).indices)
            chosen_before.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=chosen_before.dtype))
            found.append(candidates)
        fields = zip(*found, strict=True)
        return _Candidates(*(torch.stack(field, dim=1).flatten(0, 1) for field in fields))

    def _ends(self, candidates: _Candidates, scores_so_far: Any) -> torch.Tensor:
        """Which candidates end their hypothesis, `[rows, K]`."""
        if self.job.ends_by_itself:
            if self.length + 1 >= self.config.max_length:
                return torch.ones_like(candidates.tokens, dtype=torch.bool)
            return self.job.is_eos(candidates.tokens)
        sequences = self._continued(self.running, candidates, candidates.tokens)
        return self.job.criteria(sequences.flatten(0, 1), scores_so_far).view(candidates.tokens.shape)

    def _continued(self, states: torch.Tensor, candidates: _Candidates, new: torch.Tensor) -> torch.Tensor:
        """The parents' `states` `[rows, W, n]` for each candidate, with `new` appended."""
        states = states.take_along_dim(candidates.parents[:, :, None], dim=1)
        return torch.cat([states, new[:, :, None].to(states.dtype)], dim=2)

    def _finish(self, candidates: _Candidates, ends: torch.Tensor, attended: torch.Tensor | None) -> None:
        """Moves candidates that end to the finished hypotheses if they are better than those."""
        ends = ends.clone()
        # Candidates after the first W only replace those that end. They cannot end themselves.
        ends[:, self.width :] = False
        new_length = self.length + 1 - self.prefix_length
        scores = candidates.scores / self.job.options.length_penalty(new_length, self.config.length_penalty)
        if attended is not None:
            scores = scores + self._coverage(attended).gather(1, candidates.parents)
        full = self.is_finished.all(dim=1, keepdim=True) & (self.config.early_stopping is True)
        scores = _sunk(scores, full | ~self.improvable | ~ends)

        scores = torch.cat([self.finished_scores, scores], dim=1)
        self.finished_scores, places = scores.topk(self.width)
        old = places.clamp(max=self.width - 1)
        is_new = places >= self.width
        place_of_new = (places - self.width).clamp(min=0)
        new = candidates.take(place_of_new)

        def merged(finished: torch.Tensor, running: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
            result = finished.take_along_dim(old[:, :, None], dim=1)
            continued = self._continued(running, new, last)
            size = continued.shape[2]
            result[:, :, :size] = torch.where(is_new[:, :, None], continued, result[:, :, :size])
            return result

        self.finished = merged(self.finished, self.running, new.tokens)
        if self.lineage is not None:
            assert self.finished_lineage is not None
            self.finished_lineage = merged(self.finished_lineage, self.lineage, self._beams_of_batch(new.parents))
        self.finished_lengths = torch.where(is_new, self.length + 1, self.finished_lengths.gather(1, old))
        self.is_finished = torch.where(is_new, ends.gather(1, place_of_new), self.is_finished.gather(1, old))

    def _coverage(self, attended: torch.Tensor) -> torch.Tensor:
        """beta * sum_i log(min(sum_j p_ij, 1)) of each beam, `[rows, w]`. Padding does not count."""
        total = attended.clamp(max=1.0)  # [B, W, S]
        mask = self.job.source_mask
        if mask is not None:
            total = total.masked_fill(mask[self.sentences][:, None] == 0, 1.0)
        penalty = self.job.options.coverage_penalty * total.clamp(min=1e-10).log().sum(dim=-1)
        return penalty.expand(-1, self.groups * self.width).reshape(-1, self.width)

    def _judge(self, ends: torch.Tensor) -> None:
        """Updates `improvable` and `is_done` by transformers' heuristics for `early_stopping`."""
        config = self.config
        if self.is_finished.any():
            new_length = self.length - self.prefix_length
            if config.early_stopping == "never" and config.length_penalty > 0.0:
                new_length = config.max_length - self.prefix_length
            best = self.scores[:, :1] / self.job.options.length_penalty(new_length, config.length_penalty)
            worst = self.finished_scores.amin(dim=1, keepdim=True)
            worst = torch.where(self.is_finished, worst, NEVER)
            self.improvable &= (best > worst).any(dim=-1, keepdim=True)
        full = self.is_finished.all(dim=1) & (config.early_stopping is True)
        self.is_done |= ~self.improvable[:, 0] | full | ends.all(dim=1)

    def _beams_of_sentence(self, parents: torch.Tensor) -> torch.Tensor:
        """Beam numbers within a row, `[rows, w]`, as numbers within the sentence, `[B, W]`."""
        if self.groups == 1:
            return parents
        offsets = torch.arange(self.groups, device=parents.device)[:, None] * self.width
        return (parents.view(-1, self.groups, self.width) + offsets).flatten(1)

    def _beams_of_batch(self, parents: torch.Tensor) -> torch.Tensor:
        """Beam numbers within a row, `[rows, n]`, as transformers counts them: over the original batch."""
        return rows_of(self.sentences, self.groups)[:, None] * self.width + parents

    def done_sentences(self) -> torch.Tensor:
        """`[B]`, true where all of a sentence's rows are done."""
        return self.is_done.view(-1, self.groups).all(dim=1)

    def keep(self, sentences: torch.Tensor) -> None:
        """Keeps only these sentences, given by their rows."""
        rows = rows_of(sentences, self.groups)
        for name in _STATES_OF_ROWS:
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[rows])
        self.sentences = self.sentences[sentences]

    def results(self, sentences: torch.Tensor) -> list[torch.Tensor | None]:
        """The finished sequences, scores, lengths and lineage, `[sentences, W, ...]`, best first."""
        fields = (self.finished, self.finished_scores, self.finished_lengths, self.finished_lineage)
        own = [None if field is None else field.unflatten(0, (-1, self.groups)).flatten(1, 2) for field in fields]
        order = own[1].sort(dim=1, descending=True, stable=True).indices  # type: ignore[union-attr]
        results: list[torch.Tensor | None] = []
        for field in own:
            if field is not None:
                field = field.take_along_dim(order if field.dim() == 2 else order[:, :, None], dim=1)[sentences]
            results.append(field)
        return results


_STATES_OF_ROWS = (
    "running", "scores", "lineage", "finished", "finished_scores", "finished_lengths", "finished_lineage",
    "is_finished", "improvable", "is_done",
)  # fmt: skip


def search_beams(job: SearchJob, engines: list[PackedTransformer]) -> torch.Tensor | GenerateBeamEncoderDecoderOutput:
    """Beam search, beam sampling and diverse beam search (transformers: `_beam_search`)."""
    config, width = job.config, job.config.num_beams
    beams, decoder, record = _Beams(job), Decoder(job, engines, width, beams=True), StepRecord(config)
    collected: list[tuple[torch.Tensor, list[torch.Tensor | None]]] = []
    buffer = job.input_ids.new_empty(0, dtype=torch.float32)
    # Before the first choice each sentence has one hypothesis.
    tokens = job.input_ids[:, -1:]
    while True:
        # 1. log-probabilities of the next tokens
        logits = decoder.step(tokens)  # [B, 1 or W, V]
        logits = logits.expand(-1, width, -1).flatten(0, 1)  # [B * W, V]
        record.add_logits(logits)
        flat = beams.running.view(len(logits), -1)
        # Reuse the memory: allocating it at every step takes longer than filling it.
        buffer = buffer if buffer.shape == logits.shape else torch.empty_like(logits)
        log_probs = job.processed(torch.log_softmax(logits, dim=-1, out=buffer), flat)
        record.add_scores(log_probs)
        # 2. choose
        is_first = tokens.shape[1] == 1
        log_probs = log_probs.view(-1, width, log_probs.shape[1])
        parents = beams.grow(log_probs, decoder.attended, record.scores)
        done = beams.done_sentences()
        finished = int(done.sum())
        if finished == len(done):
            collected.append((beams.sentences, beams.results(torch.arange(len(done), device=done.device))))
            break
        # 3. drop finished sentences, continue the others
        decoder.move_beams(torch.zeros_like(parents) if is_first and width > 1 else parents)
        if job.may_leave and worth_leaving(finished, len(done)):
            gone, kept = done.nonzero().squeeze(1), (~done).nonzero().squeeze(1)
            collected.append((beams.sentences[gone], beams.results(gone)))
            beams.keep(kept)
            decoder.keep(kept)
        tokens = beams.running[:, :, -1].view(-1, width)
    return _collected(job, collected, record)


def _collected(
    job: SearchJob, collected: list[tuple[torch.Tensor, list[torch.Tensor | None]]], record: StepRecord
) -> torch.Tensor | GenerateBeamEncoderDecoderOutput:
    """The results of all sentences in their original order, in transformers' format."""
    order = torch.cat([sentences for sentences, _ in collected]).argsort()

    def joined(number: int) -> torch.Tensor | None:
        parts = [results[number] for _, results in collected]
        if parts[0] is None:
            return None
        return torch.cat([part[:, : job.config.num_return_sequences] for part in parts if part is not None])[order]

    sequences, sequences_scores, lengths, lineage = (joined(number) for number in range(4))
    assert sequences is not None
    assert lengths is not None
    result = beam_outputs(job, sequences, sequences_scores, lengths, lineage)
    if isinstance(result, GenerateBeamEncoderDecoderOutput):
        result.scores, result.logits = record.scores, record.logits
    return result


def beam_outputs(
    job: SearchJob,
    sequences: torch.Tensor,
    scores: torch.Tensor | None,
    lengths: torch.Tensor,
    lineage: torch.Tensor | None,
) -> torch.Tensor | GenerateBeamEncoderDecoderOutput:
    """In transformers' format: sequences `[B, n, T]`, scores and lengths `[B, n]`, lineage `[B, n, steps]`."""
    longest = int(lengths.max())
    sequences = sequences.flatten(0, 1)[:, :longest]
    if not job.config.return_dict_in_generate:
        return sequences
    assert scores is not None
    assert lineage is not None
    return GenerateBeamEncoderDecoderOutput(
        sequences=sequences,
        sequences_scores=scores.flatten(),
        beam_indices=lineage.flatten(0, 1)[:, : longest - job.input_ids.shape[1]],
    )

"""What both searches use: the decoding steps of a model or an ensemble, and the record of scores for the caller."""

import torch
from transformers import GenerationConfig

from .decoding_job import SearchJob
from .engine_cache import DecoderState
from .engine_packed import PackedTransformer


class Decoder:
    """Runs the models of an ensemble step by step, for `width` beams or independent outputs of each sentence."""

    def __init__(self, job: SearchJob, engines: list[PackedTransformer], width: int, beams: bool):
        prefix, prefix_mask = job.input_ids, job.prefix_mask
        padded = prefix_mask is not None and not bool(prefix_mask.all())
        self.engines = engines
        self.sentences = len(prefix)
        self.states: list[DecoderState] = [
            engine.start(engine.encode(job.source, job.source_mask), job.source_mask, width, beams, padded)
            for engine in engines
        ]
        self.attended: torch.Tensor | None = None  # the sum over target tokens, [B, W, S]
        self.watch_source = bool(job.options.coverage_penalty)
        self._read_prefix(prefix, prefix_mask if padded else None, 1 if beams else width)

    def _read_prefix(self, prefix: torch.Tensor, mask: torch.Tensor | None, width: int) -> None:
        for column in range(prefix.shape[1] - 1):
            tokens = prefix[:, column, None].expand(-1, width)
            padding = None if mask is None else mask[:, column] == 0
            for engine, state in zip(self.engines, self.states, strict=True):
                position = state.position
                engine.step(tokens, state, logits=False)
                if padding is not None:
                    state.target.hide_last(padding.repeat_interleave(len(state.target.keys[0]) // self.sentences))
                    state.position = position + (~padding)[:, None].long()

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens `[B, W]` -> logits `[B, W, V]`; for an ensemble, the log of the mean probabilities."""
        record: list[torch.Tensor] | None = [] if self.watch_source else None
        logits = [engine.step(tokens, state, record) for engine, state in zip(self.engines, self.states, strict=True)]
        if record:
            # Models may differ in their number of heads, so average over the heads of each first.
            now = torch.stack([weights.mean(dim=1) for weights in record]).mean(dim=0)  # [B, W, S]
            self.attended = now if self.attended is None else self.attended + now
        if len(logits) == 1:
            return logits[0]
        mean = torch.stack([each.softmax(dim=-1) for each in logits]).mean(dim=0)
        return mean.log()

    def move_beams(self, parents: torch.Tensor) -> None:
        """Makes hypothesis w of each sentence continue hypothesis `parents[:, w]`; `parents` is `[B, W]`."""
        for state in self.states:
            state.target.move_beams(parents)
        if self.attended is not None:
            self.attended = self.attended.take_along_dim(parents[:, :, None], dim=1)

    def keep(self, sentences: torch.Tensor) -> None:
        """Keeps only these sentences."""
        for state in self.states:
            state.keep(sentences)
        if self.attended is not None:
            self.attended = self.attended[sentences]
        self.sentences = len(sentences)


def worth_leaving(finished: int, sentences: int) -> bool:
    """Whether dropping `finished` of `sentences` sentences from the batch saves time."""
    # Dropping copies the caches of the others, which takes as long as a few steps of an eighth of the batch.
    return finished * 8 >= sentences


class StepRecord:
    """The scores and logits of each step, if the caller wants them."""

    def __init__(self, config: GenerationConfig):
        self.logits: tuple[torch.Tensor, ...] | None = () if config.output_logits else None
        self.scores: tuple[torch.Tensor, ...] | None = () if config.output_scores else None

    def add_logits(self, logits: torch.Tensor) -> None:
        """Records the model's logits, `[rows, V]`."""
        if self.logits is not None:
            self.logits += (logits.clone(),)

    def add_scores(self, scores: torch.Tensor) -> None:
        """Records the scores after the processors, `[rows, V]`."""
        if self.scores is not None:
            self.scores += (scores.clone(),)

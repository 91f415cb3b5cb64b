"""Greedy search and sampling on packed networks, with the results of transformers' `GenerationMixin._sample`.

It avoids what is slow there: copying the growing cache at every step, and computing sentences long after they have
ended. Sizes: B sentences, W outputs of each, T target tokens, V vocabulary.
"""

import torch
from transformers.generation import GenerateEncoderDecoderOutput

from .decoding_job import SearchJob
from .decoding_steps import Decoder, StepRecord, worth_leaving
from .engine_packed import PackedTransformer


def search_rows(job: SearchJob, engines: list[PackedTransformer]) -> torch.Tensor | GenerateEncoderDecoderOutput:
    """Greedy search, or sampling `num_return_sequences` outputs of each sentence (transformers: `_sample`)."""
    config, width, pad = job.config, job.config.num_return_sequences, job.config._pad_token_tensor
    ids = job.input_ids.repeat_interleave(width, dim=0)  # [B * W, T]
    longest = max(config.max_length, job.criteria.max_length or 0)  # a user's criterion may have a different length
    outputs = ids.new_full((len(ids), longest), job.fill)
    rows = torch.arange(len(ids), device=ids.device)  # the row in `outputs` of each row of the batch
    unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    decoder, record = Decoder(job, engines, width, beams=False), StepRecord(config)
    has_eos = any(hasattr(criterion, "eos_token_id") for criterion in job.criteria)
    while True:
        # 1. score the next tokens
        logits = decoder.step(ids[:, -1].view(-1, width)).flatten(0, 1)  # [B * W, V]
        record.add_logits(logits)
        logits = job.processed(logits, ids)
        record.add_scores(logits)
        # 2. choose
        if config.do_sample:
            chosen = torch.multinomial(logits.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            chosen = logits.argmax(dim=-1)
        if has_eos:
            chosen = torch.where(unfinished, chosen, pad)
        ids = torch.cat([ids, chosen[:, None]], dim=1)
        if job.streamer is not None:
            job.streamer.put(chosen.cpu())
        # 3. end
        unfinished = unfinished & _may_go_on(ids, job, record.scores)
        remaining = int(unfinished.sum())
        some_leave = job.may_leave and worth_leaving(len(rows) - remaining, len(rows))
        if remaining == 0 or some_leave:
            outputs[rows, : ids.shape[1]] = ids
        if remaining == 0:
            break
        if some_leave:
            kept = unfinished.nonzero().squeeze(1)
            decoder.keep(kept)
            rows, ids, unfinished = rows[kept], ids[kept], unfinished[kept]

    if job.streamer is not None:
        job.streamer.end()
    outputs = outputs[:, : ids.shape[1]]
    if not config.return_dict_in_generate:
        return outputs
    return GenerateEncoderDecoderOutput(sequences=outputs, scores=record.scores, logits=record.logits)


def _may_go_on(ids: torch.Tensor, job: SearchJob, scores: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
    """Which outputs `[rows, T]` have not ended with their last token."""
    if not job.ends_by_itself:
        return ~job.criteria(ids, scores)
    if ids.shape[1] >= job.config.max_length:
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    return ~job.is_eos(ids[:, -1])

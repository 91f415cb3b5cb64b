"""Compares the losses of contenders after the same number of tokens."""

from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from .cells import SENTENCES


def measure_losses(trainer: Any, folder: Path, loss_tokens: int) -> dict[str, Any]:
    """Trains for `loss_tokens` target tokens, to the end of the update that reaches them."""

    class Limit(TrainerCallback):
        """Counts target tokens, and stops at the limit."""

        tokens = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.tokens += sum(target for _, target in trainer.data_collator.batches.popleft())
            control.should_training_stop = self.tokens >= loss_tokens

    limit = Limit()
    trainer.add_callback(limit)
    rows = load_from_disk(folder / "validation")
    before = validation_loss(trainer, rows)
    trainer.train()
    after = validation_loss(trainer, rows)
    return {"tokens": limit.tokens, "updates": trainer.state.global_step, "before": before, "after": after}


def validation_loss(trainer: Any, rows: Any) -> dict[str, float]:
    """
    Nats per target token of `rows`, plain and smoothed. The computation is the same for all contenders: float32, no
    dropout, `torch.nn.functional.cross_entropy`.
    """
    # Removes training's autocast.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    collate = DataCollatorForSeq2Seq(trainer.processing_class)
    smoothings = {"nll": 0.0, "smoothed": trainer.args.label_smoothing_factor or model.config.label_smoothing}
    totals, count = dict.fromkeys(smoothings, 0.0), 0
    for start_row in range(0, len(rows), SENTENCES):
        batch = collate(list(rows.select(range(start_row, min(start_row + SENTENCES, len(rows))))))
        batch = batch.to(trainer.args.device)
        labels = batch.pop("labels")
        inputs = model.prepare_decoder_input_ids_from_labels(labels)
        with torch.no_grad():
            logits = model(**batch, decoder_input_ids=inputs).logits.flatten(0, 1)
        for name, smoothing in smoothings.items():
            losses = F.cross_entropy(logits, labels.flatten(), label_smoothing=smoothing, reduction="sum")
            totals[name] += losses.item()
        count += int(labels.ne(-100).sum())
    return {name: total / count for name, total in totals.items()}

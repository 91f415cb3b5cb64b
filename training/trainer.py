"""transformers' `Seq2SeqTrainer` with an evaluation that reports the true negative log-likelihood."""

import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, EvalPrediction, PreTrainedModel, Seq2SeqTrainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from .arguments import TrainingArguments
from .batching import TokenBudgetBatches, token_budget
from .metrics import TranslationMetrics


class TranslationTrainer(Seq2SeqTrainer):
    """
    Trains as `Seq2SeqTrainer` does. Its evaluation loss is nats per target token over the whole set, where the stock
    loop averages over sentences the means of their batches, and its perplexity is reported beside it.
    """

    def _get_train_sampler(self, train_dataset=None):
        """Batches of a token budget, where the arguments ask for them."""
        if self.args.train_sampling_strategy != "token_budget":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self._batches = self._token_budget(self.train_dataset, self.args.per_device_train_batch_tokens, seed=seed)
        return self._batches

    def _get_eval_sampler(self, eval_dataset):
        """The longest rows first, as many at a time as the budget holds."""
        return self._token_budget(eval_dataset, self.args.per_device_eval_batch_tokens, shuffle=False)

    def _token_budget(self, dataset, max_tokens: int, **options) -> TokenBudgetBatches:
        world = {"num_processes": self.args.world_size, "process_index": self.args.process_index}
        return token_budget(dataset, max_tokens, **world, **options)

    def get_test_dataloader(self, test_dataset):
        """The rows of `predict()` keep their order, since its predictions are matched with them."""
        return self._get_dataloader(
            test_dataset, "test", self.args.eval_batch_size, sampler_fn=super()._get_eval_sampler
        )

    def _run_epoch(self, *, epoch: int, **kwargs):
        """Tells the sampler its epoch, which the stock loop forgets in the epoch that a run resumes in."""
        if self.args.train_sampling_strategy == "token_budget":
            self._batches.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None, **gen_kwargs
    ):
        """Adds up the batch's negative log-likelihood and its target tokens."""
        # The stock step writes transformers' defaults into the model's generation config, a max_length of 20 too.
        generation_config = copy.deepcopy(self.model.generation_config)
        loss, tokens, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        self.model.generation_config = generation_config
        count = inputs["labels"].ne(-100).sum()
        self._nll_and_count += torch.stack([loss.double() * count, count.double()])
        return loss, tokens, labels

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """The stock loop, with the loss of the whole set in place of its own average."""
        self._nll_and_count = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output: EvalLoopOutput = super().evaluation_loop(
            dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        nll, count = self.accelerator.reduce(self._nll_and_count, reduction="sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = nll / count
        output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(nll / count)
        return output

    def _issue_warnings_after_load(self, load_result) -> None:
        """The best checkpoint stores shared tensors once: their other names are not missing."""
        tied = self.model.all_tied_weights_keys
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result)


def load_average(model: PreTrainedModel, folder: str, count: int) -> None:
    """
    Gives `model` the mean of the weights of the last `count` checkpoints in a run's folder (section 6.1).

    Args:
        model: the run's model; its weights are replaced.
        folder: the run's folder.
        count: how many; all of them if the run was too short for so many.
    """
    checkpoints = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    states = [type(model).from_pretrained(path).state_dict() for path in checkpoints[-count:]]
    mean = {name: torch.stack([state[name].double() for state in states]).mean(dim=0) for name in states[0]}
    model.load_state_dict(mean)


class Clock(TrainerCallback):
    """Adds the minutes of training so far to what is logged, so that curves can be drawn over time."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the clock, for a run that resumes at the minutes it had reached."""
        before = max((entry.get("minutes", 0) for entry in state.log_history), default=0)
        self.started = time.monotonic() - 60 * before

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Stamps the entry."""
        if state.log_history:
            state.log_history[-1]["minutes"] = round((time.monotonic() - self.started) / 60, 3)


def score_translations(tokenizer, bleu_tokenize: str):
    """The `compute_metrics` of a Trainer: decodes generated and true ids, and scores the text."""
    metrics = TranslationMetrics()

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        texts = [
            tokenizer.batch_decode(ids.clip(min=0), skip_special_tokens=True)  # -100, the padding, becomes pad
            for ids in (prediction.predictions, prediction.label_ids)
        ]
        scores = metrics.compute(predictions=texts[0], references=texts[1], tokenize=bleu_tokenize)
        return {name: value for name, value in scores.items() if not isinstance(value, str)}

    return compute_metrics


def callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """The callbacks that the arguments ask for."""
    patience = args.early_stopping_patience
    return [Clock()] + ([EarlyStoppingCallback(patience)] if patience is not None else [])

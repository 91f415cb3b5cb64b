"""transformers' `Seq2SeqTrainer` with an evaluation that reports the true negative log-likelihood."""

import copy
import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from huggingface_hub import CommitInfo
from torch import nn
from transformers import EvalPrediction
from transformers.trainer import FSDP_MODEL_NAME
from transformers.trainer_utils import EvalLoopOutput, HubStrategy
from transformers.utils import PushInProgress

from vanilla_transformer.network_loss import IGNORE_INDEX

from ..data.batching import TokenBudgetBatches, token_budget
from ..data.epochs import EpochRows
from ..errors import RecipeError
from ..metric_names import DEFAULT_METRICS
from ..metrics import TranslationMetrics, numbers
from ..publishing.hub import create_repository, push_checkpoint, push_run
from ..settings.rules import check_sharding
from .averaging import ExponentialMean
from .checkpoints import CheckpointError
from .r_drop import symmetric_divergence
from .simcut import cut_batch, cutting, divergence
from .streaming_trainer import StreamingTrainer


class TranslationTrainer(StreamingTrainer):
    """
    Trains like `Seq2SeqTrainer`. Its evaluation loss is the mean over all target tokens of the set, in nats; the stock
    loop averages the means of batches. The perplexity is reported too.

    Raises:
        RecipeError: `ema_decay` or `lora_rank` with a model that is sharded over the processes.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_sharding(self.args, self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self._batches = None
        decay = self.args.ema_decay
        self.ema = None if decay is None else ExponentialMean(decay)
        if self.ema:
            self.add_callback(self.ema)

    def _get_train_sampler(self, train_dataset=None):
        """Makes batches by a token budget, if the arguments ask for it."""
        if self.args.train_sampling_strategy != "token_budget":
            return super()._get_train_sampler(train_dataset)
        # Planned by lengths that are the same in each epoch, so that the number of batches is, too.
        budget = self.args.per_device_train_batch_tokens
        self._batches = self._token_budget(self.train_dataset, budget, seed=self.args.seed_of_data)
        return self._batches

    def _get_eval_sampler(self, eval_dataset):
        """Makes batches by the token budget of evaluation, the longest rows first."""
        return self._token_budget(eval_dataset, self.args.per_device_eval_batch_tokens, shuffle=False)

    def _token_budget(self, dataset, max_tokens: int, **options) -> TokenBudgetBatches:
        world = {"num_processes": self.args.world_size, "process_index": self.args.process_index}
        return token_budget(dataset, max_tokens, **world, **options)

    def get_test_dataloader(self, test_dataset):
        """Keeps the order of the rows, since the predictions of `predict()` are matched with them."""
        return self._get_dataloader(
            test_dataset, "test", self.args.eval_batch_size, sampler_fn=super()._get_eval_sampler
        )

    def _run_epoch(self, *, epoch: int, **kwargs):
        """Sets the epoch of sampler and data. The stock loop does not do this in a resumed run."""
        # The run had stopped early at the checkpoint that it resumes from.
        if self.control.should_training_stop:
            return
        if self._batches is not None:
            self._batches.set_epoch(epoch)
        if isinstance(self.train_dataset, EpochRows):
            self.train_dataset.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def _prepare_for_training(self, *args, **kwargs):
        """For a sharded model (FSDP2): leaves the embeddings in the outermost group."""
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        model, plugin = self.model, self.accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            # By default accelerate sums gradients, and returns the loss, in bfloat16.
            options = {"reduce_dtype": torch.float32, "output_dtype": None}
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, **options)
        # accelerate would put the embedding tables into a group of their own. But up to four of our modules share a
        # table, torch refuses a tensor in two groups, and the loss reads the output matrix without calling its module.
        model.get_input_embeddings = model.get_output_embeddings = lambda: None
        try:
            return super()._prepare_for_training(*args, **kwargs)
        finally:
            del model.get_input_embeddings, model.get_output_embeddings

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """
        Raises:
            RecipeError: the optimizer needs a package that is not installed, or does not have the given options.
        """
        try:
            return super().create_optimizer(*args, **kwargs)
        # Each library raises its own errors for unknown options and missing packages.
        except Exception as error:
            options = f" with optim_args={self.args.optim_args}" if self.args.optim_args else ""
            raise RecipeError(f"optim={self.args.optim.value}{options} cannot be used here: {error}") from error

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        """
        Raises:
            RecipeError: the schedule needs options that are not given, or does not have the given ones.
        """
        try:
            scheduler = super().create_scheduler(num_training_steps, optimizer)
            # Some wrong options fail only at the last update.
            for factor in getattr(scheduler, "lr_lambdas", []):
                factor(num_training_steps)
            return scheduler
        except (ArithmeticError, TypeError, ValueError) as error:
            name, options = self.args.lr_scheduler_type.value, self.args.lr_scheduler_kwargs
            raise RecipeError(
                f"lr_scheduler_type={name} does not work with lr_scheduler_kwargs={options} and warmup_steps="
                f"{self.args.warmup_steps:g} of {num_training_steps}: {error}"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """
        Loads the weights to resume from.

        Raises:
            RecipeError: they were written with FSDP and this run does not use it, or the reverse.
        """
        if Path(resume_from_checkpoint, f"{FSDP_MODEL_NAME}.bin").exists() != self.is_fsdp_enabled:
            written, now = ("without", "with") if self.is_fsdp_enabled else ("with", "without")
            raise RecipeError(
                f"{resume_from_checkpoint} was written {written} FSDP, but this run is {now} it: resume it with the "
                "command that started it"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss; in training, R-Drop or SimCut may be added (r_drop.py, simcut.py)."""
        # In evaluation, the mean over the process's own tokens. `prediction_step` turns it into a sum.
        num_items_in_batch = num_items_in_batch if model.training else None
        args = self.args
        if not (model.training and (args.r_drop_alpha or args.simcut_alpha)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if args.r_drop_alpha:
            twice = {name: torch.cat([value, value]) for name, value in inputs.items()} | {"return_logits": True}
            loss, outputs = super().compute_loss(model, twice, True, 2 * num_items_in_batch)
            weight, compared = args.r_drop_alpha / 2, symmetric_divergence(outputs.logits, inputs["labels"])
        else:
            twice, kept = cut_batch(inputs, self.model.config, args.simcut_p)
            with cutting(model, kept):
                loss, outputs = super().compute_loss(model, twice, True, num_items_in_batch)
            weight, compared = args.simcut_alpha, divergence(outputs.logits, inputs["labels"])
        # As in the stock loss: DDP averages over the processes, but the tokens were counted over all of them.
        processes = self.accelerator.num_processes if args.average_tokens_across_devices else 1
        loss = loss + weight * (processes * compared / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None, **gen_kwargs
    ):
        """The stock step; it also sums the negative log-likelihood and the number of target tokens."""
        # The stock step writes transformers' defaults, such as max_length=20, to the model's generation config. It is
        # restored in place, because with adapters it belongs to a model inside the model.
        generation_config = self.model.generation_config
        options = copy.deepcopy(vars(generation_config))
        loss, tokens, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        generation_config.__dict__ = options
        count = inputs["labels"].ne(IGNORE_INDEX).sum()
        self._nll_and_count += torch.tensor([float(loss) * int(count), int(count)], dtype=torch.float64)
        if self.args.world_size > 1 and tokens is not None:
            # The processes' batches may have different numbers of rows, and only equal shapes can be gathered.
            tokens, labels = self.accelerator.pad_across_processes((tokens, labels), dim=0, pad_index=IGNORE_INDEX)
        return None, tokens, labels

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """The stock loop. It reports the loss and perplexity over all target tokens of the set."""
        self._nll_and_count = torch.zeros(2, dtype=torch.float64)  # on the CPU: MPS has no float64
        output: EvalLoopOutput = super().evaluation_loop(
            dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        nll, count = torch.stack(gather_object([self._nll_and_count])).sum(dim=0).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = nll / count
        # For a loss above 709, torch's exp returns infinity, while math.exp raises an error.
        output.metrics[f"{metric_key_prefix}_perplexity"] = torch.tensor(nll / count, dtype=torch.float64).exp().item()
        return output

    def _evaluate(self, *args, **kwargs):
        """Evaluates the mean of the weights, if there is one."""
        with self.ema.in_place() if self.ema else nullcontext():
            return super()._evaluate(*args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        """Also saves the mean of the weights in a checkpoint. An internal call means a checkpoint."""
        super().save_model(output_dir, _internal_call)
        if self.ema and _internal_call and self.args.should_save:
            self.ema.save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Saves a shared tensor once. The weights gathered from a sharded model have it once for each of its names."""
        if state_dict is not None:
            tied = self.model.all_tied_weights_keys
            state_dict = {name: value for name, value in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        """Also loads the mean of the weights."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.ema and checkpoint is not None:
            self.ema.load(checkpoint)

    def _load_best_model(self) -> None:
        """Loads the best mean, if means are evaluated. The model gets it as its weights at the end of training."""
        if self.ema:
            self.ema.load(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result) -> None:
        """
        Raises an error where the stock method warns. Other names of a shared tensor, which is stored once, are not
        missing.

        Raises:
            CheckpointError: the tensors in the checkpoint are not those of the model.
        """
        tied = self.model.all_tied_weights_keys
        missing = [f"{name} is missing" for name in load_result.missing_keys if name not in tied]
        if wrong := missing + [f"{name} is unexpected" for name in load_result.unexpected_keys]:
            raise CheckpointError(f"the checkpoint has the weights of another model: {wrong[0]}")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Creates the repository for `push_to_hub=True` if it does not exist. This happens before the first update.

        Raises:
            HubError: the Hub cannot be reached or refuses.
        """
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            self.hub_model_id = create_repository(name, self.args.hub_private_repo)
            self.push_in_progress = None

    def push_to_hub(self, commit_message: str = "End of training", **kwargs) -> CommitInfo:
        """
        Pushes the run's folder. Call it when scores and model card have been written.

        Raises:
            HubError: as `push_run` does.
        """
        self._finish_current_push()
        return push_run(
            self.args.output_dir, self.hub_model_id, revision=self.args.hub_revision, message=commit_message
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes the checkpoint's model. The stock method pushes the whole folder, with a pickle of the arguments."""
        args = self.args
        # Adapters are pushed at the end, after merging: they are not a model by themselves.
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END or args.lora_rank:
            return
        before = self.push_in_progress or PushInProgress()
        under_way = [job for job in before.jobs if not job.done()]
        if under_way and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        message = f"Training in progress, update {self.state.global_step}"
        job = push_checkpoint(checkpoint_folder, self.hub_model_id, args.hub_revision, message)
        self.push_in_progress = PushInProgress([*under_way, job])


def score_translations(tokenizer, bleu_tokenize: str, metrics: Sequence[str] = DEFAULT_METRICS):
    """Returns the `compute_metrics` for a Trainer: it decodes generated and true ids, and scores the text."""
    scorer = TranslationMetrics()

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        rows = (prediction.label_ids != IGNORE_INDEX).any(axis=1)  # the other rows only pad a process's batch
        texts = [
            tokenizer.batch_decode(ids[rows].clip(min=0), skip_special_tokens=True)  # -100 (padding) becomes pad
            for ids in (prediction.predictions, prediction.label_ids)
        ]
        predictions, references = texts
        scores = scorer.compute(predictions=predictions, references=references, tokenize=bleu_tokenize, metrics=metrics)
        return numbers(scores)

    return compute_metrics

"""What each process does that test_distributed.py starts: `distributed_worker.py FOLDER PART ...`.

In float64, so that what two splits of the same work leave can be compared closely.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState
from conftest import TINY
from test_training import make_trainer, uneven_rows

from vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration
from vanilla_transformer.training.train import main


# How two processes can share the eight rows of one update: whole rows, then batches of a token budget. Accumulation
# over more batches than there are ends with the epoch.
SPLITS = {
    "4 x 1": {"per_device_train_batch_size": 4},
    "2 x 2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "2 x 2, checkpointed": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
    },
    "token budget": {
        "train_sampling_strategy": "token_budget", "per_device_train_batch_tokens": 12,
        "gradient_accumulation_steps": 8,
    },
}  # fmt: skip


def take_the_cpu_for_a_gpu() -> None:
    """accelerate shards models (FSDP2) on GPUs only, though torch can on CPUs: so the tests can."""
    torch.distributed.init_process_group("gloo")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def one_update(folder: Path, **options) -> dict[str, torch.Tensor]:
    """Of one update over eight uneven rows: loss, gradients, whether no logits were made, and eval_loss after it."""
    torch.manual_seed(0)
    model = VanillaTransformerForConditionalGeneration(VanillaTransformerConfig(**TINY, dropout=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        # Nothing ends a translation but its limit, the source's length + 50, which differs between processes.
        model.lm_head.bias[model.config.eos_token_id] = -30
    start = {name: value.clone() for name, value in model.state_dict().items()}
    fused = []
    model.register_forward_hook(lambda module, args, output: fused.append(output.logits is None))
    options = {"max_steps": 1, "logging_steps": 1, "per_device_eval_batch_tokens": 24, **options}
    trainer = make_trainer(model, uneven_rows(), folder, **options)
    trainer.train()
    found = {"fused": torch.tensor(fused)}
    (loss,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    trainer.compute_metrics = lambda prediction: {}  # without one the Trainer generates nothing
    found |= {"loss": torch.tensor(loss), "eval_loss": torch.tensor(trainer.evaluate()["eval_loss"])}
    end = trainer.accelerator.get_state_dict(trainer.model)
    # The first process alone has it all. A step of plain descent is the gradient times the learning rate.
    return found | {name: (start[name] - value) / trainer.args.learning_rate for name, value in end.items()}


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    folder, parts = Path(sys.argv[1]), sys.argv[2:]
    if os.environ.get("ACCELERATE_USE_FSDP"):
        take_the_cpu_for_a_gpu()
    if "run" in parts:
        main([str(folder / "recipe.yaml")])
    if "run, stop and resume" in parts:
        main([str(folder / "recipe.yaml"), "--max_steps", "10"])
        main([str(folder / "recipe.yaml"), "--resume_from_checkpoint", "last"])
    if "updates" in parts:
        found = {name: one_update(folder, **options) for name, options in SPLITS.items()}
        if os.environ["RANK"] == "0":
            torch.save(found, folder / "updates.pt")
    torch.distributed.destroy_process_group()

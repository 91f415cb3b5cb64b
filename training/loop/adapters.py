"""Low-rank adaptation (LoRA, Hu et al., 2021) of a trained model, with the library peft.

Each matrix W of the attention and of the feed-forward networks is replaced by W + B A. W is frozen, and the low-rank
matrices B and A are trained. At the end B A is added to W, so the model is an ordinary one again. Embeddings, output
matrix and norms are not trained.
"""

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from .trainer import TranslationTrainer


def add_adapters(model: PreTrainedModel, rank: int) -> PeftModel:
    """
    Adds an adapter to each projection and freezes all other weights. B starts at 0, so the output does not change.

    Args:
        model: a trained model; its layers are replaced in place.
        rank: the rank of B A. There is no further scale (`lora_alpha` equals the rank), only the learning rate.
    """
    config = LoraConfig(TaskType.SEQ_2_SEQ_LM, r=rank, lora_alpha=rank, target_modules="all-linear")
    return get_peft_model(model, config)


def merge_adapters(trainer: TranslationTrainer) -> None:
    """Merges the adapters of the trainer's model into its weights. The output does not change."""
    trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()

"""Low-rank adaptation (LoRA, Hu et al., 2021) of a trained model, by the library peft.

Every matrix W of the attention and of the feed-forward networks is trained as W + B A, with W frozen and B A of a low
rank; at the end W becomes W + B A, and the model is a plain one again. Embeddings, output matrix and norms stay.
"""

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from .trainer import TranslationTrainer


def add_adapters(model: PreTrainedModel, rank: int) -> PeftModel:
    """
    The model with an adapter on each projection, and all else frozen. It computes what it did before, since B is 0.

    Args:
        model: its layers are replaced in place.
        rank: of B A. It is not scaled (peft's `lora_alpha` is the rank): the learning rate says how fast it moves.
    """
    config = LoraConfig(TaskType.SEQ_2_SEQ_LM, r=rank, lora_alpha=rank, target_modules="all-linear")
    return get_peft_model(model, config)


def merge_adapters(trainer: TranslationTrainer) -> None:
    """Gives the trainer the plain model that computes what its adapted one does."""
    trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()

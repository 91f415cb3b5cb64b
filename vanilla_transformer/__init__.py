"""The original encoder-decoder Transformer (Vaswani et al., 2017) as a Hugging Face model.

Importing the package registers it with transformers' Auto classes, and the task "translation" with its `pipeline()`.
"""

import os
import re
from typing import Any


# torch's OpenMP reads this when torch is loaded, so it is set before the other imports. A waiting OpenMP thread spins,
# by default for milliseconds. When other processes keep the cores busy, this spinning delays the very thread that is
# waited for. With this setting a thread sleeps after 3,000 turns (some microseconds). A user's own setting is kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES
from transformers.pipelines import PIPELINE_REGISTRY, REMOVED_TASKS, PipelineRegistry

from .configuration_vanilla_transformer import VanillaTransformerConfig
from .modeling_vanilla_transformer import (
    VanillaTransformerForConditionalGeneration,
    VanillaTransformerModel,
    VanillaTransformerPreTrainedModel,
)
from .pipeline import TranslationPipeline
from .scoring import (
    TranslationAlignments,
    TranslationScores,
    minimum_bayes_risk,
    to_pharaoh,
    word_alignment,
)
from .tokenization_units import VanillaTransformerUnitTokenizer, train_unit_tokenizer
from .tokenization_vanilla_transformer import VanillaTransformerTokenizer, train_tokenizer


__version__ = "0.2.0"

AutoConfig.register("vanilla_transformer", VanillaTransformerConfig)
AutoModel.register(VanillaTransformerConfig, VanillaTransformerModel)
AutoModelForSeq2SeqLM.register(VanillaTransformerConfig, VanillaTransformerForConditionalGeneration)
# Registered by name, for AutoTokenizer. AutoTokenizer.register() would make it the tokenizer of all our models, and a
# folder that brings the code of another tokenizer would no longer be refused.
for _tokenizer in (VanillaTransformerTokenizer, VanillaTransformerUnitTokenizer):
    REGISTERED_TOKENIZER_CLASSES[_tokenizer.__name__] = _tokenizer

# transformers 5 dropped its translation pipeline, and rejects the task's name before it looks for a registered one.
REMOVED_TASKS.pop("translation", None)
PIPELINE_REGISTRY.register_pipeline("translation", TranslationPipeline, pt_model=AutoModelForSeq2SeqLM, type="text")


def _check_task(task: str) -> tuple[str, dict, Any]:
    """Accepts the name with languages too, as transformers 4 did: "translation_en_to_de"."""
    return PipelineRegistry.check_task(
        PIPELINE_REGISTRY, "translation" if re.fullmatch(r"translation_\w+_to_\w+", task) else task
    )


PIPELINE_REGISTRY.check_task = _check_task  # type: ignore[method-assign]

__all__ = [
    "TranslationAlignments",
    "TranslationPipeline",
    "TranslationScores",
    "VanillaTransformerConfig",
    "VanillaTransformerForConditionalGeneration",
    "VanillaTransformerModel",
    "VanillaTransformerPreTrainedModel",
    "VanillaTransformerTokenizer",
    "VanillaTransformerUnitTokenizer",
    "minimum_bayes_risk",
    "to_pharaoh",
    "train_tokenizer",
    "train_unit_tokenizer",
    "word_alignment",
]

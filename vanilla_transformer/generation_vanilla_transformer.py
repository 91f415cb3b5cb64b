"""How `generate()` decodes this model by default: the paper's beam search (Vaswani et al., 2017, section 6.1)."""

import torch
from transformers import GenerationConfig, GenerationMixin


# Section 6.1: "maximum output length during inference to input length + 50".
MAX_EXTRA_TOKENS = 50


class VanillaTransformerGenerationMixin(GenerationMixin):
    """transformers' `generate()` with the paper's defaults: beam 4, and outputs at most 50 tokens over the source."""

    def _set_paper_defaults(self) -> None:
        """Beam 4. A saved `generation_config.json` and arguments of `generate()` both come before it."""
        self.generation_config.num_beams = 4

    def _prepare_generated_length(
        self,
        generation_config: GenerationConfig,
        has_default_max_length: bool,
        has_default_min_length: bool,
        model_input_name: str,
        input_ids_length: int,
        inputs_tensor: torch.Tensor,
    ) -> GenerationConfig:
        """Replaces transformers' default of 20 new tokens, which would cut most translations short."""
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_length = inputs_tensor.shape[1] + MAX_EXTRA_TOKENS
            if self.config.position_embedding_type == "learned":
                generation_config.max_length = min(generation_config.max_length, self.config.max_position_embeddings)
            has_default_max_length = False
        return super()._prepare_generated_length(
            generation_config,
            has_default_max_length,
            has_default_min_length,
            model_input_name,
            input_ids_length,
            inputs_tensor,
        )

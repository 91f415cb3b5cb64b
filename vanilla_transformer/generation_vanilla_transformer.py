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
            longest = inputs_tensor.shape[1] + MAX_EXTRA_TOKENS
            if self.config.position_embedding_type == "learned":
                longest = min(longest, self.config.max_position_embeddings)
            generation_config.max_new_tokens = longest - input_ids_length
        return super()._prepare_generated_length(
            generation_config,
            has_default_max_length,
            has_default_min_length,
            model_input_name,
            input_ids_length,
            inputs_tensor,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, decoder_attention_mask: torch.Tensor | None = None, **kwargs
    ) -> dict:
        """Numbers the target tokens by their mask, which a static cache turns into one that tells no positions."""
        if decoder_attention_mask is not None and kwargs.get("decoder_position_ids") is None:
            kwargs["decoder_position_ids"] = (decoder_attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return super().prepare_inputs_for_generation(input_ids, decoder_attention_mask=decoder_attention_mask, **kwargs)

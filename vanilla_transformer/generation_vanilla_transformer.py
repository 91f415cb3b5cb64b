"""How `generate()` decodes this model: the paper's beam search (Vaswani et al., 2017, section 6.1) by default.

`generate()` accepts everything that transformers' own accepts, and adds options for translation. It reads the arguments
and prepares the call (`decoding_call.py`), chooses an engine (`engine_choice.py`), and runs it. docs/architecture.md
follows one sentence through it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from .decoding_arguments import checked_options
from .decoding_call import Call, Extras
from .engine_choice import Engine, choose_engine


# Section 6.1: "maximum output length during inference to input length + 50".
MAX_EXTRA_TOKENS = 50


class VanillaTransformerGenerationMixin(GenerationMixin):
    """
    transformers' `generate()` with the paper's defaults: beam size 4, and at most 50 tokens more than the source has.

    Attributes:
        last_engine: the engine of the last call of `generate()`, and the reason why a faster one could not decode.
    """

    last_engine: Engine | None = None

    def _set_paper_defaults(self) -> None:
        """Sets beam size 4. A saved `generation_config.json` and arguments of `generate()` override it."""
        self.generation_config.num_beams = 4
        # Otherwise transformers would save our own options but not load them.
        self.generation_config._from_model_config = False

    def adjust_generation_fn(self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any) -> None:
        """Called at the end of `from_pretrained`: without a `generation_config.json` the paper's defaults apply."""
        super().adjust_generation_fn(generation_config, *args, **kwargs)
        if self.generation_config._from_model_config:
            self._set_paper_defaults()

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        compute_type: str | None = None,
        compiled: bool | None = None,
        length_penalty_form: str | None = None,
        coverage_penalty: float | None = None,
        ensemble: Sequence["VanillaTransformerGenerationMixin"] = (),
        required_phrases: Sequence[Sequence[Sequence[int]]] | None = None,
        forbidden_phrases: Sequence[Sequence[Sequence[int]]] | None = None,
        **kwargs,
    ) -> Any:
        """
        Does what `transformers.GenerationMixin.generate` does, faster, and takes these arguments as well:

        Args:
            compute_type: type of the matrix products: "float32", "bfloat16" or "int8". Default: the model's dtype.
                The weights are packed at the first call and kept beside the model.
            compiled: whether to run greedy and beam search as one compiled program (`engine_compiled.py`), on a CPU in
                float32 or int8. For small networks it is several times faster. Default: as soon as it is ready. A
                C++ compiler makes it in the background at the first use on a machine. Without a compiler the output is
                the same, but slower. True waits for the compiler, and raises an error if there can be no program.
                False never uses it. Calls that the program does not support (sampling, groups, ensembles, phrases,
                coverage, scores of steps, processors other than a minimum length) never use it either.
            length_penalty_form: the divisor of the log-probability of a hypothesis of n tokens, with `length_penalty`
                as alpha. "power": n^alpha, as in transformers and fairseq (default). "gnmt": ((5 + n) / 6)^alpha (Wu et
                al., 2016, equation 14), as in the paper, which has alpha = 0.6.
            coverage_penalty: Wu et al.'s beta. Adds beta * sum_i log(min(sum_j p_ij, 1)) to the score of a finished
                hypothesis, where p_ij is the last layer's cross-attention from target token j to source token i,
                averaged over heads. Default: 0.
            ensemble: models with the same vocabularies, whose probabilities are averaged with this one's.
            required_phrases: for each sentence a list of phrases, each a list of token ids. Every output contains all
                of them (Post and Vilar, 2018). Needs beam search; more phrases need more beams.
            forbidden_phrases: likewise. No output contains any of them.
            kwargs: everything else, as in transformers. `num_beam_groups` and `diversity_penalty` (Vijayakumar et al.,
                2018) work without code from the Hub. If prefixes differ by sentence, pad `decoder_input_ids` on the
                left and give their `decoder_attention_mask`.

        Returns:
            As in transformers. With `return_dict_in_generate=True` beam search always returns `sequences_scores`.
            `past_key_values` is None, unless `use_cache=True` is given or transformers' own loop decodes.

        Raises:
            ValueError: an argument is wrong, or cannot be combined with another one that only transformers' loops
                support; the weights contain NaN or infinity; `compiled=True`, but there can be no program.
        """
        extras = Extras(
            compute_type, compiled, length_penalty_form, coverage_penalty, ensemble, required_phrases, forbidden_phrases
        )
        kwargs = checked_options(self, kwargs, inputs=inputs, generation_config=generation_config, **extras._asdict())
        call = Call(self, inputs, generation_config, kwargs, extras)
        # Kept in a local too, because another thread may set `last_engine` meanwhile.
        self.last_engine = engine = choose_engine(call)
        if engine.name == "transformers":
            return super().generate(inputs, generation_config, **kwargs)
        return call.run(engine.name)

    def _prepare_generated_length(
        self,
        generation_config: GenerationConfig,
        has_default_max_length: bool,
        has_default_min_length: bool,
        model_input_name: str,
        input_ids_length: int,
        inputs_tensor: torch.Tensor,
    ) -> GenerationConfig:
        """Replaces transformers' default of 20 new tokens, which would truncate most translations."""
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
        """Numbers the target tokens by their mask now, before a static cache replaces it by one without positions."""
        if decoder_attention_mask is not None and kwargs.get("decoder_position_ids") is None:
            kwargs["decoder_position_ids"] = (decoder_attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return super().prepare_inputs_for_generation(input_ids, decoder_attention_mask=decoder_attention_mask, **kwargs)

"""Builds the recipe's network: a new one, or a saved one to train further."""

import torch
from transformers import PreTrainedTokenizerBase

from vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration

from ..errors import RecipeError, message_of
from ..saved_model import read_model
from ..settings.recipe import Recipe


# Fields that may change when a model is trained further. The others are fixed by its weights.
CHANGEABLE = ("dropout", "attention_dropout", "activation_dropout", "label_smoothing")


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> VanillaTransformerForConditionalGeneration:
    """The recipe's model, with its decoding options: the saved model that it names, or a new one."""
    named = recipe.model.model
    model = read_named_model(recipe, named) if named else new_model(recipe, tokenizer)
    if len(tokenizer) > model.config.vocab_size:
        add_embeddings(model, len(tokenizer), recipe)
    try:
        model.generation_config.update(
            num_beams=recipe.decoding.num_beams,
            length_penalty=recipe.decoding.length_penalty,
            max_new_tokens=recipe.decoding.max_new_tokens,
        )
    except ValueError as error:
        raise RecipeError(f"the decoding options are invalid: {error}") from error
    if not (rank := recipe.training.lora_rank):
        return model
    from .adapters import add_adapters  # peft is slow to import, and most runs do not need it

    return add_adapters(model, rank)


def read_named_model(recipe: Recipe, folder: str) -> VanillaTransformerForConditionalGeneration:
    """
    The model that the recipe trains further, in float32, with the recipe's dropout and label smoothing.

    Raises:
        RecipeError: the recipe describes a different network.
    """
    given = recipe.model.config_fields()
    changed = {name: given.pop(name) for name in CHANGEABLE if name in given}
    try:
        model, _ = read_model(folder, dtype=torch.float32, attn_implementation=attention(recipe), **changed)
    except ImportError as error:
        raise unusable_attention(recipe, error) from error
    for name, value in given.items():
        if (its := getattr(model.config, name)) != value:
            raise RecipeError(f"{name}={value}, but model={folder} has {name}={its}: leave it out")
    return model


def add_embeddings(model: VanillaTransformerForConditionalGeneration, tokens: int, recipe: Recipe) -> None:
    """
    Gives a model rows for the languages and tags that its tokenizer did not have before. The old weights stay. The new
    rows are drawn as those of a new model: transformers' default, nearly the same row for each, would tell no languages
    apart.

    Raises:
        RecipeError: adapters would not train the new rows, or source and target have vocabularies of their own.
    """
    new = tokens - model.config.vocab_size
    if recipe.training.lora_rank:
        raise RecipeError(
            f"lora_rank={recipe.training.lora_rank} trains no embeddings, but model={recipe.model.model} has none yet "
            f"for {new} new languages or tags: leave lora_rank out"
        )
    try:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    except ValueError as error:
        raise RecipeError(f"model={recipe.model.model} cannot have {new} new languages or tags: {error}") from error


def attention(recipe: Recipe) -> str | None:
    """
    The attention implementation. On a CPU the default is "eager", the fastest for sentences (sdpa's backward pass in
    bfloat16 is very slow there).
    """
    return recipe.model.attn_implementation or ("eager" if recipe.training.use_cpu else None)


def unusable_attention(recipe: Recipe, error: Exception) -> RecipeError:
    """The error for an attention implementation that is unknown to transformers, or whose package is missing."""
    name = recipe.model.attn_implementation
    return RecipeError(f"attn_implementation={name} cannot be used here: {message_of(error)}")


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> VanillaTransformerForConditionalGeneration:
    """A model of the recipe's sizes, with the tokenizer's ids."""
    # Some tokenizers, like T5's, have no bos. The decoder then starts with padding, as in T5 and Marian.
    start = tokenizer.pad_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    config = VanillaTransformerConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=start,
        attn_implementation=attention(recipe),
        **recipe.model.config_fields(),
    )
    try:
        return VanillaTransformerForConditionalGeneration(config)
    except (ImportError, ValueError) as error:
        raise unusable_attention(recipe, error) from error

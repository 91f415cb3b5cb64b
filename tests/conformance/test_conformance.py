"""transformers' own tests of a model, on ours and on Marian, whose results are the measure. See run.py beside this."""

import unittest

import torch
from transformers import MarianConfig, MarianModel, MarianMTModel
from transformers.models.auto import modeling_auto
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor

from vanilla_transformer import (
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
    VanillaTransformerModel,
)


# The common tests look a class up in these tables by its name to know whether it takes labels.
modeling_auto.MODEL_MAPPING_NAMES["vanilla_transformer"] = "VanillaTransformerModel"
modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES["vanilla_transformer"] = (
    "VanillaTransformerForConditionalGeneration"
)


class EncoderDecoderTester:
    """What the common tests ask of a "model tester": a tiny configuration, inputs for it, and their sizes."""

    batch_size = 13
    seq_length = 7
    is_training = True
    hidden_size = 16
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, config_class: type):
        self.config_class = config_class

    def get_config(self):
        return self.config_class(
            vocab_size=99,
            d_model=self.hidden_size,
            encoder_layers=self.num_hidden_layers,
            decoder_layers=self.num_hidden_layers,
            encoder_attention_heads=self.num_attention_heads,
            decoder_attention_heads=self.num_attention_heads,
            encoder_ffn_dim=4,
            decoder_ffn_dim=4,
            activation_function="gelu",
            dropout=0.1,
            attention_dropout=0.1,
            max_position_embeddings=100,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=3,
        )

    def prepare_config_and_inputs(self):
        shape = [self.batch_size, self.seq_length]
        input_ids = ids_tensor(shape, 99).clamp(3)
        input_ids[:, -1] = 2
        mask = torch.ones_like(input_ids)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "decoder_input_ids": ids_tensor(shape, 99).clamp(3),
            "decoder_attention_mask": mask,
        }
        return self.get_config(), inputs

    prepare_config_and_inputs_for_common = prepare_config_and_inputs


class EncoderDecoderTests(ModelTesterMixin, GenerationTesterMixin):
    is_encoder_decoder = True
    config_class: type

    def setUp(self):
        self.model_tester = EncoderDecoderTester(self.config_class)


class VanillaTransformerTest(EncoderDecoderTests, unittest.TestCase):
    config_class = VanillaTransformerConfig
    all_model_classes = (VanillaTransformerModel, VanillaTransformerForConditionalGeneration)
    # Off for models older than 2023, whose initialisation loses keys; ours must not.
    test_can_init_all_missing_weights_before_2023 = True


class MarianTest(EncoderDecoderTests, unittest.TestCase):
    config_class = MarianConfig
    all_model_classes = (MarianModel, MarianMTModel)

"""int8 by torchao, through transformers' `quantization_config`: close to float, generating, saved, reloaded."""

import pytest
import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, Int8WeightOnlyConfig
from transformers import AutoModelForSeq2SeqLM, GenerationMixin, TorchAoConfig

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training.saved_model import load_model
from vanilla_transformer.training.translator import translate


# Wide enough that the weights are most of the file.
SIZES = {"d_model": 64, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "vocab_size": 264}
CONFIGS = {"weights": Int8WeightOnlyConfig, "weights and states": Int8DynamicActivationInt8WeightConfig}


@pytest.fixture(scope="module")
def saved(lively_model, tmp_path_factory):
    """A model in float32 and its folder, with a tokenizer."""
    folder = tmp_path_factory.mktemp("float")
    model = lively_model(**SIZES)
    model.save_pretrained(folder)
    train_tokenizer(["what ever, what else, whichever"], SIZES["vocab_size"]).save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_int8_by_torchao_is_close_to_float_generates_and_comes_back_from_its_folder(config, saved, padded, tmp_path):
    model, folder = saved
    quantized = AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=TorchAoConfig(config()))

    # 1. every projection but the output's, rounded to the nearest of 8 bits for each row
    linear = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)} - {"lm_head"}
    for name in linear:
        weight, rounded = model.get_submodule(name).weight, quantized.get_submodule(name).weight
        assert type(rounded) is Int8Tensor
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        assert ((rounded.dequantize() - weight).abs() <= 0.51 * step).all()

    # 2. close logits, and transformers' own search
    source, mask = padded((7, 5, 3, 8), vocab_size=SIZES["vocab_size"])
    batch = {"input_ids": source, "attention_mask": mask, "labels": source}
    with torch.no_grad():
        expected, logits = model(**batch).logits, quantized(**batch).logits
    assert not torch.equal(logits, expected)
    assert (logits - expected).norm() < 0.05 * expected.norm()
    found = quantized.generate(source, attention_mask=mask, max_new_tokens=12)
    assert torch.equal(found, GenerationMixin.generate(quantized, source, attention_mask=mask, max_new_tokens=12))

    # 3. a smaller folder, which our programs load
    quantized.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    sizes = [(place / "model.safetensors").stat().st_size for place in (tmp_path, folder)]
    assert sizes[0] < 0.4 * sizes[1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    reloaded, tokenizer = load_model(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, logits)
    assert translate(reloaded, tokenizer, ["what else"], max_new_tokens=5) == translate(
        quantized, tokenizer, ["what else"], max_new_tokens=5
    )

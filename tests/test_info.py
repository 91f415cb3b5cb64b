"""vanilla-transformer info: its output agrees with the model and `generate()`."""

import pytest
import torch

from vanilla_transformer import train_tokenizer
from vanilla_transformer_commands import info


@pytest.mark.parametrize("eos", [2, [2, 17]], ids=str)
@pytest.mark.parametrize("compute_type", info.COMPUTE_TYPES)
def test_the_engine_is_the_one_that_decodes(eos, compute_type, tiny_model, tmp_path, capsys):
    tokenizer = train_tokenizer(["some text"], 300)
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = eos
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    info.main([str(tmp_path)])
    lines = {line[:18].strip(): line[18:] for line in capsys.readouterr().out.splitlines()}
    model.generate(torch.tensor([[5, 6, 2]]), max_new_tokens=2, compute_type=compute_type)
    assert lines[f"engine, {compute_type}"].partition(":")[0] == model.last_engine.name
    assert lines["parameters"] == f"{sum(p.numel() for p in model.parameters()):,} in float32"
    assert lines["layers"] == "3 + 2"
    assert lines["decoding"] == "num_beams=4"

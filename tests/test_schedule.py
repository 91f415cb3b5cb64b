"""A run's learning rate is the paper's (Vaswani et al., 2017, section 5.3), update by update."""

import pytest
from datasets import Dataset

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training.loop.network import build_model
from vanilla_transformer.training.settings.recipe import parse_recipe
from vanilla_transformer.training.train import build_trainer


ONE_LAYER = "--encoder_layers 1 --decoder_layers 1 --encoder_ffn_dim 8 --decoder_ffn_dim 8 --bf16 false"


@pytest.mark.parametrize(
    ("recipe", "fields", "d_model", "warmup"),
    [
        ("wmt14_en_de_base.yaml", [], 512, 4000),
        ("wmt14_en_de_big.yaml", [], 1024, 4000),
        ("quickstart.yaml", [], None, 600),  # it names a peak of its own
        ("wmt14_en_de_base.yaml", ["--d_model", "128", "--warmup_steps", "2000"], 128, 2000),
    ],
)
def test_a_recipe_has_the_papers_schedule(recipe, fields, d_model, warmup, tmp_path):
    tokenizer = train_tokenizer(["3 days ago"], 280)
    told = parse_recipe([recipe, *ONE_LAYER.split(), *fields, "--output_dir", str(tmp_path / "run")])
    rows = Dataset.from_dict({"input_ids": [[5, 2]], "labels": [[6, 2]]})
    model = build_model(told, tokenizer)
    trainer = build_trainer(told, model, tokenizer, {"train": rows, "validation": rows})
    trainer.create_optimizer_and_scheduler(20000)
    # The paper's formula; a peak of one's own moves all of it.
    scale = d_model**-0.5 if d_model else told.training.learning_rate * warmup**0.5
    for step in range(1, 20001):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        expected = scale * min(step**-0.5, step * warmup**-1.5)
        assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(expected, rel=1e-12, abs=0), step

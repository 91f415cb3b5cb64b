"""Training with a tokenizer of T5's kind, which has no token for the beginning of a sentence: the decoder starts with
padding, as T5's does."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Tokenizer, pipeline

import vanilla_transformer  # noqa: F401  registers the Auto classes
from vanilla_transformer.training.loop.network import new_model
from vanilla_transformer.training.settings.recipe import parse_recipe
from vanilla_transformer.training.train import main


PAIRS = [(f"{first} {second}", f"{second} {first}") for first in "abcd" for second in "efgh"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """T5's own class with a vocabulary of letters."""
    folder = tmp_path_factory.mktemp("t5")
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(f"▁{letter}", -1.0) for letter in "abcdefgh"]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=2)
    assert tokenizer.bos_token_id is None
    assert tokenizer("a e")["input_ids"] == [4, 8, 1]
    tokenizer.save_pretrained(folder / "tokenizer")
    for side, name in enumerate(("source", "target")):
        (folder / name).write_text("".join(f"{pair[side]}\n" for pair in PAIRS), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def arguments(folder):
    files = [str(folder / name) for name in ("source", "target")]
    options = {
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
        **{"d_model": 32, "dropout": 0.0, "label_smoothing": 0.0, "learning_rate": 0.01, "warmup_steps": 20},
        **{"max_steps": 150, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": "false"},
        **{"tokenizer": folder / "tokenizer", "output_dir": folder / "run", "use_cpu": "true"},
    }
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return ["--train_file", *files, "--validation_file", *files, *given]


def test_the_decoder_starts_with_padding_and_the_run_learns(folder, arguments):
    main(arguments)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "run")
    config = model.config
    assert (config.decoder_start_token_id, config.pad_token_id, config.eos_token_id, config.bos_token_id) == (
        0,
        0,
        1,
        None,
    )
    pipe = pipeline("translation", model=str(folder / "run"), device="cpu")
    assert [result["translation_text"] for result in pipe([source for source, _ in PAIRS])] == [t for _, t in PAIRS]
    # What the stock loop and teacher forcing say of it.
    batch = tokenizer([source for source, _ in PAIRS], return_tensors="pt", padding=True)
    outputs = model.generate(**batch, num_beams=1)
    assert (outputs[:, 0] == 0).all()
    assert torch.equal(outputs, model.generate(**batch, num_beams=1, use_cache=False))
    scores = model.score(**batch, labels=outputs[:, 1:])
    assert (scores.tokens == 3).all()
    assert (scores.perplexity < 1.5).all()


def test_a_tokenizer_with_a_beginning_starts_with_it(folder, arguments):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", bos_token="▁")
    assert new_model(parse_recipe(arguments), tokenizer).config.decoder_start_token_id == tokenizer.bos_token_id

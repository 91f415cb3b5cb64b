"""conversion/marian_npz.py: numpy computes our network's output from the file, and Marian itself translates with it."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from vanilla_transformer.conversion.marian import to_marian
from vanilla_transformer.conversion.marian_npz import NEVER, to_marian_npz, write_vocabulary


EOS, UNKNOWN, BOS = 2, 3, 1
SIZES = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
PYMARIAN = importlib.util.find_spec("pymarian") is not None
# Another process: the program ends its own when something is wrong.
TRANSLATE = """
import json, sys
from pymarian import Translator
options, sources = json.load(sys.stdin)
print(json.dumps(Translator(**options).translate(sources)))
"""


def read(path) -> tuple[dict[str, np.ndarray], dict]:
    arrays = dict(np.load(path))
    description = arrays.pop("special:model.yml").tobytes()
    assert description.endswith(b"\0")
    return {name: value.astype(np.float64) for name, value in arrays.items()}, yaml.safe_load(description[:-1])


def norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class NumpyMarian:
    """Marian's Transformer in float64, by its names, for one sentence; with the positions and first input of ours."""

    def __init__(self, path):
        self.w, self.options = read(path)

    def attention(self, name, x, memory, causal=False):
        w, heads = self.w, self.options["transformer-heads"]
        q, k, v = (
            (states @ w[f"{name}_W{letter}"] + w[f"{name}_b{letter}"]).reshape(len(states), heads, -1).swapaxes(0, 1)
            for letter, states in (("q", x), ("k", memory), ("v", memory))
        )
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        if causal:
            scores = np.where(np.tril(np.ones(scores.shape[-2:])) > 0, scores, -np.inf)
        mixed = (softmax(scores) @ v).swapaxes(0, 1).reshape(len(x), -1)
        out = mixed @ w[f"{name}_Wo"] + w[f"{name}_bo"]
        return norm(x + out, w[f"{name}_Wo_ln_scale"], w[f"{name}_Wo_ln_bias"])

    def feed_forward(self, name, x):
        w = self.w
        inner = np.maximum(x @ w[f"{name}_W1"] + w[f"{name}_b1"], 0)
        return norm(x + inner @ w[f"{name}_W2"] + w[f"{name}_b2"], w[f"{name}_ffn_ln_scale"], w[f"{name}_ffn_ln_bias"])

    def embed(self, stack, ids):
        table = self.w[f"{stack}_Wemb"]
        width = table.shape[1]
        angles = np.arange(len(ids))[:, None] / 10000 ** (np.arange(width // 2) / (width // 2))
        return table[ids] * np.sqrt(width) + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    def logits(self, source, target):
        x = self.embed("encoder", source)
        for number in range(1, self.options["enc-depth"] + 1):
            x = self.attention(f"encoder_l{number}_self", x, x)
            x = self.feed_forward(f"encoder_l{number}_ffn", x)
        y = self.embed("decoder", target)
        for number in range(1, self.options["dec-depth"] + 1):
            y = self.attention(f"decoder_l{number}_self", y, y, causal=True)
            y = self.attention(f"decoder_l{number}_context", y, x)
            y = self.feed_forward(f"decoder_l{number}_ffn", y)
        return y @ self.w["decoder_ff_logit_out_W"] + self.w["decoder_ff_logit_out_b"]


@pytest.mark.parametrize("shared", [True, False])
def test_numpy_computes_our_logits_by_marians_names(shared, tiny_model, tmp_path):
    model = tiny_model(**SIZES, share_encoder_decoder_embeddings=shared, tie_word_embeddings=shared)
    to_marian_npz(model, tmp_path / "model.npz")
    source, target = [5, 9, 30, 60, 2], [1, 7, 44, 8]
    with torch.no_grad():
        ours = model(torch.tensor([source]), decoder_input_ids=torch.tensor([target])).logits[0]
    # Every array in Marian's form is used.
    found = NumpyMarian(tmp_path / "model.npz").logits(source, target)
    torch.testing.assert_close(torch.from_numpy(found).float(), ours, rtol=1e-4, atol=1e-4)


def test_the_end_can_be_forbidden(tiny_model, tmp_path):
    model = tiny_model(**SIZES)
    for name, never_ends in (("plain", False), ("endless", True)):
        to_marian_npz(model, tmp_path / f"{name}.npz", never_ends=never_ends)
    plain, endless = (read(tmp_path / f"{name}.npz")[0] for name in ("plain", "endless"))
    assert endless["decoder_ff_logit_out_b"][0, EOS] == np.float32(NEVER)
    for name, value in plain.items():
        same = value == endless[name]
        assert same.all() if name != "decoder_ff_logit_out_b" else np.flatnonzero(~same).tolist() == [EOS]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_function": "gelu_new"}, "no activation_function='gelu_new'"),
        ({"decoder_attention_heads": 2}, "one number of heads for both stacks"),
        ({"normalize_before": True}, "normalize_before=True"),
    ],
)
def test_what_marian_has_not_is_refused_by_name(fields, message, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_marian_npz(tiny_model(**{**SIZES, **fields}), tmp_path / "model.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not PYMARIAN, reason="pymarian is not installed: pip install pymarian (600 MB)")
@pytest.mark.parametrize("beams", [1, 4])
def test_marian_finds_the_translations_and_scores_of_a_model_with_its_positions_and_first_input(
    beams, tiny_model, tmp_path
):
    model = tiny_model(**SIZES)
    with torch.no_grad():
        model.model.shared.weight[BOS] = 0
        model.lm_head.bias[EOS] += 2
    to_marian_npz(model, tmp_path / "model.npz")
    write_vocabulary(61, EOS, UNKNOWN, tmp_path / "vocabulary.txt")
    sources = [[5, 9, 30, 60, 2], [7, 8, 2], [40, 41, 42, 43, 44, 45, 2]]
    vocabulary = str(tmp_path / "vocabulary.txt")
    options = {"models": str(tmp_path / "model.npz"), "vocabs": [vocabulary, vocabulary], "cpu_threads": 1}
    # The greatest length is the factor times the longest source of the batch.
    options |= {"beam_size": beams, "normalize": 1, "n_best": "true", "allow_unk": "true", "quiet": "true"}
    options |= {"max_length_factor": 4.0, "mini_batch": 1}
    texts = [" ".join(map(str, source[:-1])) for source in sources]
    run = subprocess.run(
        [sys.executable, "-c", TRANSLATE], input=json.dumps([options, texts]), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    # Lines of all hypotheses, the best of each sentence first.
    lines = [line.split(" ||| ") for line in json.loads(run.stdout.splitlines()[-1])]
    best = lines[::beams]
    assert [number for number, *_ in best] == ["0", "1", "2"]

    reference = to_marian(model)
    half = model.config.d_model // 2
    angles = torch.arange(48)[:, None] / 10000 ** (torch.arange(half) / (half - 1))
    for stack in (reference.model.encoder, reference.model.decoder):
        stack.embed_positions.weight.data = torch.cat([angles.sin(), angles.cos()], dim=1)
    for source, (_, words, *_, score) in zip(sources, best, strict=True):
        target = [*map(int, words.split()), EOS][: 4 * len(source)]
        inputs = torch.tensor([[BOS, *target[:-1]]])
        with torch.no_grad():
            scores = reference(torch.tensor([source]), decoder_input_ids=inputs).logits[0].log_softmax(-1)
        expected = scores[range(len(target)), target].sum() / len(target)
        assert float(score) == pytest.approx(expected.item(), abs=1e-3)
        if beams == 1:
            assert target == scores.argmax(-1).tolist()

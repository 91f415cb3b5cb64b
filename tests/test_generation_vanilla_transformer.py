"""Compares all modes of `generate()` with decoding by full forward passes; checks the paper's defaults."""

import copy
import itertools
import json
import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from compilers import HAS_COMPILER, needs_compiler
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer

from vanilla_transformer import VanillaTransformerForConditionalGeneration, engine_products, train_tokenizer


LENGTH = 12


@pytest.fixture
def model(tiny_model):
    return tiny_model()


@pytest.fixture
def source(padded):
    input_ids, attention_mask = padded()
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def next_log_probabilities(model, source, target: torch.Tensor) -> torch.Tensor:
    """The distribution after each target, `[B, V]`, by a full forward pass."""
    return model(**source, decoder_input_ids=target, use_cache=False).logits[:, -1].log_softmax(-1)


@torch.no_grad()
def greedy(model, source, target: torch.Tensor, length: int) -> torch.Tensor:
    """The likeliest token after each target, until the end of the sentence or `length`, by full forward passes."""
    ended = torch.zeros(len(target), dtype=torch.bool)
    while target.shape[1] < length and not ended.all():
        likeliest = next_log_probabilities(model, source, target).argmax(-1).masked_fill(ended, 0)
        target = torch.cat([target, likeliest[:, None]], dim=1)
        ended |= likeliest == 2
    return target


def start(rows: int) -> torch.Tensor:
    return torch.ones(rows, 1, dtype=torch.long)


# Every way to make a greedy choice, as arguments of generate().
GREEDY = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "one token allowed of the top one": {"do_sample": True, "top_k": 1},
    "nothing forbidden": {"prefix_allowed_tokens_fn": lambda row, tokens: list(range(61))},
}


@pytest.mark.parametrize("options", GREEDY.values(), ids=GREEDY.keys())
@pytest.mark.parametrize(
    "fields",
    [{}, {"d_kv": 6, "d_v": 10}, {"position_embedding_type": "learned"}, {"normalize_before": True}],
    ids=["paper", "free d_k and d_v", "learned", "pre-norm"],
)
def test_greedy_search_takes_the_likeliest_token_of_a_full_forward(tiny_model, source, options, fields):
    model = tiny_model(**fields)
    expected = greedy(model, source, start(4), LENGTH)
    assert len(set(map(tuple, expected.tolist()))) > 1  # the outputs depend on the source
    assert expected[:, 1:].unique().numel() > 1
    outputs = model.generate(**source, num_beams=1, max_length=LENGTH, **options)
    assert outputs.tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 4}], ids=["greedy", "beam"])
def test_padding_of_the_source_changes_nothing(model, padded, options):
    outputs = []
    for side in ("left", "right"):
        input_ids, attention_mask = padded(side=side)
        outputs.append(model.generate(input_ids, attention_mask=attention_mask, max_length=LENGTH, **options))
    assert torch.equal(*outputs)
    for row, length in enumerate((7, 4, 1, 6)):
        alone = model.generate(padded()[0][row : row + 1, :length], max_length=LENGTH, **options)[0]
        assert outputs[0][row, : len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_prefix_is_continued_with_and_without_padding_on_its_left(model, source, padded, cache):
    prefix, mask = padded((3, 1, 2, 3), "left", seed=2)
    prefix[torch.arange(4), torch.tensor([0, 2, 1, 0])] = 1  # each begins with the decoder's start token
    options = {"num_beams": 1, "max_new_tokens": 6, "cache_implementation": cache, "disable_compile": True}
    outputs = model.generate(**source, decoder_input_ids=prefix, decoder_attention_mask=mask, **options)
    assert torch.equal(outputs[:, :3], prefix)
    for row in range(4):
        alone = {name: tensor[row : row + 1] for name, tensor in source.items()}
        target = prefix[row : row + 1, mask[row].bool()]
        expected = greedy(model, alone, target, target.shape[1] + 6)[0, target.shape[1] :]
        assert outputs[row, 3 : 3 + len(expected)].tolist() == expected.tolist()


def test_beam_search_wide_enough_finds_the_likeliest_of_all_outputs(tiny_model, padded):
    """Among 7 tokens, all 7^3 outputs of three tokens can be scored one by one."""
    vocab_size, new_tokens = 7, 3
    model = tiny_model(vocab_size=vocab_size)
    source = dict(zip(("input_ids", "attention_mask"), padded((4, 2), vocab_size=vocab_size), strict=True))
    outputs = model.generate(
        **source,
        num_beams=vocab_size**2,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        length_penalty=0.0,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_scores=True,
    )
    # `min_new_tokens` forbids the end of the sentence, id 2, at each step but the last.
    allowed = [token for token in range(vocab_size) if token != 2]
    candidates = torch.tensor(list(itertools.product([1], allowed, allowed, allowed)))
    for row in range(2):
        alone = {name: tensor[row : row + 1].expand(len(candidates), -1) for name, tensor in source.items()}
        logits = model(**alone, decoder_input_ids=candidates[:, :-1]).logits.log_softmax(-1)
        scores = logits.gather(-1, candidates[:, 1:, None]).sum((1, 2))
        best = scores.topk(3)
        assert outputs.sequences[3 * row : 3 * row + 3].tolist() == candidates[best.indices].tolist()
        torch.testing.assert_close(outputs.sequences_scores[3 * row : 3 * row + 3], best.values)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 3, "length_penalty": 0.0, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": True, "early_stopping": True},
        {"num_beams": 1, "do_sample": True, "temperature": 1.5},
        {"num_beams": 1, "do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
    ],
    ids=["beam", "several beams", "beam sampling", "sampling", "several samples"],
)
@pytest.mark.parametrize(
    "other", [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}], ids=["none", "static"]
)
def test_the_cache_changes_no_output(model, source, options, other):
    outputs = []
    for cache in ({}, other):
        torch.manual_seed(5)
        outputs.append(model.generate(**source, max_length=LENGTH, **options, **cache))
    assert torch.equal(*outputs)
    assert len(outputs[0]) == 4 * options.get("num_return_sequences", 1)


def test_sampling_follows_the_distribution_of_the_model(tiny_model, padded):
    model = tiny_model(vocab_size=7)
    input_ids, attention_mask = padded((4,), vocab_size=7)
    torch.manual_seed(0)
    samples = model.generate(
        input_ids, attention_mask=attention_mask, num_beams=1, do_sample=True, top_k=0, max_new_tokens=1,
        num_return_sequences=20000,
    )  # fmt: skip
    source = {"input_ids": input_ids, "attention_mask": attention_mask}
    expected = next_log_probabilities(model, source, start(1))[0].exp()
    frequencies = samples[:, 1].bincount(minlength=7) / len(samples)
    # Five standard deviations of a frequency among 20,000 draws.
    assert ((frequencies - expected).abs() < 5 * (expected * (1 - expected) / 20000).sqrt() + 1e-9).all()


@pytest.mark.parametrize("assistant", ["itself", "another"])
def test_assisted_generation_gives_the_greedy_output(tiny_model, padded, assistant):
    model = tiny_model()
    helper = model if assistant == "itself" else tiny_model(encoder_layers=1, decoder_layers=1)
    for length in (7, 3):
        input_ids, _ = padded((length,))
        expected = model.generate(input_ids, num_beams=1, max_length=LENGTH)
        outputs = model.generate(input_ids, num_beams=1, max_length=LENGTH, assistant_model=helper)
        assert outputs.tolist() == expected.tolist()


def test_only_allowed_tokens_are_generated(model, source):
    allowed = {row: [2, 10 + row, 20 + row] for row in range(4)}
    outputs = model.generate(**source, max_length=LENGTH, prefix_allowed_tokens_fn=lambda row, _: allowed[row])
    for row, tokens in enumerate(outputs[:, 1:].tolist()):
        assert set(tokens) <= {0, *allowed[row]}


def test_scores_and_states_are_returned_when_asked_for(tiny_model, source):
    model = tiny_model(attention="eager")
    outputs = model.generate(
        **source,
        num_beams=1,
        max_length=LENGTH,
        return_dict_in_generate=True,
        output_scores=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    steps = outputs.sequences.shape[1] - 1
    for step in range(steps):
        full = model(
            **source,
            decoder_input_ids=outputs.sequences[:, : step + 1],
            output_attentions=True,
            output_hidden_states=True,
        )
        last = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(outputs.scores[step], full.logits[:, -1], **last)
        for layer in range(2):
            torch.testing.assert_close(
                outputs.cross_attentions[step][layer][:, :, -1], full.cross_attentions[layer][:, :, -1], **last
            )
            torch.testing.assert_close(
                outputs.decoder_attentions[step][layer][:, :, -1], full.decoder_attentions[layer][:, :, -1], **last
            )
            torch.testing.assert_close(
                outputs.decoder_hidden_states[step][layer][:, -1], full.decoder_hidden_states[layer][:, -1], **last
            )
    assert len(outputs.scores) == len(outputs.decoder_attentions) == len(outputs.decoder_hidden_states) == steps
    assert len(outputs.encoder_attentions) == 3
    assert len(outputs.encoder_hidden_states) == 4


def test_a_streamer_receives_every_token(model, padded):
    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Collector()
    outputs = model.generate(padded((7,))[0], num_beams=1, max_length=LENGTH, streamer=streamer)
    assert streamer.tokens == outputs[0].tolist()
    assert streamer.ended


class TestDefaults:
    @pytest.fixture
    def endless(self, tiny_model):
        """A model that never ends a sentence by itself."""

        def build(**fields):
            model = tiny_model(**fields)
            model.lm_head.bias.data[2] = -1e4
            return model

        return build

    def test_the_beam_is_four_wide(self, model, source):
        assert model.generation_config.num_beams == 4
        by_default = model.generate(**source, max_length=LENGTH)
        assert torch.equal(by_default, model.generate(**source, max_length=LENGTH, num_beams=4))
        assert not torch.equal(by_default, model.generate(**source, max_length=LENGTH, num_beams=1))

    @pytest.mark.parametrize("num_beams", [1, 4])
    def test_an_output_may_be_50_tokens_longer_than_its_source(self, endless, padded, num_beams):
        for length in (7, 3):
            outputs = endless().generate(padded((length,))[0], num_beams=num_beams)
            assert outputs.shape[1] == length + 50

    def test_an_output_stops_where_learned_positions_do(self, endless, padded):
        model = endless(position_embedding_type="learned")
        assert model.generate(padded((7,))[0], num_beams=1).shape[1] == 48

    @pytest.mark.parametrize(("options", "length"), [({"max_length": 9}, 9), ({"max_new_tokens": 9}, 10)])
    def test_arguments_come_before_the_defaults(self, endless, padded, options, length):
        assert endless().generate(padded((7,))[0], num_beams=1, **options).shape[1] == length

    def test_a_generation_config_given_comes_before_the_defaults(self, endless, padded):
        config = GenerationConfig(max_length=11, num_beams=2, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1)
        model = endless()
        expected = model.generate(padded((7,))[0], max_length=11, num_beams=2)
        assert torch.equal(model.generate(padded((7,))[0], generation_config=config), expected)

    def test_a_saved_generation_config_comes_before_the_defaults(self, endless, padded, tmp_path):
        model = endless()
        model.generation_config.num_beams = 2
        model.generation_config.max_new_tokens = 8
        model.save_pretrained(tmp_path)
        reloaded = VanillaTransformerForConditionalGeneration.from_pretrained(tmp_path)
        assert reloaded.generation_config.num_beams == 2
        assert reloaded.generate(padded((7,))[0]).shape[1] == 9

    def test_the_defaults_survive_saving(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        assert GenerationConfig.from_pretrained(tmp_path).num_beams == 4
        reloaded = VanillaTransformerForConditionalGeneration.from_pretrained(tmp_path)
        assert reloaded.generation_config.to_dict() | {"_from_model_config": None} == (
            model.generation_config.to_dict() | {"_from_model_config": None}
        )

    @pytest.mark.parametrize("num_beams", [1, 4])
    def test_a_call_of_ours_is_not_prepared_by_transformers_once_more(self, model, source, monkeypatch, num_beams):
        monkeypatch.setattr(GenerationMixin, "generate", lambda *_, **__: pytest.fail("its generate() was called"))
        model.generate(**source, num_beams=num_beams, max_new_tokens=2)
        assert model.last_engine.name != "transformers"

    def test_no_default_length_is_written_to_the_generation_config(self, model, source):
        before = model.generation_config.to_dict()
        model.generate(**source, max_new_tokens=2)
        assert model.generation_config.to_dict() == before

    @pytest.mark.parametrize("load", [VanillaTransformerForConditionalGeneration, AutoModelForSeq2SeqLM])
    def test_a_folder_without_a_generation_config_has_them(self, endless, padded, tmp_path, load):
        """A folder as written by an older release or another program."""
        model = endless()
        model.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").unlink()
        reloaded = load.from_pretrained(tmp_path)
        assert reloaded.generation_config.num_beams == 4
        inputs = padded((7,))[0]
        assert torch.equal(reloaded.generate(inputs), model.generate(inputs))
        assert reloaded.last_engine.name == ("compiled" if HAS_COMPILER else "packed")
        # Options of ours are saved and loaded as ever.
        reloaded.generation_config.compute_type = "int8"
        reloaded.save_pretrained(tmp_path)
        assert load.from_pretrained(tmp_path).generation_config.compute_type == "int8"

    def test_a_generation_config_without_beams_means_one_as_everywhere(self, endless, padded, tmp_path):
        endless().save_pretrained(tmp_path)
        file = tmp_path / "generation_config.json"
        fields = json.loads(file.read_text())
        del fields["num_beams"]
        file.write_text(json.dumps(fields))
        reloaded = VanillaTransformerForConditionalGeneration.from_pretrained(tmp_path)
        inputs = padded((7,))[0]
        assert torch.equal(reloaded.generate(inputs), GenerationMixin.generate(reloaded, inputs, num_beams=1))

    def test_a_generation_config_that_is_given_comes_before_them(self, endless, tmp_path):
        endless().save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").unlink()
        given = GenerationConfig(num_beams=2)
        reloaded = VanillaTransformerForConditionalGeneration.from_pretrained(tmp_path, generation_config=given)
        assert reloaded.generation_config.num_beams == 2


@contextmanager
def default_dtype(dtype):
    """As a user sets it, or transformers for a moment in another thread, which loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    engine_products._state_bits.cache_clear()  # found once in a process
    try:
        yield
    finally:
        torch.set_default_dtype(before)


TOLD = {"return_dict_in_generate": True}
# Everything that creates tensors: each engine, with the arguments for which it does more.
DECODINGS = {
    "compiled, greedy": {"num_beams": 1, "compiled": True},
    "compiled, beams": {"num_beams": 4, "num_return_sequences": 2, "compiled": True, **TOLD},
    "compiled, int8": {"compiled": True, "compute_type": "int8", "length_penalty_form": "gnmt", **TOLD},
    "greedy": {"num_beams": 1},
    "sampling": {"num_beams": 1, "do_sample": True, "output_scores": True, **TOLD},
    "beams": {"num_beams": 4, "num_return_sequences": 4, "output_scores": True, **TOLD},
    "beams, early stopping": {"num_beams": 3, "early_stopping": True, **TOLD},
    "sampled beams": {"num_beams": 3, "do_sample": True, **TOLD},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7, "num_return_sequences": 4, **TOLD},
    "penalties": {"length_penalty_form": "gnmt", "length_penalty": 0.6, "coverage_penalty": 0.3, **TOLD},
    "phrases": {"required_phrases": [[[9, 8]]] * 4, "forbidden_phrases": [[[7]]] * 4, **TOLD},
    "processors": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "suppress_tokens": [20, 30], **TOLD},
    "ensemble": {"ensemble": "itself", **TOLD},
    "padded prefixes": {"decoder_input_ids": torch.tensor([[0, 1], [1, 9], [0, 1], [1, 7]]), **TOLD},
    "int8": {"compute_type": "int8", **TOLD},
    "bfloat16": {"compute_type": "bfloat16", **TOLD},
    "transformers' beams": {"use_cache": False, "output_scores": True, **TOLD},
    "transformers' greedy search": {"use_cache": False, "num_beams": 1, "output_scores": True, **TOLD},
}


def decoded(model, source, options: dict) -> list[torch.Tensor]:
    """All tensors of an output, with newly packed weights."""
    model, options = copy.deepcopy(model), {"compiled": False, "max_new_tokens": 8, **options}
    if "ensemble" in options:
        options["ensemble"] = [model]
    if "decoder_input_ids" in options:
        options["decoder_attention_mask"] = (options["decoder_input_ids"] != 0).long()
    torch.manual_seed(0)
    output = model.generate(**source, **options)
    if isinstance(output, torch.Tensor):
        return [output]
    fields = [output.get(name) for name in ("sequences", "sequences_scores", "beam_indices", "scores")]
    return [each for field in fields if field is not None for each in (field if isinstance(field, tuple) else [field])]


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*each, marks=[needs_compiler] * ("compiled" in each[0])) for each in DECODINGS.items()],
)
class TestSettingsOfTorch:
    """Settings of the process for new tensors (dtype, device) do not change the output."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_the_default_dtype(self, lively_model, source, monkeypatch, name, options, dtype):
        monkeypatch.setattr(engine_products, "FEW_INPUTS", 0)  # int8 for these small networks too
        model = lively_model()
        expected = decoded(model, source, options)
        with default_dtype(dtype):
            found = decoded(model, source, options)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)

    def test_the_default_device(self, lively_model, source, monkeypatch, name, options):
        if "transformers" in name:
            pytest.skip("transformers' own beams need the default device to be one with memory")
        monkeypatch.setattr(engine_products, "FEW_INPUTS", 0)
        model = lively_model()
        expected = decoded(model, source, options)
        engine_products._state_bits.cache_clear()
        with torch.device("meta"):  # where there are no numbers at all
            found = decoded(model, source, options)
        assert all(map(torch.equal, found, expected))


# Decodes a folder's model in each 16-bit type, and as evaluation and translation do, without a compiled program.
SIXTEEN_BITS = """
import copy, json, sys, torch
from transformers import AutoModelForSeq2SeqLM
from vanilla_transformer.training.saved_model import read_model
from vanilla_transformer.training.translator import translate

found, texts = {}, ["ab c", "c", "b a b"]
inputs = torch.tensor(json.loads(sys.argv[2]))
mask = (inputs != 0).long()
for dtype in (torch.bfloat16, torch.float16):
    model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], dtype=dtype)
    model.save_pretrained(sys.argv[3])
    model, tokenizer = read_model(sys.argv[3])
    assert model.dtype == dtype
    for name, of in ((f"saved in {dtype}", model.eval()), (f"{dtype} in float32", copy.deepcopy(model).float())):
        options = {"attention_mask": mask, "max_new_tokens": 8, "compiled": False}
        found[name] = of.generate(inputs, **options).tolist()
        found[f"{name}, translated"] = translate(of, tokenizer, texts, max_new_tokens=8, compiled=False)
        found[f"{name}, engine"] = of.last_engine.name
    # Transformers' own loop, and the network itself.
    model.generate(inputs, attention_mask=mask, max_new_tokens=8, use_cache=False)
    assert model.score(inputs, mask, inputs).perplexity.isfinite().all()
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.autocast("cpu", torch.bfloat16):
    found["autocast"] = model.generate(inputs, **options).tolist()
    found["autocast, translated"] = translate(model, tokenizer, texts, max_new_tokens=8)
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions can be hidden on x86-64 only")
def test_sixteen_bits_work_on_a_processor_without_instructions_for_them(lively_model, padded, tmp_path):
    """Only the weights are rounded: the outputs equal those of a float32 model with the rounded weights."""
    tokenizer = train_tokenizer(["a b c"] * 9, 270)
    lively_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    for folder in ("model", "other"):
        tokenizer.save_pretrained(tmp_path / folder)
    ids = padded(vocab_size=len(tokenizer))[0].tolist()
    command = [sys.executable, "-c", SIXTEEN_BITS, tmp_path / "model", json.dumps(ids), tmp_path / "other"]
    hidden = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    done = subprocess.run(command, env={**os.environ, **hidden}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for dtype in ("torch.bfloat16", "torch.float16"):
        for what in ("", ", translated", ", engine"):
            assert found[f"saved in {dtype}{what}"] == found[f"{dtype} in float32{what}"]
        assert found[f"saved in {dtype}, engine"] == "packed"
        assert len(set(map(tuple, found[f"saved in {dtype}"]))) > 1
    # Autocast rounds float32 values to bfloat16.
    assert found["autocast"] == found["saved in torch.bfloat16"]
    assert found["autocast, translated"] == found["saved in torch.bfloat16, translated"]


class Louder(VanillaTransformerForConditionalGeneration):
    """A user's subclass, which must be asked for its logits."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return type(output)(**{**output, "logits": 1.5 * output.logits})


def test_calls_of_many_threads_find_what_they_find_alone(lively_model):
    """
    Sources of very different lengths, for tables and buffers that grow; threads that change at every instruction; and
    a thread beside them that loads models in 16 bits, as transformers does it: with another default dtype.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [*torch.randint(40, 700, (9,), generator=generator).tolist(), 700, 40]
    sources = [torch.randint(3, 61, (1, length), generator=generator) for length in lengths]
    engines = {"packed": {"compiled": False}} | ({"compiled": {"compiled": True}} if HAS_COMPILER else {})
    model, louder = lively_model(), lively_model(model_class=Louder)
    jobs = [
        (of, source, {"max_new_tokens": 5, "num_beams": 2, "return_dict_in_generate": True, **options, **told})
        for source in sources
        for of, options, told in (
            *((model, options, {}) for options in engines.values()),
            (louder, {}, {"output_scores": True}),
        )
    ]
    expected = [copy.deepcopy(of).generate(source, **options) for of, source, options in jobs]
    done, before = threading.Event(), sys.getswitchinterval()

    def load_models() -> None:
        while not done.wait(1e-4):
            for dtype in (torch.bfloat16, torch.float64, torch.float32):
                torch.set_default_dtype(dtype)

    def call(number: int):
        of, source, options = jobs[number % len(jobs)]
        return of.generate(source, **options)

    loading = threading.Thread(target=load_models)
    sys.setswitchinterval(1e-6)
    loading.start()
    try:
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(call, range(4 * len(jobs))))
    finally:
        done.set()
        loading.join()
        sys.setswitchinterval(before)
        torch.set_default_dtype(torch.float32)
    for number, output in enumerate(found):
        alone = expected[number % len(jobs)]
        assert torch.equal(output.sequences, alone.sequences)
        assert torch.equal(output.sequences_scores, alone.sequences_scores)


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 4}, {"num_beams": 1, "do_sample": True}])
def test_outputs_are_ordinary_tensors_that_one_may_change(lively_model, source, packed_engine, options):
    model = lively_model()
    told = model.generate(
        **source, **options, max_new_tokens=4, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    for tensor in (model.generate(**source, **options, max_new_tokens=4), told.sequences, *told.scores, *told.logits):
        assert not tensor.is_inference()
        tensor[0] = 0

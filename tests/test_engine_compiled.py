"""The compiled program itself. tests/test_decoding_beams.py runs all searches through it."""

import multiprocessing
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compilers import needs_compiler
from networks import NETWORKS
from transformers import GenerationMixin

from vanilla_transformer import engine_compiled as native
from vanilla_transformer import engine_program as program
from vanilla_transformer.engine_choice import Engine
from vanilla_transformer.engine_packed import PackedTransformer


pytestmark = needs_compiler

LENGTHS = (7, 4, 1, 6, 3, 8, 2, 5, 70, 6, 3, 7)
SHAPES = {**NETWORKS, "silu": {"activation_function": "silu"}, "swish": {"activation_function": "swish"}}
FOUND = {"num_beams": 5, "num_return_sequences": 3, "return_dict_in_generate": True}
# By what torch finds a machine to have, which is what `ATEN_CPU_CAPABILITY` can hide.
INSTRUCTIONS = {
    "of this machine": None,
    "AVX-512 without VNNI": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "AVX2": ["-march=x86-64-v3"],
    "none": [],
}
NEEDED = {"AVX-512 without VNNI": ("AVX512",), "AVX2": ("AVX2", "AVX512")}


@pytest.fixture
def source(padded):
    return dict(zip(("input_ids", "attention_mask"), padded(LENGTHS), strict=True))


@pytest.fixture
def no_other_search(monkeypatch):
    """Fails if anything but the program decodes."""
    monkeypatch.setattr(PackedTransformer, "__init__", lambda *_: pytest.fail("another search was used"))


def assert_found_as_by_transformers(model, **options) -> None:
    ours = model.generate(**options, **FOUND, compiled=True)
    stock = GenerationMixin.generate(model, **options, **FOUND, output_scores=True)  # or it tells no scores at all
    assert torch.equal(ours.sequences, stock.sequences)
    assert torch.equal(ours.beam_indices, stock.beam_indices)
    # In single precision transformers' own scores of these networks are 2e-5 from those in double.
    torch.testing.assert_close(ours.sequences_scores, stock.sequences_scores, atol=4e-5, rtol=0.0)


class TestNetworks:
    @pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
    def test_every_network_is_computed(self, lively_model, source, no_other_search, fields):
        model = lively_model(**{"tie_word_embeddings": False, "max_position_embeddings": 99, **fields})
        assert_found_as_by_transformers(model, **source, max_new_tokens=12)

    @pytest.mark.parametrize("name", INSTRUCTIONS)
    def test_with_any_instructions(self, lively_model, source, monkeypatch, request, no_other_search, name):
        expected = lively_model().generate(**source, **FOUND, compiled=True, compute_type="int8")
        if torch.backends.cpu.get_cpu_capability() not in NEEDED.get(name, torch.backends.cpu.get_cpu_capability()):
            pytest.skip(f"this processor does not have {name}")
        if INSTRUCTIONS[name] is not None:
            monkeypatch.setattr(program, "compiler_flags", lambda: INSTRUCTIONS[name])
            request.getfixturevalue("program_cache")
        model = lively_model()
        # Long enough for rows that nobody descends from to be dropped.
        assert_found_as_by_transformers(model, **source, max_new_tokens=60, min_new_tokens=45)
        found = model.generate(**source, **FOUND, compiled=True, compute_type="int8")
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=1e-3, rtol=0.0)

    def test_panels_of_columns_keys_and_values_may_be_more_than_one(self, tiny_model, padded, no_other_search):
        sizes = {"vocab_size": 200, "d_model": 96, "encoder_ffn_dim": 150, "decoder_ffn_dim": 70}
        heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "d_kv": 77, "d_v": 131}
        model = tiny_model(**sizes, **heads, tie_word_embeddings=False)
        tokens, mask = padded((150, 64, 65, 1), vocab_size=200)
        assert_found_as_by_transformers(model, input_ids=tokens, attention_mask=mask, max_new_tokens=6)

    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_any_number_of_threads_finds_the_same(self, lively_model, source, threads):
        model = lively_model()
        expected = model.generate(**source, **FOUND, compiled=True)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = model.generate(**source, **FOUND, compiled=True)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.sequences_scores, expected.sequences_scores)

    def test_calls_from_several_threads_do_not_meet(self, lively_model, source):
        model = lively_model()
        expected = model.generate(**source, **FOUND, compiled=True)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: model.generate(**source, **FOUND, compiled=True), range(12)))
        assert all(torch.equal(each.sequences_scores, expected.sequences_scores) for each in found)

    def test_a_forked_process_does_not_wait_for_threads_that_it_has_not(self, lively_model, source):
        model = lively_model()
        expected = model.generate(**source, **FOUND, compiled=True).sequences_scores  # its threads are there
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()

        def work():
            queue.put(model.generate(**source, **FOUND, compiled=True).sequences_scores.tolist())

        process = context.Process(target=work, daemon=True)
        process.start()
        process.join(timeout=60)
        assert process.exitcode == 0, "it hangs"
        assert queue.get() == expected.tolist()

    def test_a_source_of_padding_alone_gives_numbers(self, lively_model, source):
        model = lively_model()
        alone = model.generate(**source, **FOUND, compiled=True)
        source["attention_mask"][2] = 0
        found = model.generate(**source, **FOUND, compiled=True)
        assert found.sequences_scores.isfinite().all()
        assert torch.equal(found.sequences_scores[:6], alone.sequences_scores[:6])


class TestInt8:
    """Each row of states and each output of a matrix has a scale: sums of rounded numbers are exact."""

    def test_products_are_those_of_rounded_numbers(self, tiny_model):
        """A network whose layers add nothing: what it predicts is one product."""
        model = tiny_model(vocab_size=150, d_model=70, encoder_attention_heads=2, tie_word_embeddings=False)
        with torch.no_grad():
            for layer in model.model.decoder.layers:
                for linear in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
                    linear.weight.zero_()
                    linear.bias.zero_()
        tokens = torch.arange(5, 145)[:, None]
        prefix = torch.cat([torch.ones_like(tokens), tokens], dim=1)
        options = {"decoder_input_ids": prefix, "max_new_tokens": 1, "num_beams": 2, "return_dict_in_generate": True}
        found = model.generate(tokens, **options, compiled=True, compute_type="int8")
        with torch.no_grad():
            states = model.model(tokens, decoder_input_ids=prefix).last_hidden_state[:, -1].double()
        weight, bias = model.lm_head.weight.detach().double(), model.lm_head.bias.detach().double()

        def rounded(rows):
            scales = rows.abs().amax(dim=1, keepdim=True) / 127
            return (rows / scales).round() * scales

        expected = (rounded(states) @ rounded(weight).T + bias).log_softmax(dim=-1).amax(dim=-1)
        # A number that lies between two may be rounded to the other one.
        error = (found.sequences_scores.double() - expected).abs()
        assert error.median() < 1e-4
        assert error.max() < 0.02

    @pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
    def test_outputs_are_nearly_those_of_float32(self, lively_model, source, fields):
        model = lively_model(**{"tie_word_embeddings": False, "max_position_embeddings": 99, **fields})
        options = {**source, "max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 4, "return_dict_in_generate": True}
        exact, rounded = (model.generate(**options, compiled=True, compute_type=name) for name in ("float32", "int8"))
        assert not torch.equal(exact.sequences_scores, rounded.sequences_scores)
        assert (exact.sequences_scores - rounded.sequences_scores).abs().max() < 0.3
        assert (exact.sequences == rounded.sequences).float().mean() > 0.7


# What the program does not know; it is decoded as without it.
OTHERS = {
    "sampling": {"do_sample": True, "num_beams": 1},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "coverage": {"num_beams": 4, "coverage_penalty": 0.3},
    "processors": {"num_beams": 4, "no_repeat_ngram_size": 2},
    "scores of steps": {"num_beams": 4, "output_scores": True, "return_dict_in_generate": True},
    "required phrases": {"num_beams": 4, "required_phrases": [[[9]]] * len(LENGTHS)},
    "forbidden phrases": {"num_beams": 4, "forbidden_phrases": [[[9]]] * len(LENGTHS)},
    "no cache": {"num_beams": 4, "use_cache": False},
    "attention weights": {"num_beams": 1, "output_attentions": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS.keys())
def test_what_it_does_not_know_is_decoded_without_it(lively_model, source, monkeypatch, options):
    monkeypatch.setattr(native.CompiledTransformer, "search", lambda *_: pytest.fail("the program was used"))
    outputs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = lively_model(attention="eager")
        found = model.generate(**source, **options, max_new_tokens=8, compiled=compiled)
        outputs.append(found if isinstance(found, torch.Tensor) else found.sequences)
    assert torch.equal(*outputs)


def test_an_ensemble_and_other_activations_are_decoded_without_it(lively_model, source, monkeypatch):
    monkeypatch.setattr(native.CompiledTransformer, "search", lambda *_: pytest.fail("the program was used"))
    model, tanh = lively_model(), lively_model(activation_function="tanh")
    for options in ({"ensemble": [lively_model(seed=1)]}, {}):
        chosen = model if options else tanh
        expected = chosen.generate(**source, **options, max_new_tokens=8)
        assert torch.equal(chosen.generate(**source, **options, max_new_tokens=8, compiled=True), expected)


@pytest.mark.parametrize("layers", [slice(None), slice(1)], ids=["everywhere", "in one layer"])
def test_an_activation_that_the_config_does_not_name_is_computed(lively_model, source, layers):
    """As it is tried out on a trained network."""
    model = lively_model()
    before = model.generate(**source, max_new_tokens=8, compiled=True)
    for stack in (model.model.encoder, model.model.decoder):
        for layer in stack.layers[layers]:
            layer.activation_fn = torch.nn.Tanh()
    expected = GenerationMixin.generate(model, **source, max_new_tokens=8)
    assert expected.tolist() != before.tolist()
    assert torch.equal(model.generate(**source, max_new_tokens=8, compiled=True), expected)


def test_learned_positions_end_where_they_end(lively_model, padded):
    """With fewer positions than might be asked for, the search that says so when they are reached is taken."""
    model = lively_model(position_embedding_type="learned", max_position_embeddings=12)
    tokens, mask = padded((7, 4, 12))
    batch = {"input_ids": tokens, "attention_mask": mask}
    expected = GenerationMixin.generate(model, **batch, max_new_tokens=11)
    assert torch.equal(model.generate(**batch, max_new_tokens=11, compiled=True), expected)
    with pytest.raises(ValueError, match="max_position_embeddings=12"):
        model.generate(**batch, min_new_tokens=20, max_new_tokens=30, compiled=True)


@pytest.mark.parametrize("eos", [-1, [2, 999], [2, -1]], ids=str)
def test_ends_that_are_not_in_the_vocabulary_never_come(lively_model, source, no_other_search, eos):
    """transformers allows them: -1 is how outputs are made to reach their greatest length."""
    assert_found_as_by_transformers(lively_model(), **source, max_new_tokens=9, min_new_tokens=3, eos_token_id=eos)


def test_another_thread_s_engine_is_not_taken(lively_model, source, monkeypatch):
    """The program does not know sampling. Between choice and search, another thread decodes by the program."""
    monkeypatch.setattr(native.CompiledTransformer, "search", lambda *_: pytest.fail("the program was used"))
    model = lively_model()
    of_another = Engine("compiled", "")
    monkeypatch.setattr(type(model), "last_engine", property(lambda _: of_another, lambda *_: None))
    model.generate(**source, do_sample=True, num_beams=1, max_new_tokens=4)


def test_it_can_be_saved_with_the_model(lively_model, source, tmp_path, no_other_search):
    model = lively_model()
    options = {"compiled": True, "compute_type": "float32", "length_penalty_form": "gnmt", "coverage_penalty": 0.0}
    model.generation_config.update(**options, allow_custom_entries=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert {name: getattr(loaded.generation_config, name, None) for name in options} == options
    model.generation_config.length_penalty_form = loaded.generation_config.length_penalty_form = "power"
    expected = GenerationMixin.generate(model, **source, max_new_tokens=8)
    assert torch.equal(loaded.generate(**source, max_new_tokens=8), expected)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"compute_type": "bfloat16"}, "the compiled program computes in float32 or int8, not in bfloat16"),
        (
            {"decoder_input_ids": torch.full((12, 2), 61)},
            "decoder_input_ids holds id 61, outside the vocabulary: its ids are 0 to 60",
        ),
        ({"input_ids": torch.full((12, 2), -1)}, "input_ids holds id -1, outside the vocabulary: its ids are 0 to 60"),
    ],
)
def test_wrong_arguments_are_errors(lively_model, source, options, told):
    if "input_ids" in options:
        source = {}
    with pytest.raises((ValueError, IndexError), match=told):
        lively_model().generate(**source, **options, max_new_tokens=4, compiled=True)


# Long enough for a signal to come in the middle: some minutes.
ENDLESS = """
import signal, sys, threading, time, torch
from vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell leaves it ignored in the background
model = VanillaTransformerForConditionalGeneration(VanillaTransformerConfig(vocab_size=4000)).eval()
model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2, compiled=True)
ticks = []
threading.Thread(target=lambda: [(ticks.append(1), time.sleep(0.01)) for _ in range(100)], daemon=True).start()
print("begins", flush=True)
try:
    model.generate(torch.ones(64, 64, dtype=torch.long), min_new_tokens=4000, max_new_tokens=4000, compiled=True)
except KeyboardInterrupt:
    print("interrupted", len(ticks) > 5, flush=True)
"""


def test_ctrl_c_ends_a_search_and_other_threads_run_meanwhile():
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begins\n"
        time.sleep(2.0)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=120)[0] == "interrupted True\n"
    finally:
        process.kill()


def test_what_does_not_fit_into_memory_is_an_error(lively_model, source, monkeypatch):
    """The program asks for more than there is: the error is Python's, and the next search works."""
    model = lively_model()
    expected = model.generate(**source, compiled=True, max_new_tokens=4)
    with pytest.raises(MemoryError, match="smaller batch"):
        model.generate(**source, compiled=True, num_beams=2**20, max_length=2**19)
    assert torch.equal(model.generate(**source, compiled=True, max_new_tokens=4), expected)

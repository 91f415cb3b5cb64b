"""Every argument of `generate()` and every option of the pipeline with values of other types and out of range: what is
wrong is refused by its name, and the rest decodes."""

import inspect

import pytest
import torch
from transformers import GenerationConfig

from vanilla_transformer import (
    TranslationPipeline,
    VanillaTransformerForConditionalGeneration,
    train_tokenizer,
)
from vanilla_transformer.pipeline import OWN_OPTIONS


NAN = float("nan")
NEVER_RIGHT = {"text": "x", "a dictionary": {}, "NaN": NAN, "a list of text": ["x"], "an object": object()}
VALUES = {**NEVER_RIGHT, "no list": [], "-1": -1, "0": 0, "1.5": 1.5, "True": True, "40": 40, "None": None}
# Every field counts in one of these.
MODES = {"beams of samples": {"num_beams": 3, "do_sample": True}, "greedy": {"num_beams": 1}}

GENERATE = list(inspect.signature(VanillaTransformerForConditionalGeneration.generate).parameters)
FIELDS = [name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"]
INPUTS = ["attention_mask", "decoder_input_ids", "decoder_attention_mask"]
OF_TRANSFORMERS = ["logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "synced_gpus"]
# Arguments of transformers' own loops, of which transformers says itself what is wrong, in its own words or not at all.
LEFT = {
    "assistant_model and all that is for assistants": [name for name in FIELDS if "assistant" in name]
    + ["prompt_lookup_num_tokens", "max_matching_ngram_size", "target_lookbehind", "speculation_type", "use_mtp"],
    "searches that are loaded from the Hub, where that is allowed": [
        *("constraints", "force_words_ids", "dola_layers", "penalty_alpha")
    ],
    "what needs a tokenizer, and is refused without one": ["stop_strings", "token_healing"],
    "a process group, which is refused where there is none": ["synced_gpus"],
    "watermarks": ["watermarking_config"],
    "caches and compilation of its loops, and what its loops pass over": [
        *("cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
        *("continuous_batching_config", "prefill_chunk_size", "low_memory"),
    ],
    "checked by transformers, with the name": ["sequence_bias"],
    "whatever else the caller gives": ["self", "kwargs"],
}
NAMES = sorted({*GENERATE, *FIELDS, *INPUTS, *OF_TRANSFORMERS} - {name for names in LEFT.values() for name in names})


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(encoder_layers=1, decoder_layers=1)


@pytest.fixture(scope="module")
def source(padded):
    tokens, mask = padded((4, 2))
    return {"inputs": tokens, "attention_mask": mask}


def decoded(model, source, **options):
    """The sequences of a call."""
    if not {"max_length", "max_new_tokens"} & options.keys():
        options["max_new_tokens"] = 3
    torch.manual_seed(0)
    outputs = model.generate(**{**source, **options})
    return outputs if isinstance(outputs, torch.Tensor) else outputs.sequences


def assert_refused_by_name(error, name):
    assert type(error) in (ValueError, TypeError), repr(error)
    assert name in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_argument_is_refused_by_its_name_and_a_right_one_decodes(model, source, name, mode, packed_engine):
    for described, value in VALUES.items():
        try:
            sequences = decoded(model, source, **{**MODES[mode], name: value})
        except Exception as error:
            assert_refused_by_name(error, name)
            assert described != "None" or name == "inputs"
        else:
            assert described not in NEVER_RIGHT
            assert sequences.dim() == 2
            assert len(sequences) == 2 * (value if name == "num_return_sequences" and value else 1)


@pytest.mark.parametrize("name", sorted({*FIELDS, "compiled", "compute_type", "ensemble"} - {"max_new_tokens"}))
def test_none_asks_for_the_default(model, source, name, packed_engine):
    expected = decoded(model, source, max_new_tokens=6)
    assert torch.equal(decoded(model, source, **{"max_new_tokens": 6, name: None}), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": torch.tensor([[5, 61]])}, "inputs holds id 61, outside the vocabulary: its ids are 0 to 60"),
        ({"inputs": torch.tensor([[-1, 5]])}, "inputs holds id -1, outside the vocabulary"),
        ({"inputs": torch.tensor([5, 6])}, r"inputs must be whole numbers, \[B, L\], and has shape \[2\]"),
        ({"inputs": torch.ones(2, 4)}, "inputs must be whole numbers"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask has shape \[2, 3\], inputs \[2, 4\]"),
        ({"decoder_input_ids": torch.tensor([[1, 61], [1, 5]])}, "decoder_input_ids holds id 61"),
        (
            {"decoder_input_ids": torch.ones(2, 2).long(), "decoder_attention_mask": torch.ones(2, 3)},
            "decoder_attention_mask has shape",
        ),
        ({"decoder_input_ids": torch.tensor([[0, 1], [1, 5]])}, "decoder_input_ids begins with padding: give"),
        ({"decoder_start_token_id": 61}, "decoder_start_token_id holds id 61"),
        ({"forced_bos_token_id": 61}, "forced_bos_token_id holds id 61"),
        ({"length_penalty": 51}, "length_penalty=51 must be a number from -50 to 50"),
        ({"inputs": None}, "attention_mask is given without inputs"),
        ({"required_phrases": [[["x"]], []]}, "required_phrases=.* must be a list for each sentence"),
        ({"forbidden_phrases": [5, []]}, "forbidden_phrases=.* must be a list for each sentence"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"bad_words_ids": [5]}, "bad_words_ids"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id=.* must be a token id, or a list"),
        ({"exponential_decay_length_penalty": (1,)}, "exponential_decay_length_penalty=.* must be a pair"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 must be 1"),
        ({"ensemble": [None]}, "ensemble=.* must be a list of models"),
    ],
)
def test_tensors_and_ids_out_of_range_are_refused(model, source, options, message):
    given = {**source, **options}
    if "inputs" in options and options["inputs"] is not None:
        del given["attention_mask"]
    with pytest.raises(ValueError, match=message):
        model.generate(**given, max_new_tokens=3)


def test_what_was_saved_with_the_model_is_checked_too(model, source, monkeypatch):
    monkeypatch.setattr(model.generation_config, "num_beams", "4")
    with pytest.raises(ValueError, match="num_beams='4' must be a whole number of at least 1"):
        model.generate(**source)
    with pytest.raises(ValueError, match="no_repeat_ngram_size='x' must be"):
        model.generate(**source, generation_config=GenerationConfig(no_repeat_ngram_size="x"))


def test_a_decoder_that_starts_with_padding_takes_a_prefix_that_does(tiny_model, source):
    model = tiny_model(decoder_start_token_id=0)
    prefix = torch.tensor([[0, 5], [0, 6]])
    assert torch.equal(model.generate(**source, decoder_input_ids=prefix, max_new_tokens=2)[:, :2], prefix)
    with pytest.raises(ValueError, match="decoder_input_ids begins with padding"):
        model.generate(**source, decoder_input_ids=torch.tensor([[0, 0, 5], [0, 6, 7]]))


@pytest.fixture(scope="module")
def pipe(tiny_model):
    tokenizer = train_tokenizer(["One. Two."], 300)
    model = tiny_model(vocab_size=len(tokenizer), encoder_layers=1, decoder_layers=1)
    model.generation_config.max_new_tokens = 3
    return TranslationPipeline(model=model, tokenizer=tokenizer, device="cpu")


OPTIONS = sorted(
    {*OWN_OPTIONS, "batch_size", "num_workers", "return_text", "return_tensors", "return_type", "src_lang"}
)
# The base class hands a number of workers to a DataLoader, and lists need none.
OPTIONS.remove("num_workers")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_option_of_the_pipeline_is_refused_by_its_name_or_translates(pipe, name, streamed):
    for described, value in VALUES.items():
        try:
            found = list(pipe.stream("One.", **{name: value})) if streamed else pipe(["One."], **{name: value})
        except Exception as error:
            assert_refused_by_name(error, name)
            assert described != "None"
        else:
            assert described not in NEVER_RIGHT
            assert found is not None


@pytest.mark.parametrize("name", sorted({*NAMES} & {*FIELDS}))
def test_what_the_pipeline_hands_to_generate_is_refused_before_a_text_is_read(pipe, name):
    def texts():
        yield "One."
        pytest.fail("read on")

    for described in NEVER_RIGHT:
        with pytest.raises(ValueError, match=name):
            list(pipe(texts(), batch_tokens=1, **{name: VALUES[described]}))

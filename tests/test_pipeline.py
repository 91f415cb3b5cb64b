"""`pipeline("translation")` against generate() by hand, sentence by sentence; and where sentences end."""

import itertools
import json
import time

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from processes import run_new_python
from torch.utils.data import Dataset as TorchDataset
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from vanilla_transformer import (
    TranslationPipeline,
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
    train_tokenizer,
)
from vanilla_transformer.pipeline_sentences import split_sentences


TEXT = "  Who goes there?  It is me.\n\n\tA line\nand “another.” Last"
SENTENCES = ["Who goes there?", "It is me.", "A line", "and “another.”", "Last"]
SPACES = ["  ", "  ", "\n\n\t", "\n", " ", ""]
TEXTS = [TEXT, "One.", " \n ", "", "Two words, and many more of them than in others. Three!", "One."]

# `|` stands where a sentence ends.
SPLITS = [
    "Hello there. |How are you? |Fine!",
    "A line |\nand the next |\r\n\t and |\u2028one more",
    "He said: “Go!” |She went. |(And came back.) |'Why?' |Ok",
    "“Really?” he asked. |‘No!’ – and left.",
    "Dr. Smith and Mrs. J. R. Jones, Ph.D. in the U.S. Army, z. B. am 3. März, e.g. There. |End",
    "It costs 3.50 at example.com/a?b. |I paid 10.000. |So",
    "Wait... what? no. |Well... |Yes . . . and no",
    "Yahoo!Mail is one. |1. Two |\n2. Three",
    "« Oui\u00a0! » dit-il. |Non ! |Voir chap.\u00a0Deux. |Fin",
    "你好。|我很好！|真的吗？！|是的",
    "「行く。」と言った。 |３．１４です．|それから。|2人",
    "यह है। |वह है।|और",
    "ما هذا؟ |نعم. |یہ ہے۔ |وہ",
    "ეს არის. |ის არის.",
    "Это — г. Москва. |Да? |Нет.",
    "ያ ነው። |ይህ",
    "No end here - none - at all",
]


@pytest.mark.parametrize("marked", SPLITS)
def test_sentences_end_where_a_reader_ends_them(marked):
    expected = [part.strip() for part in marked.split("|")]
    assert [sentence for sentence, _ in split_sentences(marked.replace("|", ""))] == expected


WRITTEN = st.text(st.one_of(st.sampled_from('aB3.!?。？．।»」") \n\t\u00a0\u3000\x85'), st.characters()))


@given(WRITTEN)
def test_the_pieces_of_a_text_are_the_text(text):
    pieces = split_sentences(text)
    assert "".join(sentence + space for sentence, space in pieces) == text
    assert all(not space or space.isspace() for _, space in pieces)
    assert all(sentence == sentence.strip() for sentence, _ in pieces)
    assert all(sentence for sentence, _ in pieces[1:])


@given(WRITTEN)
def test_a_sentence_is_one_sentence(text):
    for sentence, _ in split_sentences(text):
        assert split_sentences(sentence) == [(sentence, "")] * bool(sentence)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT, *SPLITS], 400)


@pytest.fixture(scope="module")
def model(tiny_model, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config.max_new_tokens = 12
    # A model that has learned nothing repeats itself, and all sentences would look alike.
    model.generation_config.no_repeat_ngram_size = 1
    return model


@pytest.fixture(scope="module")
def pipe(model, tokenizer):
    return TranslationPipeline(model=model, tokenizer=tokenizer, task="translation", device="cpu")


@pytest.fixture(scope="module")
def by_hand(model, tokenizer):
    """Calls generate() for one sentence, without padding: its translations and their scores."""

    def translate(sentence, **options):
        batch = tokenizer(sentence, return_tensors="pt")
        outputs = model.generate(**batch, **options, return_dict_in_generate=True, output_scores=True)
        texts = tokenizer.batch_decode(outputs.sequences, skip_special_tokens=True)
        return list(zip(texts, outputs.get("sequences_scores", torch.zeros(len(texts))).tolist(), strict=True))

    return translate


def joined(translations):
    """The translations of SENTENCES with the white space of TEXT."""
    return SPACES[0] + "".join(itertools.chain(*zip(translations, SPACES[1:], strict=True)))


@pytest.mark.parametrize("batch_tokens", [1, 25, 4096])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 1}, {"num_beams": 3, "length_penalty": 0.2}, {"max_new_tokens": 5, "min_new_tokens": 5}],
    ids=str,
)
def test_each_sentence_is_translated_as_generate_does_and_white_space_stays(pipe, by_hand, options, batch_tokens):
    translations = [by_hand(sentence, **options)[0][0] for sentence in SENTENCES]
    assert len(set(translations)) > 2
    assert pipe(TEXT, batch_tokens=batch_tokens, **options) == [{"translation_text": joined(translations)}]


def test_options_of_the_pipeline_are_the_defaults_of_its_calls(model, tokenizer, by_hand):
    options = {"num_beams": 2, "max_new_tokens": 7, "split_sentences": False}
    pipe = TranslationPipeline(model=model, tokenizer=tokenizer, device="cpu", **options)
    expected = [by_hand("One. Two.", num_beams=beams, max_new_tokens=7)[0][0] for beams in (2, 1)]
    assert [pipe("One. Two.", **call)[0]["translation_text"] for call in ({}, {"num_beams": 1})] == expected


def test_without_splitting_a_text_is_one_sentence(pipe, by_hand):
    ((expected, _),) = by_hand(TEXT.strip())
    assert pipe(TEXT, split_sentences=False) == [{"translation_text": "  " + expected}]
    assert pipe(" \n", split_sentences=False) == [{"translation_text": " \n"}]


def test_sentences_that_stood_together_are_put_apart(pipe, by_hand):
    """Chinese needs no blank after a full stop, and most languages that it is translated to do."""
    ((first, _),), ((second, _),) = by_hand("你好。"), by_hand("我很好。")
    assert pipe("你好。我很好。") == [{"translation_text": f"{first} {second}"}]
    # What needs none has none: here a translation from Chinese to Japanese.
    translated = {"pieces": [("你好。", ""), ("是。", "")], "best": [[("「はい。」", 0.0)], [("ええ。", 0.0)]]}
    assert pipe.postprocess(translated) == [{"translation_text": "「はい。」ええ。"}]


def test_n_best_and_scores_are_those_of_generate(pipe, by_hand):
    options = {"num_beams": 4, "num_return_sequences": 3}
    results = pipe(["One.", "One.  Who goes there?", " \n"], return_scores=True, **options)
    one, two = by_hand("One.", **options), by_hand("Who goes there?", **options)
    expected = [one, [(f"{a}  {b}", x + y) for (a, x), (b, y) in zip(one, two, strict=True)], [(" \n", 0.0)] * 3]
    for best, wanted in zip(results, expected, strict=True):
        assert [record["translation_text"] for record in best] == [text for text, _ in wanted]
        assert [record["score"] for record in best] == pytest.approx([score for _, score in wanted], abs=1e-4)
        assert best == sorted(best, key=lambda record: -record["score"])


def test_sampling_draws_as_many_as_are_asked_for(pipe):
    torch.manual_seed(0)
    (drawn,) = pipe(["Who goes there?"], do_sample=True, num_beams=1, num_return_sequences=5)
    assert len({record["translation_text"] for record in drawn}) > 1
    assert len(drawn) == 5


class Numbered(TorchDataset):
    """A dataset that says its length and raises no IndexError, as in transformers' own documentation."""

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, i):
        return TEXTS[i % len(TEXTS)]


INPUTS = {
    "generator": lambda: (text for text in TEXTS),
    "iterator": lambda: iter(TEXTS),
    "column": lambda: Dataset.from_dict({"source": TEXTS})["source"],
    "KeyDataset": lambda: KeyDataset(Dataset.from_dict({"source": TEXTS}), "source"),
    "torch dataset": Numbered,
}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_any_source_of_strings_gives_what_its_strings_give_alone(pipe, inputs):
    expected = [pipe(text) for text in TEXTS]
    assert list(pipe(inputs())) == expected
    assert list(pipe(inputs(), batch_tokens=1)) == expected


def test_a_list_gives_a_dictionary_for_each_text(pipe):
    expected = [pipe(text)[0] for text in TEXTS]
    assert pipe(TEXTS) == pipe(tuple(TEXTS)) == expected
    assert pipe([]) == []


def test_a_generator_without_end_is_translated_as_it_is_read(pipe):
    options = {"num_beams": 1, "max_new_tokens": 4}
    results = pipe((f"Number {n}." for n in itertools.count()), batch_tokens=16, **options)
    expected = pipe([f"Number {n}." for n in range(40)], **options)
    assert list(itertools.chain(*itertools.islice(results, 40))) == expected


def test_batches_keep_the_budget_and_take_the_longest_sentences_first(pipe, model, tokenizer, monkeypatch):
    shapes, generate = [], model.generate

    def recording(**options):
        shapes.append(tuple(options["input_ids"].shape))
        return generate(**options)

    monkeypatch.setattr(model, "generate", recording)
    pipe(TEXTS, batch_tokens=40)
    sentences = [sentence for text in TEXTS for sentence, _ in split_sentences(text) if sentence]
    assert sum(rows for rows, _ in shapes) == len(sentences)
    assert len(shapes) < len(sentences)
    assert all(rows == 1 or rows * width <= 40 for rows, width in shapes)
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)
    assert shapes[0][1] == max(len(ids) for ids in tokenizer(sentences)["input_ids"])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ("One.", {"batch_size": 8}, r"batch_size=8: .* give batch_tokens"),
        ("One.", {"required_phrases": [[[5]]]}, r"required_phrases has an entry for each row"),
        ("One.", {"return_scores": True, "num_beams": 1}, r"return_scores=True, .* set num_beams above 1"),
        ("One.", {"nonsense": 1}, r"nonsense"),
        (["One.", {"source": "One."}], {}, r"text 2 is not a string, but of type dict: .* KeyDataset"),
        ({"source": "One."}, {}, r"text 1 is not a string"),
    ],
)
def test_what_cannot_be_done_is_said(pipe, inputs, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe([inputs] if "batch_size" in options else inputs, **options)


def test_a_sentence_beyond_learned_positions_is_named(tiny_model, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), position_embedding_type="learned", max_position_embeddings=8)
    pipe = TranslationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    long = "Nevertheless, notwithstanding."
    count = len(tokenizer(long)["input_ids"])
    message = rf"sentence 2 of text 3 has {count} tokens, .* max_position_embeddings=8"
    with pytest.raises(ValueError, match=message):
        pipe(["One.", "Two.", f"Three. {long}"])
    with pytest.raises(ValueError, match=message.replace("text 3", "text 1")):
        list(pipe.stream(f"Three. {long}"))


class TestTransformers4:
    """What the translation pipeline of transformers 4 took is taken, or refused with what replaces it."""

    def test_the_languages_may_stand_in_the_name_of_the_task(self, pipe, model, tokenizer, tmp_path):
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path)
        for task in ("translation_en_to_de", "translation_zh_CN_to_en"):
            loaded = pipeline(task, model=str(tmp_path), device="cpu")
            assert type(loaded) is TranslationPipeline
            assert loaded(TEXTS) == pipe(TEXTS)
        with pytest.raises(KeyError, match="Unknown task translation_en"):
            pipeline("translation_en", model=str(tmp_path))

    def test_what_changes_nothing_is_taken(self, pipe):
        options = {"return_text": True, "return_tensors": False, "return_type": 1, "framework": "pt", "src_lang": None}
        assert pipe(TEXTS, **options) == pipe(TEXTS)

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"return_tensors": True}, "return_tensors can only be False: call the model's generate"),
            ({"return_text": False}, "return_text can only be True"),
            ({"return_type": 0}, "return_type can only be 1, text"),
            ({"stop_sequence": "."}, "stop_sequence is not supported: give its id as eos_token_id"),
            ({"src_lang": "en"}, "src_lang is not supported: this model was not trained on several directions"),
            ({"tgt_lang": "de"}, "tgt_lang is not supported"),
            ({"framework": "tf"}, "framework can only be 'pt'"),
        ],
    )
    def test_what_is_not_there_is_refused_with_what_replaces_it(self, pipe, model, tokenizer, option, message):
        with pytest.raises(ValueError, match=message):
            pipe("One.", **option)
        with pytest.raises(ValueError, match=message):
            list(pipe.stream("One.", **option))
        with pytest.raises(ValueError, match=message):
            TranslationPipeline(model=model, tokenizer=tokenizer, device="cpu", **option)

    @pytest.mark.parametrize("truncation", [True, "longest_first", "only_first"])
    def test_truncation_cuts_what_learned_positions_do_not_reach(self, tiny_model, tokenizer, truncation):
        model = tiny_model(vocab_size=len(tokenizer), position_embedding_type="learned", max_position_embeddings=8)
        pipe = TranslationPipeline(model=model, tokenizer=tokenizer, device="cpu")
        text = "Nevertheless, notwithstanding."
        ids = tokenizer(text)["input_ids"]
        assert len(ids) > 8
        cut = torch.tensor([[*ids[:7], tokenizer.eos_token_id]])
        expected = tokenizer.decode(model.generate(cut, num_beams=1)[0], skip_special_tokens=True)
        assert pipe(text, truncation=truncation, num_beams=1) == [{"translation_text": expected}]
        assert "".join(pipe.stream(text, truncation=truncation)) == expected
        # What fits is not cut, and nothing is without learned positions.
        assert pipe("One.", truncation=True) == pipe("One.")

    def test_truncation_cuts_nothing_of_a_model_with_sinusoids(self, pipe):
        assert pipe(TEXTS, truncation=True) == pipe(TEXTS, truncation="do_not_truncate") == pipe(TEXTS)

    def test_spaces_are_cleaned_up_as_the_tokenizer_does(self, tiny_model):
        tokenizer = train_tokenizer([TEXT, *SPLITS], 400, "unigram")
        pipe = TranslationPipeline(model=tiny_model(vocab_size=len(tokenizer)), tokenizer=tokenizer, device="cpu")
        written = tokenizer("Who , me ? No .", return_tensors="pt")["input_ids"]
        pipe.model.generate = lambda **options: written
        assert pipe("One.") == [{"translation_text": "Who , me ? No ."}]
        assert pipe("One.", clean_up_tokenization_spaces=True) == [{"translation_text": "Who, me? No."}]
        always = TranslationPipeline(
            model=pipe.model, tokenizer=tokenizer, device="cpu", clean_up_tokenization_spaces=True
        )
        assert always("One.") == [{"translation_text": "Who, me? No."}]
        assert always("One.", clean_up_tokenization_spaces=False) == [{"translation_text": "Who , me ? No ."}]


class TestStreaming:
    @pytest.mark.parametrize("text", [*TEXTS, "你好。我很好。"])
    @pytest.mark.parametrize("options", [{}, {"split_sentences": False}], ids=str)
    def test_the_pieces_are_the_greedy_translation(self, pipe, text, options):
        pieces = list(pipe.stream(text, max_new_tokens=20, **options))
        assert "" not in pieces
        assert "".join(pieces) == pipe(text, num_beams=1, max_new_tokens=20, **options)[0]["translation_text"]

    def test_a_piece_comes_before_the_sentence_is_decoded(self, pipe):
        steps = []

        def slow(ids, scores):
            steps.append(ids.shape[1])
            time.sleep(0.02)
            return scores

        stream = pipe.stream("Who goes there?", logits_processor=[slow], max_new_tokens=30, min_new_tokens=30)
        next(stream)
        seen = len(steps)
        assert len(list(stream)) > 5
        assert seen < len(steps) == 30

    def test_sampling_can_be_streamed(self, pipe):
        torch.manual_seed(0)
        first = "".join(pipe.stream("Who goes there?", do_sample=True))
        torch.manual_seed(0)
        assert first == "".join(pipe.stream("Who goes there?", do_sample=True))
        assert first != "".join(pipe.stream("Who goes there?"))

    @pytest.mark.parametrize(
        ("options", "message"), [({"num_beams": 4}, "only one beam"), ({"nonsense": 1}, "nonsense")]
    )
    def test_an_error_of_the_thread_reaches_the_caller(self, pipe, options, message):
        with pytest.raises(ValueError, match=message):
            list(pipe.stream("One.", **options))


class TestLoading:
    @pytest.fixture
    def folder(self, model, tokenizer, tmp_path):
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_the_task_is_known_once_the_package_is_imported(self, pipe, folder):
        loaded = pipeline("translation", model=str(folder), device="cpu")
        assert type(loaded) is TranslationPipeline
        assert loaded(TEXTS) == pipe(TEXTS)

    def test_a_saved_pipeline_has_its_code_and_a_model_saved_after_it_has_none(self, pipe, model, tmp_path):
        pipe.save_pretrained(tmp_path / "pipeline")
        modules = {"pipeline.py", "pipeline_batches.py", "pipeline_sentences.py", "loading.py", "decoding_arguments.py"}
        assert {path.name for path in (tmp_path / "pipeline").glob("*.py")} == modules
        for options in ({"trust_remote_code": True}, {"pipeline_class": TranslationPipeline}):
            loaded = pipeline("translation", model=str(tmp_path / "pipeline"), device="cpu", **options)
            assert loaded(TEXTS) == pipe(TEXTS)
        model.save_pretrained(tmp_path / "model")
        assert not list((tmp_path / "model").glob("*.py"))
        assert "custom_pipelines" not in (tmp_path / "model" / "config.json").read_text()

    def test_a_folder_with_all_code_needs_no_package(self, pipe, folder, tmp_path, monkeypatch):
        # What register_for_auto_class() sets, for this test alone.
        monkeypatch.setattr(VanillaTransformerConfig, "_auto_class", "AutoConfig")
        monkeypatch.setattr(VanillaTransformerForConditionalGeneration, "_auto_class", "AutoModelForSeq2SeqLM")
        pipeline("translation", model=str(folder), device="cpu").save_pretrained(tmp_path / "published")
        load = (
            "import sys, json; sys.modules['vanilla_transformer'] = None;"  # an import of it fails
            "from transformers import pipeline;"
            "pipe = pipeline(model=sys.argv[1], trust_remote_code=True, device='cpu');"
            "print(json.dumps(pipe(json.loads(sys.argv[2])))); print(json.dumps(list(pipe.stream('One.'))))"
        )
        translated, streamed = run_new_python(
            load, tmp_path / "published", json.dumps(TEXTS), cwd=tmp_path
        ).splitlines()
        assert json.loads(translated) == pipe(TEXTS)
        assert json.loads(streamed) == list(pipe.stream("One."))

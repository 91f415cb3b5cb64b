"""The tokenizer: any text comes back exactly, wherever it was saved and loaded."""

import copy
import functools
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import run_new_python
from tokenizers import AddedToken, decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training.data.bpe_dropout import BpeDropout
from vanilla_transformer.training.data.encoding import word_lengths


SENTENCES = [
    "Two young, White males are outside near many bushes.",
    "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    "On 12 March 2024 we paid 1,234.50 for it.",
    "Am 12. März 2024 zahlten wir dafür 1.234,50.",
    "彼は1984年に東京で生まれた。",
] * 20
VOCAB_SIZE = 330
MODELS = ("bpe", "unigram")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

PIECES = [" ", "  ", "\n", "\t", "\r", "\x00", "\u2028", "▁", "Ġ", "e\u0301", "é", "👩‍👩‍👧", "bushes", "12"]

PIECES = [" ", "  ", "\n", "\t", "\r", "\x00", "\u2028", "▁", "Ġ", "e\u0301", "é", "👩\u200d👧", "bushes", "12"]

# Surrogates are halves of characters: no text, and no UTF-8.
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.text(CHARACTERS) | st.lists(st.sampled_from([*SPECIAL, *PIECES])).map("".join)

# Unicode's white space. `str.split` takes four more control characters for it.
WHITE_SPACE = re.compile(r"[^\S\x1c-\x1f]+")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Name -> tokenizer: each model as it was trained, and as it comes back from a folder."""
    found = {}
    for model in MODELS:
        for pretokenized in (False, True):
            name = f"{model}-pretokenized" if pretokenized else model
            folder = tmp_path_factory.mktemp(name)
            found[name] = train_tokenizer(SENTENCES, VOCAB_SIZE, model, pretokenized)
            found[name].save_pretrained(folder)
            found[f"{name}-loaded"] = AutoTokenizer.from_pretrained(folder)
    return found


NAMES = [f"{model}{loaded}" for model in MODELS for loaded in ("", "-loaded")]
PRETOKENIZED_NAMES = [f"{model}-pretokenized{loaded}" for model in MODELS for loaded in ("", "-loaded")]
every_text = pytest.mark.parametrize("name", NAMES)
every_pretokenized = pytest.mark.parametrize("name", PRETOKENIZED_NAMES)


@pytest.mark.parametrize("name", NAMES + PRETOKENIZED_NAMES)
def test_special_ids_are_those_of_the_config(tokenizers, name):
    tokenizer = tokenizers[name]
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (0, 1, 2, 3)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == SPECIAL


@every_text
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example("")
@example(" ")
@example("  two  spaces  ")
@example("</s>")
@example("a<s> b </s>\n")
@example("it 's n't I 'm , . do n't")
def test_any_text_comes_back_exactly(tokenizers, name, text):
    tokenizer = tokenizers[name]
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert not set(ids[:-1]) & {0, 1, 2, 3}, "a text has neither special nor unknown subwords"
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [text]


@every_text
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_a_padded_batch_is_its_texts(tokenizers, name, texts):
    tokenizer = tokenizers[name]
    batch = tokenizer(texts, text_target=texts, padding=True)
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == texts
    assert batch["labels"] == batch["input_ids"]


@every_pretokenized
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_pretokenized_text_comes_back_as_words_with_one_space_between(tokenizers, name, text):
    tokenizer = tokenizers[name]
    ids = tokenizer(text)["input_ids"]
    assert not set(ids[:-1]) & {0, 1, 2, 3}
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(filter(None, WHITE_SPACE.split(text)))


@every_pretokenized
def test_no_subword_of_pretokenized_text_crosses_a_word_boundary(tokenizers, name):
    tokenizer = tokenizers[name]
    for sentence in SENTENCES[:5]:
        apart = [id_ for word in sentence.split() for id_ in tokenizer(word, add_special_tokens=False)["input_ids"]]
        assert tokenizer(sentence, add_special_tokens=False)["input_ids"] == apart


@every_text
def test_digits_stand_alone(tokenizers, name):
    tokenizer = tokenizers[name]
    pieces = [tokenizer.decode([id_]) for id_ in range(4, len(tokenizer))]
    assert [piece for piece in pieces if any(map(str.isdigit, piece)) and len(piece) > 1] == []
    digits = tokenizer("in 2024", add_special_tokens=False)["input_ids"][-4:]
    assert [tokenizer.decode([id_]) for id_ in digits] == list("2024")


@pytest.mark.parametrize(("model", "size"), [("bpe", 260), ("bpe", 300), ("unigram", 261), ("unigram", 280)])
def test_the_vocabulary_has_the_size_that_was_asked_for(model, size):
    assert len(train_tokenizer(SENTENCES, size, model)) == size


@pytest.mark.parametrize("model", MODELS)
def test_a_small_text_gives_a_smaller_vocabulary(model):
    assert 260 < len(train_tokenizer(SENTENCES, 5000, model)) < 1000


@pytest.mark.parametrize("model", MODELS)
def test_training_is_repeatable(model):
    first, second = (train_tokenizer(SENTENCES, VOCAB_SIZE, model) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_another_process_loads_the_same_ids(tokenizers, tmp_path):
    tokenizer = tokenizers["unigram"]
    tokenizer.save_pretrained(tmp_path)
    program = (
        "import json, sys; from transformers import AutoTokenizer; "
        "print(json.dumps(AutoTokenizer.from_pretrained(sys.argv[1])(json.loads(sys.argv[2]))['input_ids']))"
    )
    texts = [*SENTENCES[:5], "</s> ▁ 👩‍👩‍👧"]
    answer = run_new_python(program, tmp_path, json.dumps(texts), cwd=tmp_path)
    assert json.loads(answer) == tokenizer(texts)["input_ids"]


@pytest.mark.parametrize(
    ("texts", "vocab_size", "model", "message"),
    [
        (SENTENCES, 1000, "wordpiece", "'wordpiece' is unknown.*bpe, unigram"),
        (SENTENCES, 259, "bpe", "vocab_size=259 must be at least 260"),
        (SENTENCES, 260, "unigram", "vocab_size=260 must be at least 261"),
        ([], 1000, "bpe", "empty"),
        ([], 1000, "unigram", "empty"),
        (["", ""], 1000, "bpe", "empty"),
        (["", "  "], 1000, "unigram", "empty"),
    ],
)
def test_bad_arguments_are_refused(texts, vocab_size, model, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, vocab_size, model)


TAG = "<2de>"
WAYS_TO_ADD = {
    "add_tokens": lambda tokenizer: tokenizer.add_tokens([TAG], special_tokens=True),
    "AddedToken": lambda tokenizer: tokenizer.add_tokens(AddedToken(TAG, special=True)),
    "extra_special_tokens": lambda tokenizer: tokenizer.add_special_tokens({"extra_special_tokens": [TAG]}),
    "additional_special_tokens": lambda tokenizer: tokenizer.add_special_tokens({"additional_special_tokens": [TAG]}),
    "mask_token": lambda tokenizer: tokenizer.add_special_tokens({"mask_token": TAG}),
}


@pytest.fixture(scope="module", params=[(model, words) for model in MODELS for words in (False, True)], ids=str)
def trained(request):
    """Makes a tokenizer of each kind, a new one at each call."""
    model, pretokenized = request.param
    serialized = train_tokenizer(SENTENCES, VOCAB_SIZE, model, pretokenized)
    return lambda: copy.deepcopy(serialized)


class TestTokensThatAUserAdds:
    """A language tag is one token wherever it stands, though text cannot write `</s>`."""

    @pytest.mark.parametrize("way", WAYS_TO_ADD)
    @pytest.mark.parametrize("load", [None, AutoTokenizer, PreTrainedTokenizerFast], ids=str)
    def test_a_special_one_is_one_token(self, trained, way, load, tmp_path):
        tokenizer = trained()
        size = len(tokenizer)
        assert WAYS_TO_ADD[way](tokenizer) == 1
        if load is not None:
            tokenizer.save_pretrained(tmp_path)
            # The last as where this package is not installed, which then splits special tokens that have a name.
            tokenizer = load.from_pretrained(tmp_path)
            if load is PreTrainedTokenizerFast and way == "mask_token":
                return
        assert len(tokenizer) == size + 1
        assert tokenizer.convert_tokens_to_ids(TAG) == size
        for text in (f"{TAG} bushes", f"many {TAG} bushes", f"many {TAG}", TAG, f"a{TAG}b", f"{TAG}{TAG} </s><s> 12"):
            encoded = tokenizer(text, text_target=text)
            assert encoded["input_ids"] == encoded["labels"]
            ids = encoded["input_ids"]
            assert ids[-1] == 2
            assert ids.count(size) == text.count(TAG)
            assert not set(ids[:-1]) & {0, 1, 2, 3}
        assert tokenizer("bushes")["input_ids"] == trained()("bushes")["input_ids"]

    @pytest.mark.parametrize("add", WAYS_TO_ADD.values(), ids=WAYS_TO_ADD)
    @pytest.mark.parametrize("loaded", [False, True])
    def test_decoding_gives_back_the_text_and_skips_the_tag(self, trained, add, loaded, tmp_path):
        tokenizer = trained()
        add(tokenizer)
        if loaded:
            tokenizer.save_pretrained(tmp_path)
            tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        words = tokenizer.backend_tokenizer.normalizer is None
        for text in (f"{TAG} bushes", f"many {TAG} bushes ", f"  many {TAG}", TAG, f"a{TAG}b", f"{TAG}{TAG} </s> 1"):
            ids = tokenizer(text)["input_ids"]
            bare = text.replace(TAG, "")
            expected = " ".join(text.replace(TAG, " ").split()) if words else bare
            assert tokenizer.decode(ids, skip_special_tokens=True) == expected
            assert tokenizer.batch_decode([ids, ids], skip_special_tokens=True) == [expected] * 2
            if not words:
                assert tokenizer.decode(ids[:-1]) == text
            else:
                assert tokenizer.decode(ids[:-1]) == " ".join(text.replace(TAG, f" {TAG} ").split())

    @settings(max_examples=100, deadline=None)
    @given(texts=st.lists(TEXTS, min_size=1, max_size=4))
    def test_any_text_between_tags_comes_back_exactly(self, texts):
        tokenizer = tagged()
        text = TAG.join(texts)
        ids = tokenizer(text)["input_ids"]
        assert ids.count(VOCAB_SIZE) == text.count(TAG)
        assert tokenizer.decode(ids[:-1]) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace(TAG, "")

    def test_an_ordinary_one_stays_in_the_text(self, trained):
        tokenizer = trained()
        size = len(tokenizer)
        tokenizer.add_tokens(["©DE"])
        for text in ("©DE bushes", "many©DEbushes"):
            ids = tokenizer(text)["input_ids"]
            assert ids.count(size) == 1
            assert "©DE" in tokenizer.decode(ids, skip_special_tokens=True)

    def test_bpe_dropout_keeps_it_whole(self):
        tokenizer = tagged()
        encoded = tokenizer([f"{TAG} many bushes {TAG}"])
        (ids,), (words,) = encoded["input_ids"], word_lengths(encoded)
        cut = BpeDropout(tokenizer, 1.0)(ids, words, key=0)
        assert len(cut) > len(ids)
        assert cut.count(VOCAB_SIZE) == 2
        assert tokenizer.decode(cut, skip_special_tokens=True) == " many bushes "


@functools.cache
def tagged():
    """A BPE tokenizer with the tag."""
    tokenizer = train_tokenizer(SENTENCES, VOCAB_SIZE)
    tokenizer.add_tokens([TAG], special_tokens=True)
    return tokenizer


def test_nothing_but_special_tokens_decodes_to_no_text():
    tokenizer = train_tokenizer(["one two"], 300)
    # This decoder of `tokenizers` panics without tokens.
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""

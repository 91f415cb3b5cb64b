"""The tokenizer of a model of many languages: a token of the target language before each source."""

import copy
import functools
import itertools
import json
import pickle

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vanilla_transformer import VanillaTransformerTokenizer, train_tokenizer
from vanilla_transformer.training.data.languages import add_tags
from vanilla_transformer.training.data.rows import learn_tokenizer
from vanilla_transformer.training.errors import RecipeError
from vanilla_transformer.training.settings.arguments import TokenizerArguments


TEXTS = ["Who goes there?", "It is me, and many others", "<2de> is text", "</s>", "Wer da?"]
EN, DE, FR = "<2en>", "<2de>", "<2fr>"
LANGUAGES = ["de", "en", "fr"]


trained = functools.cache(train_tokenizer)


def bilingual(model: str = "bpe", pretokenized: bool = False) -> VanillaTransformerTokenizer:
    return copy.deepcopy(trained(tuple(TEXTS * 5), 300, model, pretokenized))


def multilingual(model: str = "bpe", pretokenized: bool = False) -> VanillaTransformerTokenizer:
    tokenizer = bilingual(model, pretokenized)
    assert tokenizer.add_languages(LANGUAGES, ["cs", *LANGUAGES]) == 3
    return tokenizer


@pytest.fixture(params=itertools.product(("bpe", "unigram"), (False, True)), ids=str)
def both(request):
    """A tokenizer without languages, and the same with three."""
    return bilingual(*request.param), multilingual(*request.param)


class TestTokenizer:
    def test_a_source_is_the_token_of_its_target_language_then_what_it_was_before(self, both):
        plain, tokenizer = both
        size = len(plain)
        assert tokenizer.lang_code_to_id == {"de": size, "en": size + 1, "fr": size + 2}
        assert tokenizer.convert_ids_to_tokens([size, size + 1, size + 2]) == [DE, EN, FR]
        for number, language in enumerate(LANGUAGES):
            tokenizer.tgt_lang = language
            encoded = tokenizer(TEXTS, text_target=TEXTS)
            assert encoded["input_ids"] == [[size + number, *ids] for ids in plain(TEXTS)["input_ids"]]
            assert encoded["labels"] == plain(TEXTS)["input_ids"]
            assert tokenizer(text_target=TEXTS)["input_ids"] == plain(TEXTS)["input_ids"]
            # And sources again: encoding targets leaves nothing behind.
            assert tokenizer(TEXTS[0])["input_ids"] == encoded["input_ids"][0]
            assert tokenizer.get_lang_id(language) == size + number
            bare = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
            assert bare == plain(TEXTS, add_special_tokens=False)["input_ids"]

    def test_each_row_has_its_own_language(self, both):
        plain, tokenizer = both
        languages = ["fr", "de", "fr", "en", "de"]
        expected = [
            [tokenizer.lang_code_to_id[language], *ids]
            for language, ids in zip(languages, plain(TEXTS)["input_ids"], strict=True)
        ]
        for default in (None, "en"):
            tokenizer.tgt_lang = default
            assert tokenizer(TEXTS, tgt_lang=languages, text_target=TEXTS)["input_ids"] == expected
            assert tokenizer(TEXTS, tgt_lang="fr")["input_ids"] == [
                [tokenizer.lang_code_to_id["fr"], *row[1:]] for row in expected
            ]
            assert tokenizer(TEXTS[1], tgt_lang="de")["input_ids"] == expected[1]
            assert tokenizer.tgt_lang == default

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("options", [{}, {"truncation": True, "max_length": 6}], ids=["whole", "truncated"])
    def test_a_mixed_batch_is_padded_and_cut_like_the_rows_alone(self, both, side, options):
        _, tokenizer = both
        languages = ["fr", "de", "fr", "en", "de"]
        alone = [
            tokenizer(text, tgt_lang=language, **options)["input_ids"]
            for text, language in zip(TEXTS, languages, strict=True)
        ]
        padded = tokenizer.pad({"input_ids": alone}, padding_side=side, return_tensors="pt")
        together = tokenizer(TEXTS, tgt_lang=languages, padding=True, padding_side=side, return_tensors="pt", **options)
        assert together.keys() == padded.keys()
        assert all(together[name].equal(padded[name]) for name in padded)
        single = tokenizer(TEXTS[0], tgt_lang="fr", return_tensors="pt", **options)
        assert single["input_ids"].tolist() == alone[:1]

    def test_words_and_tokens_of_a_mixed_batch_are_those_of_its_rows(self, both):
        _, tokenizer = both
        together = tokenizer(TEXTS[:2], tgt_lang=["fr", "de"])
        together = pickle.loads(pickle.dumps(together))
        for row, (text, language) in enumerate(zip(TEXTS, ["fr", "de"], strict=False)):
            tokenizer.tgt_lang = language
            alone = tokenizer([text])
            assert together.tokens(row) == alone.tokens(0)
            assert together.word_ids(row) == alone.word_ids(0)
            assert together.encodings[row].ids == alone.encodings[0].ids
            assert together.encodings[row].offsets == alone.encodings[0].offsets

    def test_the_pieces_of_a_long_text_have_its_language(self):
        tokenizer = multilingual()
        options = {"truncation": True, "max_length": 6, "return_overflowing_tokens": True}
        found = tokenizer(TEXTS[:2], tgt_lang=["fr", "de"], **options)
        owners = found["overflow_to_sample_mapping"]
        assert owners.count(1) > 1
        expected = [tokenizer.lang_code_to_id[["fr", "de"][owner]] for owner in owners]
        assert [ids[0] for ids in found["input_ids"]] == expected

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.sampled_from([DE, EN, FR, "<2", "de>", " ", "a", "</s>", "<pad>"]) | st.text(max_size=3)).map(
            "".join
        )
    )
    def test_no_text_forges_a_language(self, text):
        if any("\ud800" <= character <= "\udfff" for character in text):
            return
        tokenizer = cached()
        ids = tokenizer(text)["input_ids"]
        assert [place for place, token in enumerate(ids) if token in tokenizer.all_special_ids] == [0, len(ids) - 1]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    def test_saved_and_loaded_it_is_the_same(self, both, tmp_path):
        _, tokenizer = both
        tokenizer.src_lang, tokenizer.tgt_lang = "cs", "fr"
        tokenizer.save_pretrained(tmp_path / "saved")
        loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
        for found in (loaded, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
            assert (found.languages, found.source_languages) == (LANGUAGES, ["cs", *LANGUAGES])
            assert (found.src_lang, found.tgt_lang) == ("cs", "fr")
            assert found(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
            assert found(TEXTS, tgt_lang="de")["input_ids"] == tokenizer(TEXTS, tgt_lang="de")["input_ids"]
            assert found.decode(found(TEXTS[0])["input_ids"], skip_special_tokens=True) == TEXTS[0]
            assert len(found) == len(tokenizer)
        loaded.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (
            tmp_path / "saved" / "tokenizer.json"
        ).read_bytes()
        other = AutoTokenizer.from_pretrained(tmp_path / "saved", tgt_lang="de")
        assert other(TEXTS)["input_ids"] == tokenizer(TEXTS, tgt_lang="de")["input_ids"]

    def test_without_this_class_a_saved_direction_still_holds(self, both, tmp_path):
        _, tokenizer = both
        tokenizer.tgt_lang = "fr"
        tokenizer.save_pretrained(tmp_path)
        stranger = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        ids = stranger(TEXTS)["input_ids"]
        assert ids == tokenizer(TEXTS)["input_ids"]
        assert stranger.batch_decode(ids, skip_special_tokens=True) == tokenizer.batch_decode(
            ids, skip_special_tokens=True
        )
        assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXTS[0]).ids == ids[0]

    def test_without_languages_nothing_is_written_of_them(self, tmp_path):
        bilingual().save_pretrained(tmp_path)
        written = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert not {"languages", "source_languages", "src_lang", "tgt_lang"} & set(written)

    def test_the_convention_of_transformers_translation_pipelines(self):
        """What transformers 4's pipeline and optimum call for M2M100 and NLLB."""
        tokenizer = multilingual()
        found = tokenizer._build_translation_inputs(
            TEXTS[:2], return_tensors="pt", padding=True, truncation=False, src_lang="en", tgt_lang="fr"
        )
        expected = tokenizer(TEXTS[:2], tgt_lang="fr", padding=True, return_tensors="pt")
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in found)

    def test_a_language_that_a_user_had_as_a_tag_keeps_its_id(self):
        """Such a tag stood in the text before; now no text writes it."""
        tokenizer = bilingual()
        tokenizer.add_tokens([DE], special_tokens=True)
        place = tokenizer.convert_tokens_to_ids(DE)
        assert tokenizer(f"{DE}a")["input_ids"][0] == place
        assert tokenizer.add_languages(["de", "fr"]) == 1
        assert tokenizer.lang_code_to_id == {"de": place, "fr": place + 1}
        assert tokenizer(f"{DE}a", tgt_lang="de")["input_ids"].count(place) == 1
        assert tokenizer.decode(tokenizer(f"{DE}a", tgt_lang="de")["input_ids"], skip_special_tokens=True) == f"{DE}a"

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda t: t("a", tgt_lang="xx"), "tgt_lang='xx' is unknown: choose one of de, en, fr"),
            (lambda t: t(["a", "b"], tgt_lang=["de", "cs"]), "tgt_lang='cs' is unknown: choose one of de, en, fr"),
            (lambda t: t("a", src_lang="xx", tgt_lang="de"), "src_lang='xx' is unknown: choose one of cs, de, en, fr"),
            (lambda t: setattr(t, "tgt_lang", "xx"), "tgt_lang='xx' is unknown: choose one of de, en, fr"),
            (lambda t: setattr(t, "src_lang", "xx"), "src_lang='xx' is unknown: choose one of cs, de, en, fr"),
            (lambda t: t.get_lang_id("cs"), "language='cs' is unknown: choose one of de, en, fr"),
            (lambda t: t(["a", "b"], tgt_lang=["de"]), "tgt_lang has 1 languages for 2 texts: give one for each"),
            (lambda t: t("a"), "tgt_lang is not set: choose one of de, en, fr"),
            (lambda t: t.add_languages(["d e"]), "language 'd e' is not a code such as de, pt-BR or zh_Hans"),
            (lambda t: bilingual()("a", tgt_lang="de"), "tgt_lang='de', but this model translates in one direction"),
            (
                lambda t: setattr(bilingual(), "src_lang", "de"),
                "src_lang='de', but this model translates in one direct",
            ),
        ],
    )
    def test_a_wrong_language_is_an_error_that_lists_the_known_ones(self, call, message):
        with pytest.raises(ValueError, match=message):
            call(multilingual())


@functools.cache
def cached():
    tokenizer = multilingual()
    tokenizer.tgt_lang = "fr"
    return tokenizer


class TestTags:
    @pytest.mark.parametrize("loaded", [False, True])
    def test_a_tag_before_a_source_is_one_token_and_takes_its_space(self, loaded, tmp_path):
        plain, tokenizer = multilingual(), multilingual()
        add_tags(tokenizer, ["<formal>"])
        if loaded:
            tokenizer.save_pretrained(tmp_path)
            tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        tag = len(plain)
        assert tokenizer.convert_tokens_to_ids("<formal>") == tag
        for text in TEXTS:
            language, *ids = plain(text, tgt_lang="de")["input_ids"]
            for written in (f"<formal>{text}", f"<formal> {text}", f"<formal>  {text}"):
                assert tokenizer(written, tgt_lang="de")["input_ids"] == [language, tag, *ids]
            assert tokenizer.decode([language, tag, *ids], skip_special_tokens=True) == text
        # As before, where they are there already.
        add_tags(tokenizer, ["<formal>"])
        assert len(tokenizer) == tag + 1

    @pytest.mark.parametrize("tag", ["formal", "", "<a b>", "<2de>", "</s>", "< >"])
    def test_what_cannot_be_a_tag_is_refused(self, tag):
        with pytest.raises(RecipeError, match=r"tags: .* cannot be a tag: give a word in angle brackets"):
            add_tags(multilingual(), [tag])

    def test_no_subword_is_learned_from_them(self):
        texts = [f"<formal>{text}" for text in TEXTS] * 5
        rows = Dataset.from_dict({"source": texts, "target": TEXTS * 5})
        bare = Dataset.from_dict({"source": TEXTS * 5, "target": TEXTS * 5})
        with_tags = learn_tokenizer(TokenizerArguments(vocab_size=300, tags=["<formal>"]), rows)
        without = learn_tokenizer(TokenizerArguments(vocab_size=300), bare)
        assert with_tags.get_vocab() == without.get_vocab()

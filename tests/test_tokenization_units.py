"""Tokenizers of characters and words: the tokens are what Python's own splitting gives, and the text comes back."""

import copy
import logging
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vanilla_transformer import train_unit_tokenizer
from vanilla_transformer.training.errors import RecipeError
from vanilla_transformer.training.evaluate import main as evaluate
from vanilla_transformer.training.settings.arguments import TokenizerArguments
from vanilla_transformer.training.train import main as train
from vanilla_transformer_commands.info import main as info
from vanilla_transformer_commands.tokenizer import main as learn
from vanilla_transformer_commands.translate import main as translate


# Letters that are phones too, phones of two characters, and combining marks.
PAIRS = [("schaap", "s x aː p"), ("kat", "k ɑ t"), ("école", "e k ɔ l"), ("ba\u0323n", "ɓ a ː n"), ("a b", "aː b")]
KINDS = [(source, target) for source in ("characters", "words") for target in ("characters", "words")]
# Unicode's white space. `str.split` takes four more control characters for it.
WHITE_SPACE = re.compile(r"[^\S\x1c-\x1f]+")
SPLIT = {"characters": list, "words": lambda text: list(filter(None, WHITE_SPACE.split(text)))}
JOIN = {"characters": "".join, "words": " ".join}
TEXTS = st.text("aːbkt ▁_\n\u2028\u0323é👩\x1c", max_size=12)


@pytest.fixture(scope="module", params=KINDS, ids=" to ".join)
def kinds(request):
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["learned", "loaded"])
def tokenizer(request, kinds, tmp_path_factory):
    learned = train_unit_tokenizer(PAIRS, 1000, *kinds)
    if not request.param:
        return learned
    folder = tmp_path_factory.mktemp("saved")
    learned.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_each_unit_of_each_side_is_one_token(tokenizer, kinds):
    for text, text_target in PAIRS:
        encoded = tokenizer(text, text_target=text_target)
        for ids, side, units in zip((encoded["input_ids"], encoded["labels"]), (text, text_target), kinds, strict=True):
            assert ids[-1] == tokenizer.eos_token_id
            assert [tokenizer.decode([number]) for number in ids[:-1]] == SPLIT[units](side)
        assert tokenizer(text_target=text_target)["input_ids"] == encoded["labels"]
        assert tokenizer(text)["input_ids"] == encoded["input_ids"], "after a target, it splits sources again"


def test_the_vocabulary_holds_the_units_and_no_more(tokenizer, kinds):
    found = set()
    for pair in PAIRS:
        for units, side in zip(kinds, pair, strict=True):
            found |= {(units, unit) for unit in SPLIT[units](side)}
    assert len(tokenizer) == 4 + len(found)
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (0, 1, 2, 3)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
@pytest.mark.parametrize("units", KINDS, ids=" to ".join)
def test_any_text_of_known_units_comes_back(units, text):
    tokenizer = train_unit_tokenizer([(text + " a", text + " a")], 1000, *units)
    encoded = tokenizer(text, text_target=text)
    for ids, kind in zip((encoded["input_ids"], encoded["labels"]), units, strict=True):
        assert not set(ids[:-1]) & {0, 1, 2, 3}
        expected = JOIN[kind](SPLIT[kind](text)).replace("▁", "_")
        assert tokenizer.decode(ids, skip_special_tokens=True) == expected


def test_only_sources_have_the_token_of_a_language(kinds, tmp_path):
    plain, tokenizer = (train_unit_tokenizer(PAIRS, 1000, *kinds) for _ in range(2))
    tokenizer.add_languages(["nl", "fr"])
    tokenizer.tgt_lang = "nl"
    tokenizer.save_pretrained(tmp_path)
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for source, target in PAIRS:
            ids = plain(source)["input_ids"]
            # A target between two sources.
            assert found(source)["input_ids"] == [found.get_lang_id("nl"), *ids]
            assert found(text_target=target)["input_ids"] == plain(text_target=target)["input_ids"]
            assert found(source, tgt_lang="fr")["input_ids"] == [found.get_lang_id("fr"), *ids]


def test_special_tokens_cannot_be_written():
    tokenizer = train_unit_tokenizer([("</s>", "<pad> </s>")], 1000, "characters", "words")
    encoded = tokenizer("</s>", text_target="<pad> </s>")
    assert len(encoded["input_ids"]) == 5
    assert len(encoded["labels"]) == 3
    assert not set(encoded["input_ids"][:-1] + encoded["labels"][:-1]) & {0, 1, 2, 3}


def test_what_the_vocabulary_lacks_is_unknown():
    tokenizer = train_unit_tokenizer(PAIRS, 1000, "characters", "words")
    encoded = tokenizer("kxt", text_target="k aː q")  # x is a phone, not a letter
    assert [number == 3 for number in encoded["input_ids"]] == [False, True, False, False]
    assert [number == 3 for number in encoded["labels"]] == [False, False, True, False]


def test_a_limit_keeps_the_most_frequent():
    tokenizer = train_unit_tokenizer([("aaab", "bbc")], 6)
    assert tokenizer.convert_ids_to_tokens([4, 5]) == ["a", "b"]
    assert len(tokenizer) == 6
    with pytest.raises(ValueError, match="vocab_size=4 must be at least 5"):
        train_unit_tokenizer(PAIRS, 4)


def test_sources_are_split_and_targets_joined_without_this_package(tmp_path):
    tokenizer = train_unit_tokenizer(PAIRS, 1000, "characters", "words")
    tokenizer.save_pretrained(tmp_path)
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for source, target in PAIRS:
        assert plain(source)["input_ids"] == tokenizer(source)["input_ids"]
        labels = tokenizer(text_target=target)["input_ids"]
        assert plain.decode(labels, skip_special_tokens=True) == target


def test_a_copy_and_a_tag_of_the_user_work():
    tokenizer = copy.deepcopy(train_unit_tokenizer(PAIRS, 1000, "characters", "words"))
    tokenizer.add_tokens(["<dut>"], special_tokens=True)
    ids = tokenizer("<dut>kat")["input_ids"]
    assert ids == [len(tokenizer) - 1, *tokenizer("kat")["input_ids"]]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "kat"
    labels = tokenizer(text_target="<dut> k ɑ t")["input_ids"]
    assert tokenizer.decode(labels, skip_special_tokens=True) == "k ɑ t"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_tokenizer_model": "words"}, "tokenizer_model=bpe do not go together: both must be characters or"),
        ({"tokenizer_model": "words", "target_tokenizer_model": "unigram"}, "target_tokenizer_model=unigram and"),
        ({"tokenizer_model": "words", "pretokenized": True}, "is for subwords, but tokenizer_model=words"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        TokenizerArguments(**fields)


def test_from_spelling_to_sound_by_every_program(tmp_path, monkeypatch, capsys, caplog):
    """Files of words and phones without a header are trained on, scored and translated."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{a}{b}\t{a.upper()}ː {b.upper()}\n" for a in "abcdefgh" for b in "klmnop")
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.tsv").write_text(rows, encoding="utf-8")
    options = "--source_column 1 --target_column 2 --tokenizer_model characters --target_tokenizer_model words"
    files = "--train_file train.tsv --validation_file dev.tsv --test_file test.tsv --output_dir run"
    network = (
        "--d_model 32 --encoder_layers 1 --decoder_layers 1 --encoder_ffn_dim 32 --decoder_ffn_dim 32 --dropout 0 "
        "--encoder_attention_heads 2 --decoder_attention_heads 2 --label_smoothing 0 --max_steps 120 "
        "--learning_rate 0.01 --warmup_steps 10 --metric_for_best_model exact_match --num_beams 2 --report_to none"
    )
    steps = "--eval_strategy steps --eval_steps 60 --save_strategy steps --save_steps 60"
    with caplog.at_level(logging.INFO):
        train(f"{options} {files} {network} {steps}".split())
    assert "source characters, target words" in caplog.text
    tokenizer = AutoTokenizer.from_pretrained("run")
    assert len(tokenizer) == 4 + 14 + 14
    capsys.readouterr()
    evaluate(["run", "--test_file", "test.tsv", "--source_column", "1", "--target_column", "2"])
    assert "100.0" in capsys.readouterr().out
    (tmp_path / "words").write_text("ak\nhp\n", encoding="utf-8")
    translate(["run", "--input", "words", "--output", "phones"])
    assert (tmp_path / "phones").read_text(encoding="utf-8") == "Aː K\nHː P\n"
    info(["run"])
    assert "32 characters and words" in capsys.readouterr().out
    learn(f"--output_dir tokenizer --train_file train.tsv {options}".split())
    assert capsys.readouterr().out == "32 characters and words from 48 pairs, saved in tokenizer\n  a | k\n  Aː | K\n"

"""BPE-dropout: its distribution, its dependence on seed, epoch and row, and its use by the Trainer."""

import itertools
import math
import pickle
import random
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training.data.bpe_dropout import BpeDropout, BpeDropoutRows
from vanilla_transformer.training.data.encoding import word_lengths
from vanilla_transformer.training.data.pairs import load_pairs, tokenize_pairs
from vanilla_transformer.training.data.phrasebook import load_phrasebook
from vanilla_transformer.training.errors import DataError, RecipeError
from vanilla_transformer.training.loop.trainer import TranslationTrainer
from vanilla_transformer.training.settings.arguments import DataArguments, TrainingArguments
from vanilla_transformer.training.train import main


ODD_TEXTS = [
    "", " ", "  two  spaces ", "it'sab don't 12.50 €, 3½", "<s> not special </s>", "Größe 日本語 😀 \t x", "a" * 300,
]  # fmt: skip


@pytest.fixture(scope="module")
def texts() -> list[str]:
    phrases = load_phrasebook("en-de", train_size=400)["train"]
    return [*phrases["source"], *phrases["target"], *ODD_TEXTS]


@pytest.fixture(scope="module", params=[False, True], ids=["text", "pretokenized"])
def tokenizer(request, texts) -> PreTrainedTokenizerFast:
    return train_tokenizer(texts, 700, pretokenized=request.param)


def cut_all(tokenizer, texts: list[str], rate: float, seed: int = 0) -> list[list[int]]:
    encoded, cut = tokenizer(texts), BpeDropout(tokenizer, rate)
    rows = zip(encoded["input_ids"], word_lengths(encoded), strict=True)
    return [cut(tokens, words, seed * len(texts) + row) for row, (tokens, words) in enumerate(rows)]


def test_without_dropout_the_tokens_are_the_tokenizers_own(tokenizer, texts):
    own = tokenizer(texts)["input_ids"]
    assert cut_all(tokenizer, texts, 0.0) == own
    # Here the merges are searched for, since one of them is dropped at last, if hardly ever in these texts.
    rare = cut_all(tokenizer, texts * 5, 4e-4)
    changed = sum(cut != tokens for cut, tokens in zip(rare, own * 5, strict=True))
    assert 0 < changed < 0.05 * len(rare)


def test_with_all_merges_dropped_the_tokens_are_bytes(tokenizer, texts):
    for text, tokens in zip(texts, cut_all(tokenizer, texts, 1.0), strict=True):
        assert tokens[-1] == tokenizer.eos_token_id
        own = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert tokenizer.convert_ids_to_tokens(tokens[:-1]) == list("".join(own[:-1]))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_text_stays_and_its_tokens_change(tokenizer, texts, rate):
    own, cut = tokenizer(texts)["input_ids"], cut_all(tokenizer, texts, rate)
    assert tokenizer.batch_decode(cut) == tokenizer.batch_decode(own)
    assert sum(new != old for new, old in zip(cut, own, strict=True)) > 0.2 * len(own)
    assert cut_all(tokenizer, texts, rate) == cut
    assert cut_all(tokenizer, texts, rate, seed=1) != cut


def word_tokenizer(merges: list[tuple[str, str]], **options) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with these merges of single characters, which are not bytes, and an added token."""
    prefix, suffix = (options.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    characters = [f"{before}{letter}{after}" for letter in "abc" for before in {"", prefix} for after in {"", suffix}]
    symbols = ["<unk>", *sorted(characters), *(left + right.removeprefix(prefix) for left, right in merges)]
    vocab = {symbol: number for number, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", **options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken("abba")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def distribution(
    symbols: tuple[str, ...], ranks: dict[tuple[str, str], int], rate: float
) -> dict[tuple[str, ...], float]:
    """The probability of every way to cut a word: algorithm 1 of the paper, written out."""
    possible = sorted((ranks[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in ranks)
    total: dict[tuple[str, ...], float] = defaultdict(float)
    total[symbols] = rate ** len(possible)
    for dropped, (_, place) in enumerate(possible):
        merged = (*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :])
        for cut, share in distribution(merged, ranks, rate).items():
            total[cut] += rate**dropped * (1 - rate) * share
    return total


MERGES = [("a", "a"), ("a", "b"), ("aa", "b"), ("b", "c"), ("ab", "c"), ("aab", "a"), ("c", "a"), ("aab", "c")]


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.8])
def test_every_way_to_cut_a_word_is_as_frequent_as_in_the_paper(rate):
    tokenizer, draws = word_tokenizer(MERGES), 8_000
    text = "aab caabc aaaab"
    rows = [tokenizer.convert_ids_to_tokens(row) for row in cut_all(tokenizer, [text] * draws, rate)]
    words = text.split()
    found = [Counter() for _ in words]
    for row in rows:
        for word, counts in zip(words, found, strict=True):
            cut = []
            while "".join(cut) != word:
                cut.append(row.pop(0))
            counts[tuple(cut)] += 1
    ranks = {pair: rank for rank, pair in enumerate(MERGES)}
    for word, counts in zip(words, found, strict=True):
        expected = distribution(tuple(word), ranks, rate)
        assert math.isclose(sum(expected.values()), 1)
        assert set(counts) <= set(expected)
        for cut, share in expected.items():
            assert abs(counts[cut] / draws - share) < 5 * math.sqrt(share * (1 - share) / draws) + 1e-12


@pytest.mark.parametrize(
    ("merges", "options", "characters"),
    [
        ([("a", "b")], {}, ["a", "b", "c"]),
        ([("a", "##b"), ("ab", "##c")], {"continuing_subword_prefix": "##"}, ["a", "##b", "##c"]),
        ([("b", "c</w>"), ("a", "bc</w>")], {"end_of_word_suffix": "</w>"}, ["a", "b", "c</w>"]),
    ],
)
def test_tokenizers_of_other_makers_are_cut_into_their_characters(merges, options, characters):
    tokenizer = word_tokenizer(merges, **options)
    texts = ["abc abba", "abc? abc"]
    assert cut_all(tokenizer, texts, 0.0) == tokenizer(texts)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(cut_all(tokenizer, ["abc abba"], 1.0)[0]) == [*characters, "abba"]
    assert len(cut_all(tokenizer, ["abc"], 0.0)[0]) == 3 - len(merges)


def test_a_tokenizer_that_does_not_merge_is_refused(texts):
    with pytest.raises(RecipeError, match=r"bpe_dropout=0.1 needs a BPE tokenizer.* of type Unigram"):
        BpeDropout(train_tokenizer(texts, 300, "unigram"), 0.1)


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(DataError, match=f"bpe_dropout={rate} must lie between 0 and 1"):
        load_pairs(DataArguments(dataset="phrasebook:en-de", bpe_dropout=rate))


@pytest.fixture(scope="module")
def bpe(texts) -> PreTrainedTokenizerFast:
    return train_tokenizer(texts, 700)


@pytest.fixture(scope="module")
def make_rows(bpe):
    """Builds the same rows with other dropout."""
    pairs = load_phrasebook("en-de", train_size=60)["train"]

    def make(rate: float = 0.3, seed: int = 7, numbers=range(60), **limits) -> BpeDropoutRows:
        data = DataArguments(bpe_dropout=rate, **limits)
        return BpeDropoutRows(tokenize_pairs(pairs.select(numbers), bpe, data, "train"), bpe, data, seed)

    return make


def read(rows: BpeDropoutRows, epoch: int) -> list[dict[str, list[int]]]:
    rows.set_epoch(epoch)
    return [rows[number] for number in range(len(rows))]


def test_seed_epoch_row_and_side_decide_and_nothing_else_does(make_rows):
    rows = make_rows()
    first = read(rows, 0)
    assert [*itertools.islice(rows, len(rows) + 1)] == first
    random.seed(1)
    torch.manual_seed(1)
    assert rows.__getitems__([5, 3, 5]) == [first[5], first[3], first[5]]
    assert read(rows, 1) != first
    assert read(make_rows(seed=8), 0) not in (first, read(rows, 1))
    assert read(rows, 0) == read(make_rows(), 0) == read(pickle.loads(pickle.dumps(rows)), 0) == first

    in_bytes = read(make_rows(rate=1.0), 0)
    longest = max(range(len(rows)), key=lambda number: len(in_bytes[number]["input_ids"]))
    same = make_rows(rate=0.5, numbers=[longest] * 30)
    same.rows = same.rows.remove_columns(["labels", "target_words"])
    same.rows = same.rows.add_column("labels", same.rows["input_ids"])
    same.rows = same.rows.add_column("target_words", same.rows["source_words"])
    cuts = read(same, 0)
    assert len({tuple(row["input_ids"]) for row in cuts}) > 15
    assert sum(row["input_ids"] != row["labels"] for row in cuts) > 15


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_know_the_epoch_and_cut_the_same(make_rows, persistent):
    rows = make_rows()
    loader = DataLoader(rows, batch_size=7, collate_fn=list, num_workers=1, persistent_workers=persistent)
    for epoch in (0, 1, 4):
        rows.set_epoch(epoch)
        assert [row for batch in loader for row in batch] == read(rows, epoch)


def test_a_side_that_would_be_too_long_stays(make_rows):
    limits = {"max_source_length": 9, "max_target_length": 14}
    rows = make_rows(rate=0.6, **limits)
    longer = 0
    for epoch in range(3):
        for new, old in zip(read(rows, epoch), rows.rows, strict=True):
            assert len(new["input_ids"]) <= 9 or new["input_ids"] == old["input_ids"]
            assert len(new["labels"]) <= 14 or new["labels"] == old["labels"]
            longer += len(new["labels"]) > len(old["labels"])
    assert longer > 0


def test_growth_is_that_of_the_rows(make_rows):
    rows = make_rows()
    new, old = (sum(len(row["input_ids"]) + len(row["labels"]) for row in each) for each in (read(rows, 0), rows.rows))
    assert rows.growth() == new / old > 1.05
    assert rows.growth(sample=10) == pytest.approx(new / old, rel=0.3)


def test_the_trainer_sees_other_tokens_in_each_epoch_and_the_same_when_it_resumes(make_rows, bpe, tiny_model, tmp_path):
    pad = DataCollatorForSeq2Seq(bpe)

    def train(rows, checkpoint=None) -> list:
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_tokens=150, num_train_epochs=2, save_strategy="steps",
            save_steps=4, save_total_limit=None, eval_strategy="no", load_best_model_at_end=False, learning_rate=1e-3,
            report_to="none", seed=7,
        )  # fmt: skip
        seen: list = []

        def collate(features):
            assert all(set(feature) == {"input_ids", "labels"} for feature in features)
            seen.append(sorted((feature["input_ids"], feature["labels"]) for feature in features))
            return pad(features)

        trainer = TranslationTrainer(
            model=tiny_model(vocab_size=len(bpe)), args=args, train_dataset=rows, data_collator=collate,
            processing_class=bpe,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        return seen

    rows = make_rows()
    seen = train(rows)
    steps = len(seen) // 2
    for epoch in range(2):
        in_epoch = [row for batch in seen[epoch * steps : (epoch + 1) * steps] for row in batch]
        assert sorted(in_epoch) == sorted((row["input_ids"], row["labels"]) for row in read(rows, epoch))
    for done in (4, 8):
        assert done % steps, "in the middle of an epoch"
        assert train(make_rows(), str(tmp_path / f"checkpoint-{done}")) == seen[done:]


RUN = {
    "dataset": "phrasebook:en-de", "phrasebook_size": 80, "max_eval_samples": 3, "vocab_size": 320, "d_model": 16,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_steps": 3, "eval_strategy": "no",
    "load_best_model_at_end": False, "max_new_tokens": 4, "num_beams": 1, "bpe_dropout": 0.2, "report_to": "none",
}  # fmt: skip


def test_a_recipe_asks_for_it_and_the_log_says_what_it_does(tmp_path, caplog):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RUN | {"output_dir": str(tmp_path / "run")}))
    with caplog.at_level("INFO"):
        main([str(tmp_path / "recipe.yaml")])
    (message,) = (line for line in caplog.messages if line.startswith("BPE-dropout"))
    assert message.startswith("BPE-dropout 0.2 lengthens rows by ")
    assert int(message.split()[-5]) > 0
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_recipe_with_another_kind_of_tokenizer_is_refused_before_its_folder_is_a_runs(texts, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RUN | {"output_dir": str(tmp_path / "run")}))
    with pytest.raises(RecipeError, match="tokenizer_model=unigram has none"):
        main([str(tmp_path / "recipe.yaml"), "--tokenizer_model", "unigram"])
    train_tokenizer(texts, 300, "unigram").save_pretrained(tmp_path / "unigram")
    with pytest.raises(RecipeError, match="of type Unigram"):
        main([str(tmp_path / "recipe.yaml"), "--tokenizer", str(tmp_path / "unigram")])
    assert not Path(tmp_path / "run" / "recipe.yaml").exists()

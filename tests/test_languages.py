"""Many languages in one model: engines, pipeline, data, whole runs, and the commands around them."""

import copy
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from compilers import needs_compiler
from datasets import Dataset
from huggingface_hub import ModelCard
from processes import run_command, run_new_python
from test_tokenization_languages import multilingual
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

from vanilla_transformer import TranslationPipeline
from vanilla_transformer.training import evaluate, train
from vanilla_transformer.training.data.languages import balanced_texts, count_directions
from vanilla_transformer.training.data.pairs import load_pairs, tokenize_pairs
from vanilla_transformer.training.data.rows import training_rows
from vanilla_transformer.training.data.streaming import StreamedBatches, open_stream
from vanilla_transformer.training.errors import DataError, RecipeError, UserError
from vanilla_transformer.training.publishing.hub import stage
from vanilla_transformer.training.settings.arguments import DataArguments
from vanilla_transformer.training.settings.corpora import Corpus
from vanilla_transformer.training.settings.recipe import parse_recipe
from vanilla_transformer.training.translator import translate
from vanilla_transformer_commands import translate as translate_command


# A world of colours and things that a tiny model learns in seconds.
COLOURS = {
    "en": ["red", "green", "blue", "white"],
    "de": ["rot", "grün", "blau", "weiß"],
    "fr": ["rouge", "vert", "bleu", "blanc"],
}
THINGS = {
    "en": ["dog", "cat", "house", "tree", "car", "book"],
    "de": ["Hund", "Katze", "Haus", "Baum", "Auto", "Buch"],
    "fr": ["chien", "chat", "maison", "arbre", "voiture", "livre"],
}
TRAINED = [("en", "de"), ("en", "fr"), ("de", "en")]
ZERO_SHOT = ("de", "fr")
RECIPE = {
    "vocab_size": 330,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
    "label_smoothing": 0.0,
    "normalize_before": True,
    "per_device_train_batch_tokens": 200,
    "learning_rate": 0.01,
    "warmup_steps": 20,
    "max_steps": 200,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "num_beams": 2,
    "max_new_tokens": 12,
}
SOURCES = ["red dog", "green book", "White house. Black car", "blue"]


def sentence(language: str, colour: int, thing: int) -> str:
    return f"{COLOURS[language][colour]} {THINGS[language][thing]}"


def rows(directions, places=range(24)) -> list[dict[str, str]]:
    return [
        {
            "from": source,
            "to": target,
            "source": sentence(source, place // 6, place % 6),
            "target": sentence(target, place // 6, place % 6),
        }
        for source, target in directions
        for place in places
    ]


def write_rows(path: Path, found: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    return path


COLUMNS = ["--source_lang_column", "from", "--target_lang_column", "to"]


def command_line(folder: Path, **fields) -> list[str]:
    """A recipe's fields as options, with the rows of all directions."""
    train_file = write_rows(folder / "train.jsonl", rows(TRAINED))
    test_file = write_rows(folder / "test.jsonl", rows([*TRAINED, ZERO_SHOT], range(0, 24, 3)))
    given = {
        **RECIPE,
        "train_file": train_file,
        "test_file": test_file,
        "source_lang_column": "from",
        "target_lang_column": "to",
        "output_dir": folder / "run",
        **fields,
    }
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of three directions, scored on them and on a fourth."""
    folder = tmp_path_factory.mktemp("finished")
    run_command("train", *command_line(folder), check=True, CUDA_VISIBLE_DEVICES="")
    return folder / "run"


@pytest.fixture(scope="module")
def parts(lively_model):
    """A model that writes something else for each source, and its tokenizer of three languages."""
    tokenizer = multilingual()
    model = lively_model(vocab_size=len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn_like(parameter))
    return model, tokenizer


ENGINES = {
    "compiled": pytest.param({"compiled": True}, "compiled", marks=needs_compiler),
    "packed": pytest.param({"compiled": False}, "packed"),
    "transformers": pytest.param({"use_cache": False}, "transformers"),
    "sampling": pytest.param({"do_sample": True, "top_k": 1, "num_beams": 1}, "packed"),
    "greedy": pytest.param({"num_beams": 1}, None),
}


@pytest.mark.parametrize(("options", "engine"), ENGINES.values(), ids=ENGINES)
def test_a_mixed_batch_is_translated_token_by_token_as_each_language_alone(parts, options, engine):
    model, tokenizer = parts
    options = {"num_beams": 3, "max_new_tokens": 8, **options}
    texts, languages = SOURCES * 3, [language for language in tokenizer.languages for _ in SOURCES]
    order = random.Random(1).sample(range(len(texts)), len(texts))
    batch = tokenizer(
        [texts[i] for i in order], tgt_lang=[languages[i] for i in order], padding=True, return_tensors="pt"
    )
    mixed = model.generate(**batch, **options)
    assert engine in (None, model.last_engine.name)
    expected = {}
    for language in tokenizer.languages:
        batch = tokenizer(SOURCES, tgt_lang=language, padding=True, return_tensors="pt")
        for text, ids in zip(SOURCES, model.generate(**batch, **options).tolist(), strict=True):
            expected[text, language] = bare(ids)
    assert [bare(ids) for ids in mixed.tolist()] == [expected[texts[i], languages[i]] for i in order]
    assert len({tuple(ids) for (text, _), ids in expected.items() if text == SOURCES[0]}) > 1


def bare(ids: list[int]) -> list[int]:
    """Without the padding at the end."""
    while ids[-1] == 0:
        ids = ids[:-1]
    return ids


@pytest.fixture(scope="module")
def pipe(parts):
    model, tokenizer = parts
    options = {"num_beams": 2, "max_new_tokens": 8}
    return TranslationPipeline(model=model, tokenizer=tokenizer, task="translation", device="cpu", **options)


@pytest.fixture(scope="module")
def by_hand(parts):
    model, tokenizer = parts

    def translated(text: str, language: str) -> str:
        found = []
        for part in text.split(". "):
            part += "." * (part != text.split(". ")[-1])
            ids = model.generate(
                **tokenizer([part], tgt_lang=language, return_tensors="pt"), num_beams=2, max_new_tokens=8
            )
            found.append(tokenizer.decode(ids[0], skip_special_tokens=True))
        return " ".join(found)

    return translated


class TestPipeline:
    def test_each_text_may_have_its_language(self, pipe, by_hand):
        languages = ["de", "fr", "en", "fr"]
        found = [record["translation_text"] for record in pipe(SOURCES, tgt_lang=languages, src_lang="en")]
        assert found == [by_hand(text, language) for text, language in zip(SOURCES, languages, strict=True)]
        assert found != [record["translation_text"] for record in pipe(SOURCES, tgt_lang="de")]

    def test_one_language_serves_a_text_a_list_and_a_stream(self, pipe, by_hand):
        expected = [by_hand(text, "fr") for text in SOURCES]
        assert [record["translation_text"] for record in pipe(SOURCES, tgt_lang="fr")] == expected
        assert pipe(SOURCES[2], tgt_lang="fr") == [{"translation_text": expected[2]}]
        assert [record["translation_text"] for (record,) in pipe(iter(SOURCES), tgt_lang="fr")] == expected
        greedy = pipe(SOURCES[2], tgt_lang="fr", num_beams=1)[0]["translation_text"]
        assert "".join(pipe.stream(SOURCES[2], tgt_lang="fr")) == greedy

    def test_the_default_is_the_calls_then_the_pipelines_then_the_tasks_then_the_tokenizers(self, parts, tmp_path):
        _model, tokenizer = parts
        tokenizer.tgt_lang = "de"
        for part in parts:
            part.save_pretrained(tmp_path)
        tokenizer.tgt_lang = None
        options = {"model": str(tmp_path), "device": "cpu", "num_beams": 2, "max_new_tokens": 8}
        in_task = pipeline("translation_de_to_en", **options)
        own = pipeline("translation_de_to_en", tgt_lang="fr", **options)
        saved = pipeline("translation", **options)
        called = {language: saved(SOURCES, tgt_lang=language) for language in tokenizer.languages}
        assert called["de"] != called["fr"] != called["en"]
        assert saved(SOURCES) == called["de"]
        assert in_task(SOURCES) == called["en"]
        assert own(SOURCES) == called["fr"]
        assert own(SOURCES, tgt_lang="de") == called["de"]

    @pytest.mark.parametrize(
        ("inputs", "options", "message"),
        [
            (SOURCES, {}, "tgt_lang is not set: choose one of de, en, fr"),
            (SOURCES, {"tgt_lang": "xx"}, "tgt_lang='xx' is unknown: choose one of de, en, fr"),
            (SOURCES, {"tgt_lang": ["de"]}, "tgt_lang has 1 languages for 4 texts"),
            (SOURCES, {"tgt_lang": "de", "src_lang": "xx"}, "src_lang='xx' is unknown: choose one of cs, de, en, fr"),
            (SOURCES, {"tgt_lang": 3}, "tgt_lang=3 must be a language, or a list with one for each text"),
            (map(str, SOURCES), {"tgt_lang": ["de"] * 4}, "tgt_lang is a list, but the inputs are not"),
        ],
    )
    def test_a_wrong_language_is_refused(self, pipe, inputs, options, message):
        with pytest.raises(ValueError, match=message):
            list(pipe(inputs, **options))


class TestVocabulary:
    def counts(self, sizes):
        """How often `balanced_texts` gives each language's texts, whose words tell it and their number."""
        found = [
            {"source": f"s{number}", "target": f"{language}{number}", "source_lang": "src", "target_lang": language}
            for language, size in sizes.items()
            for number in range(size)
        ]
        table = Dataset.from_list(found)
        texts = list(balanced_texts(table, count_directions(table)))
        assert texts == list(balanced_texts(table, count_directions(table)))
        return texts

    def test_each_language_has_its_share_by_temperature(self):
        sizes = {"aa": 900, "bb": 90, "cc": 9}
        texts = self.counts(sizes)
        total = 2 * sum(sizes.values())
        weights = {"s": sum(sizes.values()) ** 0.2} | {language: size**0.2 for language, size in sizes.items()}
        found = Counter(text.rstrip("0123456789") for text in texts)
        for language, weight in weights.items():
            assert found[language] == pytest.approx(total * weight / sum(weights.values()), abs=1)
        # All texts of a rare language, equally often; of a frequent one an even choice.
        repeated = Counter(text for text in texts if text.startswith("cc"))
        assert len(repeated) == 9
        assert max(repeated.values()) - min(repeated.values()) <= 1
        chosen = [int(text[2:]) for text in texts if text.startswith("aa")]
        steps = {later - earlier for earlier, later in itertools.pairwise(chosen)}
        assert max(steps) - min(steps) <= 1

    def test_languages_of_one_size_have_each_text_once(self):
        found = [
            {"source": f"s{number}", "target": f"t{number}", "source_lang": "aa", "target_lang": "bb"}
            for number in range(777)
        ]
        table = Dataset.from_list(found)
        texts = list(balanced_texts(table, count_directions(table)))
        assert sorted(texts) == sorted([*table["source"], *table["target"]])


class TestData:
    @pytest.mark.parametrize("suffix", ["jsonl", "tsv"])
    def test_rows_name_their_languages_by_columns(self, tmp_path, suffix):
        found = rows(TRAINED)
        path = write_rows(tmp_path / "train.jsonl", found)
        if suffix == "tsv":
            path = tmp_path / "train.tsv"
            lines = ["\t".join(found[0]), *("\t".join(row.values()) for row in found)]
            path.write_text("\n".join(lines), encoding="utf-8")
        data = DataArguments(train_file=[str(path)], source_lang_column="from", target_lang_column="to")
        pairs = load_pairs(data)["train"]
        renamed = [
            {"source_lang": r["from"], "target_lang": r["to"], "source": r["source"], "target": r["target"]}
            for r in found
        ]
        assert [dict(sorted(row.items())) for row in pairs.to_list()] == [dict(sorted(row.items())) for row in renamed]
        assert list(open_stream(data)) == pairs.to_list()
        one_to_many = DataArguments(train_file=[str(path)], source_lang="xx", target_lang_column="to")
        pairs = load_pairs(one_to_many)["train"]
        assert set(pairs["source_lang"]) == {"xx"}
        assert [dict(sorted(row.items())) for row in open_stream(one_to_many)] == [
            dict(sorted(row.items())) for row in pairs.to_list()
        ]

    def test_a_stream_has_the_ids_of_the_rows_in_memory(self, tmp_path):
        tokenizer = multilingual()
        path = write_rows(tmp_path / "train.jsonl", rows(TRAINED))
        data = DataArguments(train_file=[str(path)], source_lang_column="from", target_lang_column="to")
        expected = tokenize_pairs(load_pairs(data)["train"], tokenizer, data, "train").to_list()
        streamed, batches = (
            [],
            StreamedBatches(open_stream(data), tokenizer, Corpus("train", data), max_tokens=100, length=1000),
        )
        for batch in batches:
            if batch["position"]["epoch"]:
                break
            streamed += batch["rows"]
        assert len(streamed) == len(expected)
        assert sorted(map(str, streamed)) == sorted(map(str, expected))
        first = tokenizer.lang_code_to_id
        plain = tokenizer(rows(TRAINED)[28]["source"], add_special_tokens=False)["input_ids"]
        assert expected[28]["input_ids"] == [first["fr"], *plain, tokenizer.eos_token_id]

    @pytest.mark.parametrize(
        ("change", "fields", "message"),
        [
            (
                {},
                {"target_lang_column": "nach"},
                "train: there is no column 'nach': name one of from, to, source, target",
            ),
            ({"to": 5}, {}, "train, row 1: the target_lang is 5, and must be a code such as de, pt-BR or zh_Hans"),
            ({"to": "d e"}, {}, "train, row 1: the target_lang is 'd e', and must be a code"),
            (
                {},
                {"source_lang_column": None},
                "target_lang_column=to names one language of each row, but the other is",
            ),
        ],
    )
    def test_a_wrong_column_is_named(self, tmp_path, change, fields, message):
        path = write_rows(tmp_path / "train.jsonl", [row | change for row in rows(TRAINED)])
        names = {"source_lang_column": "from", "target_lang_column": "to", **fields}
        with pytest.raises(DataError, match=message):
            load_pairs(DataArguments(train_file=[str(path)], **names))

    def test_parallel_text_has_no_columns(self, tmp_path):
        for side in ("en", "de"):
            (tmp_path / f"train.{side}").write_text("a\n")
        files = [str(tmp_path / "train.en"), str(tmp_path / "train.de")]
        data = DataArguments(train_file=files, source_lang="en", target_lang_column="to")
        for load in (load_pairs, open_stream):
            with pytest.raises(
                DataError, match="train: there is no column 'to': name one of source, target by target_"
            ):
                load(data)

    def test_a_stream_with_an_unknown_language_says_which_are_known(self, tmp_path):
        found = rows([("en", "de")], range(3))
        path = write_rows(tmp_path / "train.jsonl", [*found[:2], found[2] | {"to": "xx"}])
        data = DataArguments(train_file=[str(path)], source_lang_column="from", target_lang_column="to")
        batches = StreamedBatches(open_stream(data), multilingual(), Corpus("train", data), max_tokens=100, length=9)
        with pytest.raises(DataError, match="train: target_lang=xx is unknown: the model translates into de, en, fr"):
            next(iter(batches))


class TestRun:
    def test_only_the_token_tells_the_language_and_the_model_obeys_it(self, finished):
        model, tokenizer = (
            AutoModelForSeq2SeqLM.from_pretrained(finished).eval(),
            AutoTokenizer.from_pretrained(finished),
        )
        assert (tokenizer.languages, tokenizer.source_languages) == (["de", "en", "fr"], ["de", "en"])
        assert len(tokenizer) == model.config.vocab_size
        for source, target in TRAINED:
            sources = [sentence(source, place // 6, place % 6) for place in range(24)]
            found = translate(model, tokenizer, sources, tgt_lang=target)
            equal = sum(text == sentence(target, place // 6, place % 6) for place, text in enumerate(found))
            assert equal > 20

    def test_each_direction_is_scored_and_the_zero_shot_one_is_named(self, finished):
        metrics = json.loads((finished / "metrics.json").read_text())
        groups = metrics["groups"]
        assert {name: part["rows"] for name, part in groups.items()} == {
            "en-de": 8, "en-fr": 8, "de-en": 8, "de-fr (zero-shot)": 8,
        }  # fmt: skip
        mean = sum(part["scores"]["exact_match"] for part in groups.values()) / 4
        assert metrics["scores"]["exact_match"] == pytest.approx(mean)

    def test_the_card_knows_the_languages_and_directions(self, finished):
        card = ModelCard.load(finished / "README.md")
        assert card.data.language == ["de", "en", "fr"]
        assert card.data.pipeline_tag == "translation"
        assert "to translate German, English into German, English, French" in card.text.replace("\n", " ")
        assert "| de-fr (zero-shot) | 8 |" in card.text
        assert "| en-fr | 8 |" in card.text
        example = 'tgt_lang="de"'
        assert card.text.count(example) == 2

    def test_evaluate_scores_by_direction(self, finished, tmp_path, capsys):
        test_file = write_rows(tmp_path / "test.jsonl", rows([("en", "fr"), ZERO_SHOT], range(9)))
        output = tmp_path / "scores.json"
        evaluate.main([str(finished), "--test_file", str(test_file), *COLUMNS, "--output_file", str(output)])
        scores, said = json.loads(output.read_text()), capsys.readouterr().out
        assert set(scores["groups"]) == {"en-fr", "de-fr"}
        for source, target in (("en", "fr"), ZERO_SHOT):
            one = write_rows(tmp_path / "one.jsonl", rows([(source, target)], range(9)))
            evaluate.main(
                [str(finished), "--test_file", str(one), "--target_lang", target, "--output_file", str(output)]
            )
            alone = json.loads(output.read_text())
            assert "groups" not in alone
            numbers = {name: value for name, value in alone.items() if isinstance(value, float)}
            assert scores["groups"][f"{source}-{target}"] == {"rows": 9, "scores": numbers}
        assert any(line.startswith("de-fr") and " 9 " in line for line in said.splitlines())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "target_lang is not given: choose one of de, en, fr"),
            (["--target_lang", "xx"], "target_lang=xx is unknown: the model translates into de, en, fr"),
            (
                ["--source_lang", "en", "--target_lang_column", "source"],
                "text 1: target_lang=red is unknown: the model",
            ),
        ],
    )
    def test_evaluate_needs_a_language_that_the_model_knows(self, finished, tmp_path, options, message):
        test_file = tmp_path / "test.jsonl"
        write_rows(test_file, [row | {"source": "red"} for row in rows([("en", "fr")], range(2))])
        with pytest.raises(UserError, match=message):
            evaluate.main([str(finished), "--test_file", str(test_file), *options])

    def test_a_run_with_a_test_language_that_it_does_not_train_is_refused_at_once(self, tmp_path):
        argv = command_line(tmp_path)
        write_rows(tmp_path / "test.jsonl", [*rows([("en", "de")], range(3)), rows([("en", "de")])[0] | {"to": "cs"}])
        with pytest.raises(
            DataError, match="test, row 4: target_lang=cs is unknown: the model translates into de, en, fr"
        ):
            train.prepare(parse_recipe(argv))

    def test_one_direction_as_before_has_no_languages(self, tmp_path):
        train_file = write_rows(tmp_path / "one.jsonl", rows([("en", "de")]))
        fields = {"source_lang_column": None, "target_lang_column": None, "test_file": None}
        run = train.prepare(
            parse_recipe(command_line(tmp_path, train_file=train_file, source_lang="en", target_lang="de", **fields))
        )
        assert run.tokenizer.languages == []
        assert "<2de>" not in run.tokenizer.get_vocab()


class TestTrainingFurther:
    @pytest.fixture(scope="class")
    @classmethod
    def base(cls, tmp_path_factory) -> Path:
        """The folder of an untrained bilingual model."""
        folder = tmp_path_factory.mktemp("base")
        train_file = write_rows(folder / "one.jsonl", rows([("en", "de")]))
        fields = {"source_lang_column": None, "target_lang_column": None, "test_file": None}
        run = train.prepare(parse_recipe(command_line(folder, train_file=train_file, **fields)))
        run.model.save_pretrained(folder / "run")
        return folder / "run"

    def sizes(self):
        return {name: None for name in RECIPE if name.startswith(("d_", "encoder", "decoder", "vocab", "normalize"))}

    def test_a_bilingual_model_becomes_a_multilingual_one_with_its_old_weights(self, base, tmp_path):
        old, tokens = AutoModelForSeq2SeqLM.from_pretrained(base), len(AutoTokenizer.from_pretrained(base))
        run = train.prepare(parse_recipe(command_line(tmp_path, model=base, tags="<formal>", **self.sizes())))
        assert run.tokenizer.languages == ["de", "en", "fr"]
        assert run.tokenizer.convert_ids_to_tokens(range(tokens, len(run.tokenizer))) == [
            "<formal>",
            "<2de>",
            "<2en>",
            "<2fr>",
        ]
        assert run.model.config.vocab_size == run.model.config.decoder_vocab_size == tokens + 4
        weights = run.model.state_dict()
        for name, weight in old.state_dict().items():
            assert weights[name][: len(weight)].equal(weight), name
        table = run.model.get_input_embeddings().weight
        assert table.data_ptr() == run.model.get_output_embeddings().weight.data_ptr()
        spread = table[tokens:].std() / table[4:tokens].std()
        assert 0.3 < spread < 3
        text = rows(TRAINED)[0]["source"]
        assert (
            run.tokenizer(text, tgt_lang="fr")["input_ids"][1:]
            == AutoTokenizer.from_pretrained(base)(text)["input_ids"]
        )

    def test_adapters_would_leave_the_new_tokens_untrained(self, base, tmp_path):
        argv = command_line(tmp_path, model=base, lora_rank=2, **self.sizes())
        with pytest.raises(
            RecipeError, match=r"lora_rank=2 trains no embeddings, but .* has none yet for 3 new languages"
        ):
            train.prepare(parse_recipe(argv))

    def test_one_direction_of_a_multilingual_model_becomes_its_default(self, finished, tmp_path):
        train_file = write_rows(tmp_path / "one.jsonl", rows([("en", "fr")]))
        fields = {"source_lang_column": None, "target_lang_column": None, "test_file": None, "train_file": train_file}
        named = command_line(tmp_path, model=finished, source_lang="en", target_lang="fr", **fields, **self.sizes())
        run = train.prepare(parse_recipe(named))
        assert (run.tokenizer.src_lang, run.tokenizer.tgt_lang, len(run.tokenizer)) == (
            "en", "fr", len(AutoTokenizer.from_pretrained(finished)),
        )  # fmt: skip
        assert {ids[0] for ids in run.rows["train"]["input_ids"]} == {run.tokenizer.get_lang_id("fr")}
        unnamed = command_line(tmp_path, model=finished, output_dir=tmp_path / "other", **fields, **self.sizes())
        with pytest.raises(DataError, match="target_lang is not given, but the model translates into de, en, fr"):
            train.prepare(parse_recipe(unnamed))


CORPORA = """
corpora:
  to_german: {train_file: [en.de.en, en.de.de], source_lang: en, target_lang: de}
  to_french: {train_file: [en.fr.en, en.fr.fr], source_lang: en, target_lang: fr}
  both: {train_file: both.jsonl}
source_lang_column: from
target_lang_column: to
validation_file: valid.jsonl
"""


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """Writes the files of three corpora, two of them parallel text, and a recipe."""
    monkeypatch.chdir(tmp_path)
    for target in ("de", "fr"):
        found = rows([("en", target)], range(12))
        Path(f"en.{target}.en").write_text("".join(f"{row['source']}\n" for row in found))
        Path(f"en.{target}.{target}").write_text("".join(f"{row['target']}\n" for row in found))
    write_rows(tmp_path / "both.jsonl", rows([("de", "en"), ("fr", "en")], range(12, 24)))
    write_rows(tmp_path / "valid.jsonl", rows([("en", "de"), ("de", "fr")], range(3)))

    def prepare(text: str = CORPORA, **fields):
        Path("recipe.yaml").write_text(text)
        given = {**RECIPE, "output_dir": "run", **fields}
        return train.prepare(parse_recipe(["recipe.yaml", *(str(w) for n, v in given.items() for w in (f"--{n}", v))]))

    return prepare


class TestCorpora:
    def expected(self, run):
        """The ids of all training rows, by hand."""
        found = [*rows([("en", "de")], range(12)), *rows([("en", "fr")], range(12))]
        found += rows([("de", "en"), ("fr", "en")], range(12, 24))
        plain = copy.deepcopy(run.tokenizer)
        return [
            {
                "input_ids": [
                    run.tokenizer.lang_code_to_id[row["to"]],
                    *plain(row["source"], add_special_tokens=False)["input_ids"],
                    run.tokenizer.eos_token_id,
                ],
                "labels": [
                    *plain(row["target"], add_special_tokens=False)["input_ids"],
                    run.tokenizer.eos_token_id,
                ],
            }
            for row in found
        ]

    def test_each_corpus_names_its_direction_for_all_rows_or_by_columns(self, corpora):
        run = corpora()
        assert (run.tokenizer.languages, run.tokenizer.source_languages) == (["de", "en", "fr"], ["de", "en", "fr"])
        assert run.rows["train"].select_columns(["input_ids", "labels"]).to_list() == self.expected(run)
        valid = run.rows["validation"].to_list()
        assert [row["input_ids"][0] for row in valid] == [
            run.tokenizer.lang_code_to_id[language] for language in ("de", "de", "de", "fr", "fr", "fr")
        ]
        assert set(zip(run.pairs["train"]["source_lang"], run.pairs["train"]["target_lang"], strict=True)) == {
            ("en", "de"), ("en", "fr"), ("de", "en"), ("fr", "en"),
        }  # fmt: skip

    def test_transformed_text_keeps_its_language(self, corpora):
        run = corpora(
            CORPORA.replace("{train_file: both.jsonl}", "{train_file: both.jsonl, transforms: {uppercase: 1}}")
        )
        (mixed,) = training_rows(run.recipe, run.rows["train"], run.tokenizer)
        anew = [mixed.rows[number] for number in range(24, 48)]
        for row, changed in zip(self.expected(run)[24:], anew, strict=True):
            assert changed["input_ids"][0] == row["input_ids"][0]
            text = run.tokenizer.decode(row["input_ids"], skip_special_tokens=True)
            assert run.tokenizer.decode(changed["input_ids"], skip_special_tokens=True) == text.upper()

    def test_streams_give_the_same_rows(self, corpora):
        text = CORPORA.replace(", source_lang", ", weight: 1, source_lang").replace(
            "both.jsonl}", "both.jsonl, weight: 2}"
        )
        run = corpora(
            f"{text}streaming: true\n", max_steps=6, shuffle_buffer=48, max_source_length=99, max_target_length=99
        )
        (batches,) = run.rows["train"]
        found = [row for batch in batches for row in batch["rows"]]
        known = {(tuple(row["input_ids"]), tuple(row["labels"])) for row in self.expected(run)}
        seen = {(tuple(row["input_ids"]), tuple(row["labels"])) for row in found}
        assert len(seen) > 20
        assert seen <= known
        assert {ids[0] for ids, _ in seen} == set(run.tokenizer.lang_code_to_id.values())

    def test_corpora_of_one_direction_need_no_token(self, corpora):
        text = CORPORA.split("  to_french")[0] + "validation_file: valid.jsonl\n"
        assert corpora(text).tokenizer.languages == []

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            (
                ", source_lang: en, target_lang: fr", "",
                "corpora: to_french: train: there is no column 'from': name one of source, target",
            ),
            (
                "target_lang_column: to\n", "",
                "corpora: both: source_lang_column=from names one language of each row, but the other is not given",
            ),
            (
                "  both: {train_file: both.jsonl}\nsource_lang_column: from\ntarget_lang_column: to\n", "",
                "validation: the training data has several directions, but the validation rows do not name theirs",
            ),
            (
                "source_lang_column: from\ntarget_lang_column: to\n", "",
                "corpora: both: the corpora have several directions, but this one does not name its own",
            ),
        ],
    )  # fmt: skip
    def test_a_direction_that_is_not_named_is_asked_for(self, corpora, old, new, message):
        assert old in CORPORA
        with pytest.raises(UserError, match=message):
            corpora(CORPORA.replace(old, new))


class TestTranslate:
    def lines(self, finished, folder, text, *options):
        (folder / "in.txt").write_text(text, encoding="utf-8")
        translate_command.main(
            [str(finished), "--input", str(folder / "in.txt"), "--output", str(folder / "out.txt"), *options]
        )
        return (folder / "out.txt").read_text(encoding="utf-8").splitlines()

    def test_the_language_is_that_of_the_command_or_of_each_line(self, finished, tmp_path):
        sources = [sentence("en", place % 4, place) for place in range(6)]
        text = "".join(f"{source}\n" for source in sources)
        expected = {}
        model, tokenizer = (
            AutoModelForSeq2SeqLM.from_pretrained(finished).eval(),
            AutoTokenizer.from_pretrained(finished),
        )
        for language in ("de", "fr"):
            expected[language] = translate(model, tokenizer, sources, tgt_lang=language)
            assert (
                self.lines(finished, tmp_path, text, "--target_lang", language, "--source_lang", "en")
                == expected[language]
            )
        assert expected["de"] != expected["fr"]
        languages = ["de", "fr", "fr", "de", "fr", "de"]
        mixed = [expected[language][number] for number, language in enumerate(languages)]
        first = "".join(f"{language}\t{source}\n" for language, source in zip(languages, sources, strict=True))
        assert self.lines(finished, tmp_path, first, "--target_lang_column", "1", "--window", "4") == mixed
        assert self.lines(finished, tmp_path, f"\n{first}", "--target_lang_column", "1") == ["", *mixed]
        second = "".join(f"{source}\t{language}\n" for language, source in zip(languages, sources, strict=True))
        assert self.lines(finished, tmp_path, second, "--target_lang_column", "2") == mixed

    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            ("red dog\n", [], "target_lang is not given: choose one of de, en, fr"),
            ("red dog\n", ["--target_lang", "xx"], "tgt_lang='xx' is unknown: choose one of de, en, fr"),
            (
                "red dog\n",
                ["--target_lang", "de", "--source_lang", "xx"],
                "src_lang='xx' is unknown: choose one of de, en",
            ),
            (
                "de\ta\nred\n",
                ["--target_lang_column", "1"],
                r"in\.txt, line 2 has 1 columns, but --target_lang_column needs",
            ),
            (
                "de\ta\nxx\tred\n",
                ["--target_lang_column", "1"],
                r"in\.txt, line 2: target_lang=xx is unknown: the model",
            ),
            (
                "a\n",
                ["--target_lang", "de", "--target_lang_column", "1"],
                "target_lang=de and target_lang_column are both",
            ),
        ],
    )
    def test_a_wrong_language_is_named(self, finished, tmp_path, text, options, message):
        with pytest.raises(UserError, match=message):
            self.lines(finished, tmp_path, text, *options)


STRANGER = """
import json, sys
from transformers import AutoTokenizer, AutoModelForSeq2SeqLM, pipeline
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
translate = pipeline("translation", model=folder, trust_remote_code=True, device="cpu")
assert "vanilla_transformer" not in sys.modules
ids = tokenizer(texts, tgt_lang=["de", "fr"])["input_ids"]
print(json.dumps([ids, tokenizer.languages, translate(texts, tgt_lang=["de", "fr"])]))
"""


def test_what_is_pushed_brings_the_tokenizers_code(finished, tmp_path):
    (tmp_path / "staged").mkdir()
    stage(finished, tmp_path / "staged")
    assert (tmp_path / "staged" / "tokenization_languages.py").exists()
    texts = ["red dog", "green book"]
    printed = run_new_python(STRANGER, tmp_path / "staged", json.dumps(texts), cwd=tmp_path)
    ids, languages, translations = json.loads(printed)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert (ids, languages) == (tokenizer(texts, tgt_lang=["de", "fr"])["input_ids"], tokenizer.languages)
    own = pipeline("translation", model=str(finished), device="cpu")
    assert translations == own(texts, tgt_lang=["de", "fr"])
    # With the package its own class is taken, and no code of the folder is run.
    assert AutoTokenizer.from_pretrained(tmp_path / "staged", trust_remote_code=False).languages == tokenizer.languages

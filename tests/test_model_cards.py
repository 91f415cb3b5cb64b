"""model_cards/: the Hub's own parser reads the cards, and every figure in them was measured."""

import json
import os
import platform
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load

from vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration
from vanilla_transformer.training.machine import processor
from vanilla_transformer.training.metric_names import DEFAULT_METRICS, TITLES
from vanilla_transformer.training.metrics import score_texts
from vanilla_transformer.training.publishing.audit import CardError, read_card
from vanilla_transformer.training.publishing.card import model_card
from vanilla_transformer.training.scores import score_groups
from vanilla_transformer.training.settings.recipe import RECIPES, parse_recipe
from vanilla_transformer.training.significance import confidence_intervals


FOLDER = Path(__file__).parents[1] / "model_cards"
CARDS = sorted(path for path in FOLDER.glob("*.md") if path.name != "template.md")
MEASURED = FOLDER / "quickstart.md"


def metrics_of(card: Path) -> dict:
    return json.loads(card.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
class TestEachCard:
    def test_its_figures_are_those_of_its_metrics(self, path):
        card, scores = read_card(path, metrics_of(path)), metrics_of(path)["scores"]
        results = {result.metric_type: result for result in card.data.eval_results}
        assert set(results) == set(DEFAULT_METRICS)
        for name, result in results.items():
            assert result.metric_value == round(scores[name], 2)
            assert result.metric_config == scores.get(f"{name}_signature")

    def test_its_metadata_says_what_the_hub_asks_for(self, path):
        data = metadata_load(path)
        assert data == yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])
        assert data["language"] == ["en", "nl" if path.stem == "quickstart_lora" else "de"]
        assert data["license"] == "apache-2.0"
        assert data["library_name"] == "transformers"
        assert data["pipeline_tag"] == "translation"
        assert "translation" in data["tags"]
        assert data["metrics"] == list(DEFAULT_METRICS)
        assert [model["name"] for model in data["model-index"]] == [path.stem]

    def test_it_stands_beside_its_recipe_and_picture(self, path):
        text = path.read_text(encoding="utf-8")
        assert (RECIPES / f"{path.stem}.yaml").is_file()
        assert f"\n# {path.stem}\n" in text
        (picture,) = re.findall(r"!\[loss curve\]\((.*)\)", text)
        assert (FOLDER / picture).read_bytes().startswith(b"\x89PNG")

    def test_its_network_has_as_many_parameters(self, path, tmp_path):
        recipe = parse_recipe([f"{path.stem}.yaml", "--output_dir", str(tmp_path)])
        if began_with := recipe.model.model:
            recipe = parse_recipe([f"{Path(began_with).name}.yaml", "--output_dir", str(tmp_path)])
        config = VanillaTransformerConfig(vocab_size=recipe.tokenizer.vocab_size, **recipe.model.config_fields())
        count = VanillaTransformerForConditionalGeneration(config).num_parameters()
        assert count == metrics_of(path)["parameters"]


CLAIMS = {
    "score in the metadata": (r"value: 97\.85", "value: 98.85", r"bleu 98\.85 \(.*\) in model-index"),
    "score in the table": (r"\| BLEU \| 97\.85", "| BLEU | 98.85", r"BLEU 98\.85 .* in the section Results"),
    "another metric's score": (r"\| BLEU \| 97\.85", "| BLEU | 99.07", r"BLEU 99\.07 .* in the section Results"),
    "signature in the metadata": (r"tok:13a\|smooth", "tok:intl|smooth", r"bleu 97\.85 \(.*intl.*\) in model-index"),
    "signature in the table": (r"tok:13a\\\|smooth", r"tok:intl\\|smooth", r"BLEU 97\.85 .*intl.* in the section"),
    "a metric that was not taken": (r"type: bleu\n", "type: comet\n", r"comet 97\.85"),
    "updates": (r"3,000 updates", "2,000 updates", "2,000 in the section Training"),
    "minutes": (r"5\.4 minutes", "2.4 minutes", r"2\.4 in the section Training"),
    "pairs": (r"50,000 train", "60,000 train", "60,000 in the section Data"),
    "beam": (r"beam 4", "beam 6", "6 in the section Results"),
    "parameters": (r"1,080,496 parameters", "1,080,497 parameters", "1,080,497 parameters"),
    "a comparison": (r"## Training\n", "## Training\n\nIt beats another by 12.5 BLEU.\n", r"12\.5 in the section"),
}  # fmt: skip


@pytest.mark.parametrize(("pattern", "replacement", "message"), CLAIMS.values(), ids=CLAIMS)
def test_a_claim_that_was_not_measured_is_refused(pattern, replacement, message, tmp_path):
    text, count = re.subn(pattern, replacement, MEASURED.read_text(encoding="utf-8"), count=1)
    assert count
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(CardError, match=message):
        read_card(tmp_path / "README.md", metrics_of(MEASURED))


BROKEN = {
    "no YAML": (r"metrics:\n", "metrics: [\n", "metadata of .* cannot be read"),
    "no mapping": (r"(?s)\A---\n.*?\n---", "---\n- a\n---", "metadata of .* cannot be read"),
    "no model-index": (r"(?s)model-index:.*?\n---", "---", "has no model-index"),
    "a model-index without a data set": (
        r"(?s)    dataset:.*?    metrics:",
        "    metrics:",
        "metadata of .* cannot be",
    ),
}


@pytest.mark.parametrize(("pattern", "replacement", "message"), BROKEN.values(), ids=BROKEN)
def test_metadata_that_the_hub_does_not_read_is_refused(pattern, replacement, message, tmp_path):
    text, count = re.subn(pattern, replacement, MEASURED.read_text(encoding="utf-8"), count=1)
    assert count
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(CardError, match=message):
        read_card(tmp_path / "README.md", metrics_of(MEASURED))


def test_what_else_is_written_into_a_card_is_the_authors_own(tmp_path):
    text = MEASURED.read_text(encoding="utf-8")
    text = text.replace("## Network", "## Intended use\n\nDates from 1999 on, at your own risk.\n\n## Network")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert "1999" in read_card(tmp_path / "README.md", metrics_of(MEASURED)).text


PAIRS = {
    "two languages": (("en", "de"), ["en", "de"], None),
    "regions and scripts": (("pt_BR", "zh-Hant"), ["pt", "zh"], ["pt-BR", "zh-Hant"]),
    "Norwegian, which YAML takes for false": (("en", "no"), ["en", "no"], None),
    "one region": (("en", "pt_BR"), ["en", "pt"], ["en", "pt-BR"]),
    "unknown": ((None, None), None, None),
}


def some_metrics(model, scores: dict) -> dict:
    """What a run writes into its metrics.json."""
    return {
        "scored_split": "test",
        "scores": scores,
        "num_beams": 4,
        "parameters": model.num_parameters(),
        "data_name": "corpus-2016, part 3",
        "rows": {"train": 12345, "test": 2},
        "training": {"updates": 1234567, "minutes": 71.983, "machine": "8 x H100"},
        "example_source": "a dog",
        "example_translation": "ein Hund",
    }


@pytest.mark.parametrize(("languages", "codes", "tags"), PAIRS.values(), ids=PAIRS)
def test_a_runs_card_claims_what_its_metrics_hold_in_the_hubs_codes(languages, codes, tags, tiny_model, tmp_path):
    scores = score_texts(["ein Hund", "a"], ["ein Hund", "b"], "13a")
    metrics = some_metrics(tiny_model(), scores)
    path = tmp_path / "README.md"
    model_card(tiny_model(), languages, metrics, "d_model: 16\n", "runs/mine").save(path)
    data = read_card(path, metrics).data
    assert data.language == codes
    assert data.get("language_bcp47") == tags
    assert ModelCard.load(path).data.eval_results[0].metric_value == round(scores["bleu"], 2)


def test_a_card_shows_intervals_and_groups_as_they_were_measured(tiny_model, tmp_path):
    texts, names = (["ein Hund", "a b c d", "la la", "0"], ["ein Hund", "b a c d", "la", "0"]), list(TITLES)
    told = ("13a", names)
    metrics = some_metrics(tiny_model(), score_texts(*texts, *told))
    metrics["confidence"] = confidence_intervals(*texts, *told)
    metrics["groups"] = score_groups(*texts, ["news 2014", "a|b", "news 2014", "a|b"], *told)
    path = tmp_path / "README.md"
    model_card(tiny_model(), ("en", "de"), metrics, "d_model: 16\n", "runs/mine").save(path)
    card = read_card(path, metrics).text
    tables = [
        [cells.strip(" |") for cells in part.splitlines() if cells.startswith("|")] for part in card.split("\n\n")
    ]
    (results,) = [table for table in tables if table and table[0].startswith("metric")]
    (parts,) = [table for table in tables if table and table[0].startswith("part")]
    assert results[0] == "metric | score | signature | 95 % interval"
    assert len(results) == 2 + len(names)
    for name, line in zip(names, results[2:], strict=True):
        interval = metrics["confidence"]["intervals"][name]
        assert line.startswith(f"{TITLES[name]} | {metrics['scores'][name]:.2f} | ")
        assert line.endswith(f"| {interval['mean']:.2f} ± {interval['half_width']:.2f}")
    assert parts[0] == " | ".join(["part", "pairs", *TITLES.values()])
    for line, (part, found) in zip(parts[2:], metrics["groups"].items(), strict=True):
        figures = [f"{found['scores'][name]:.2f}" for name in names]
        assert line == " | ".join([part.replace("|", "\\|"), "2", *figures])
    claim = f"± {metrics['confidence']['intervals']['bleu']['half_width']:.2f}"
    path.write_text(path.read_text(encoding="utf-8").replace(claim, "± 0.01"), encoding="utf-8")
    with pytest.raises(CardError, match=r"0\.01 in the section Results"):
        read_card(path, metrics)


class TestTheMachineInWords:
    @pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="compared with Linux's own list")
    def test_it_has_the_instruction_sets_that_linux_lists(self):
        words = {"avx2": "AVX2", "avx512bw": "AVX-512", "avx512_vnni": "VNNI", "avx_vnni": "VNNI", "amx_tile": "AMX"}
        words |= {"asimddp": "dot products", "i8mm": "i8mm", "bf16": "bfloat16", "avx512_bf16": "bfloat16"}
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        has, _, _ = processor().split(": ")[1].partition("no ")
        assert {word for flag, word in words.items() if flag in flags} == set(words.values()) & set(
            re.findall("[^,;( ][^,;(]*", has)
        )

    @pytest.mark.parametrize(
        ("architecture", "capabilities", "sets"),
        [
            ("x86_64", ["avx2", "fma3"], "AVX2, FMA; no AVX-512, VNNI, bfloat16, AMX"),
            ("x86_64", ["avx2", "fma3", "avx_vnni"], "AVX2, FMA, VNNI; no AVX-512, bfloat16, AMX"),
            ("x86_64", [], "no AVX2, FMA, AVX-512, VNNI, bfloat16, AMX"),
            ("aarch64", ["neon", "dot", "i8mm", "bf16", "sve"], "NEON, dot products, i8mm, bfloat16, SVE"),
            ("arm64", ["neon"], "NEON; no dot products, i8mm, bfloat16, SVE"),
        ],
    )
    def test_any_processor_has_words(self, architecture, capabilities, sets, monkeypatch):
        found = {"cpu_name": "Some CPU", **dict.fromkeys(capabilities, True)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        monkeypatch.setattr(platform, "machine", lambda: architecture)
        monkeypatch.setattr(os, "cpu_count", lambda: 1)
        monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
        assert re.fullmatch(rf"Some CPU(?: \(family \d+\))?, 1 core: {re.escape(sets)}", processor())
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
        assert processor().endswith("(torch is limited to avx2)")

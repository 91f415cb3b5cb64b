"""What a newcomer meets first: the README's code and commands, `--help`, the wheel, and the names that are promised."""

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vanilla_transformer
from vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration, train_tokenizer
from vanilla_transformer.training.arguments import parse_recipe


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What needs a Hub runs in test_push_to_hub.py.
CODE = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "NAME/mine" not in code]
COMMANDS = [
    line
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
TRAIN = [
    line for line in COMMANDS if "vanilla_transformer.training.train " in line and "[" not in line and "..." not in line
]
PROGRAMS = {
    "train": ["-m", "vanilla_transformer.training.train"],
    "evaluate": ["-m", "vanilla_transformer.training.evaluate"],
    "phrasebook": ["-m", "vanilla_transformer.training.phrasebook"],
    **{path.stem: [str(path)] for path in sorted((ROOT / "scripts").glob("*.py"))},
}


@pytest.fixture
def saved_model(tmp_path):
    """A folder in which runs/quickstart and runs/en-fr hold a model that has learned nothing."""
    tokenizer = train_tokenizer(["3 days ago"], 270)
    config = VanillaTransformerConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    for name in ("quickstart", "en-fr"):
        VanillaTransformerForConditionalGeneration(config).save_pretrained(tmp_path / "runs" / name)
        tokenizer.save_pretrained(tmp_path / "runs" / name)
    return tmp_path


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_each_python_block_of_the_readme_runs(code, saved_model):
    result = subprocess.run([sys.executable, "-c", code], cwd=saved_model, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip()


def test_the_examples_of_the_decoding_guide_run_from_top_to_bottom(saved_model):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8"), re.DOTALL)
    result = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=saved_model, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (saved_model / "alignment.png").stat().st_size > 1000


@pytest.mark.parametrize("line", TRAIN, ids=range(len(TRAIN)))
def test_each_training_command_of_the_documents_is_understood(line, saved_model, monkeypatch):
    monkeypatch.chdir(saved_model)
    (saved_model / "runs" / "en-fr" / "recipe.yaml").write_text("dataset: phrasebook:en-fr\noutput_dir: runs/en-fr\n")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.DOTALL)
    (saved_model / "mine.yaml").write_text(recipe, encoding="utf-8")
    words = shlex.split(line.split("vanilla_transformer.training.train ", 1)[1])
    recipe = parse_recipe([word for word in words if word != "&&"])
    assert recipe.training.output_dir
    assert recipe.data.dataset or recipe.data.train_file


def test_the_translate_command_of_the_readme_runs(saved_model):
    (line,) = [line for line in COMMANDS if line.startswith("python scripts/translate.py runs/en-fr")]
    (saved_model / "sentences.txt").write_text("3 days ago\n\n")
    script, *words = shlex.split(line)[1:]
    result = subprocess.run(
        [sys.executable, ROOT / script, *words, "--max_new_tokens", "3"],
        cwd=saved_model,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (saved_model / "translations.txt").read_text().count("\n") == 2


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_help_says_how_a_program_is_used(program):
    result = subprocess.run([sys.executable, *program, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "usage:" in result.stdout


def test_the_tree_of_the_readme_names_every_module():
    tree = README.split("## The tree")[1]
    modules = [*(ROOT / "vanilla_transformer").glob("*_vanilla_transformer.py"), *(ROOT / "training").glob("*.py")]
    modules += [*(ROOT / "scripts").glob("*.py")]
    missing = [path.name for path in modules if path.name != "__init__.py" and path.name not in tree]
    assert not missing


def test_each_line_of_what_the_model_connects_to_names_its_tests():
    document = (ROOT / "docs" / "interoperability.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in document.split("\n## ")[0].splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    for way, *_, tests in rows:
        named = re.findall(r"test_\w+\.py", tests)
        assert named, way
        assert all((ROOT / "tests" / name).is_file() for name in named), way


def test_make_has_the_targets_that_the_readme_promises():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (\w+)", README)) <= targets


def test_the_public_names_are_these():
    assert sorted(vanilla_transformer.__all__) == [
        "TranslationAlignments",
        "TranslationPipeline",
        "TranslationScores",
        "VanillaTransformerConfig",
        "VanillaTransformerForConditionalGeneration",
        "VanillaTransformerModel",
        "VanillaTransformerPreTrainedModel",
        "VanillaTransformerTokenizer",
        "minimum_bayes_risk",
        "to_pharaoh",
        "train_tokenizer",
        "word_alignment",
    ]


def test_the_bare_package_needs_neither_the_training_extra_nor_the_tools():
    code = "import sys, vanilla_transformer; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "vanilla_transformer.modeling_vanilla_transformer" in loaded
    assert not loaded & {"datasets", "evaluate", "sacrebleu", "babel", "matplotlib", "vanilla_transformer.training"}


def test_the_wheel_holds_everything_and_runs_without_the_repository(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {f"vanilla_transformer/training/recipes/{path.name}" for path in (ROOT / "training/recipes").iterdir()}
    others = {"vanilla_transformer/model_cards/template.md", "vanilla_transformer/native_vanilla_transformer.cpp"}
    assert recipes | others <= set(names)
    assert not [name for name in names if name.startswith(("tests", "scripts", "docs"))]

    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import vanilla_transformer.training.train as t; print(t.__file__)"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.startswith(str(tmp_path / "site")), result.stderr[-2000:]

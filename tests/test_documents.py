"""The README's code and commands, `--help`, the wheel, and the public names."""

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import run_code, run_command

import vanilla_transformer
from vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration, train_tokenizer
from vanilla_transformer.training.settings.recipe import parse_recipe
from vanilla_transformer_commands import ready_help
from vanilla_transformer_commands.main import COMMANDS as COMMANDS_OF_PROGRAM


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
TRAIN_PROGRAM = re.compile(r"(?:vanilla-transformer|-m vanilla_transformer_commands) train ")
TRAIN = [line for line in COMMANDS if TRAIN_PROGRAM.search(line) and "[" not in line and "..." not in line]
RECIPES = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.DOTALL)
# What the pages leave out of recipes that begin with these fields.
LEFT_OUT = {
    "stages": "corpora: {backtranslated: {train_file: a.tsv}, clean: {train_file: b.tsv}}\n",
    "transforms": "train_file: a.tsv\n",
}
# What `python PATH` and `python -m NAME` do.
RUN_MAIN = """
import runpy, sys
del sys.argv[0]
if sys.argv[0] == "-m":
    del sys.argv[0]
    sys.modules.pop(sys.argv[0], None)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
PROGRAMS = {
    "train": ["-m", "vanilla_transformer.training.train"],
    "evaluate": ["-m", "vanilla_transformer.training.evaluate"],
    "phrasebook": ["-m", "vanilla_transformer.training.data.phrasebook"],
    **{path.stem: [str(path)] for path in sorted((ROOT / "scripts").glob("*.py"))},
}


VANILLA = ["-m", "vanilla_transformer_commands"]
COMMAND_NAMES = list(COMMANDS_OF_PROGRAM)


@pytest.fixture
def saved_model(tmp_path):
    """A folder with an untrained model in runs/quickstart and runs/en-fr."""
    tokenizer = train_tokenizer(["3 days ago"], 270)
    config = VanillaTransformerConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    for name in ("quickstart", "en-fr", "many"):
        if name == "many":
            tokenizer.add_languages(["de", "fr"], ["en"])
            config.vocab_size = config.decoder_vocab_size = len(tokenizer)
        VanillaTransformerForConditionalGeneration(config).save_pretrained(tmp_path / "runs" / name)
        tokenizer.save_pretrained(tmp_path / "runs" / name)
    return tmp_path


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_each_python_block_of_the_readme_runs(code, saved_model):
    assert run_code(code, cwd=saved_model, check=True).stdout.strip()


def test_the_examples_of_the_decoding_guide_run_from_top_to_bottom(saved_model):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8"), re.DOTALL)
    run_code("\n".join(blocks), cwd=saved_model, check=True)
    assert (saved_model / "alignment.png").stat().st_size > 1000


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_each_recipe_of_the_training_guide_is_understood(recipe, tmp_path):
    (tmp_path / "mine.yaml").write_text(LEFT_OUT.get(recipe.partition(":")[0], "") + recipe, encoding="utf-8")
    understood = parse_recipe([str(tmp_path / "mine.yaml"), "--output_dir", "run"])
    assert understood.data.train_file or understood.mixture.corpora


@pytest.mark.parametrize("line", TRAIN, ids=range(len(TRAIN)))
def test_each_training_command_of_the_documents_is_understood(line, saved_model, monkeypatch):
    monkeypatch.chdir(saved_model)
    (saved_model / "runs" / "en-fr" / "recipe.yaml").write_text("dataset: phrasebook:en-fr\noutput_dir: runs/en-fr\n")
    for recipe in RECIPES:
        if name := re.search(r"output_dir: runs/(\w+)", recipe):
            (saved_model / f"{name[1]}.yaml").write_text(recipe, encoding="utf-8")
    words = shlex.split(TRAIN_PROGRAM.split(line, maxsplit=1)[1], comments=True)
    recipe = parse_recipe([word for word in words if word != "&&"])
    assert recipe.training.output_dir
    assert recipe.data.dataset or recipe.data.train_file or recipe.mixture.corpora


def test_the_translate_command_of_the_readme_runs(saved_model):
    (line,) = [line for line in COMMANDS if line.startswith("vanilla-transformer translate runs/en-fr")]
    (saved_model / "sentences.txt").write_text("3 days ago\n\n")
    run_command(*shlex.split(line)[1:], "--max_new_tokens", 3, cwd=saved_model, check=True)
    assert (saved_model / "translations.txt").read_text().count("\n") == 2


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_help_says_how_a_program_is_used(program):
    assert "usage:" in run_code(RUN_MAIN, *program, "--help", cwd=ROOT, check=True).stdout


def test_the_tree_of_the_readme_names_every_module():
    tree = README.split("## The tree")[1]
    modules = [*(ROOT / "vanilla_transformer").glob("*.py"), *(ROOT / "training").rglob("*.py")]
    modules += [*(ROOT / "scripts" / "vanilla_transformer_commands").rglob("*.py")]
    missing = [path.name for path in modules if not path.name.startswith("__") and path.name not in tree]
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
        "VanillaTransformerUnitTokenizer",
        "minimum_bayes_risk",
        "to_pharaoh",
        "train_tokenizer",
        "train_unit_tokenizer",
        "word_alignment",
    ]


def test_the_bare_package_needs_neither_the_training_extra_nor_the_tools():
    code = "import sys, vanilla_transformer; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "vanilla_transformer.modeling_vanilla_transformer" in loaded
    assert not loaded & {"datasets", "evaluate", "sacrebleu", "babel", "matplotlib", "vanilla_transformer.training"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The files that the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def from_wheel(site: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess:
    """Runs Python outside the repository, with the wheel first on the path."""
    environment = {"PYTHONPATH": str(site), "PATH": "", "HOME": str(site.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    result = subprocess.run(command, env=environment, cwd=site.parent, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stderr[-2000:]
    return result


def test_the_wheel_holds_everything(site):
    names = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    recipes = {f"vanilla_transformer/training/recipes/{path.name}" for path in (ROOT / "training/recipes").iterdir()}
    others = {"vanilla_transformer/model_cards/template.md", "vanilla_transformer/engine_compiled.cpp"}
    assert recipes | others <= names
    assert not [name for name in names if name.startswith(("tests", "scripts", "training", "docs"))]
    (entry,) = site.glob("*.dist-info/entry_points.txt")
    assert "vanilla-transformer = vanilla_transformer_commands.main:main" in entry.read_text()


def test_the_commands_of_the_wheel_train_score_translate_show_and_export(site):
    sizes = "--d_model 16 --encoder_layers 1 --decoder_layers 1 --encoder_ffn_dim 16 --decoder_ffn_dim 16"
    recipe = f"quickstart.yaml --output_dir run --vocab_size 300 --phrasebook_size 2000 --max_eval_samples 5 {sizes}"
    commands = [
        f"train {recipe} --max_steps 2 --warmup_steps 1",
        "evaluate run --dataset phrasebook:en-de --max_eval_samples 3",
        "translate run --input in.txt",
        "info run",
        "export run --format marian --output marian",
    ]
    (site.parent / "in.txt").write_text("3 days ago\n")
    # In one process, which imports the package once.
    code = "import sys\nfrom vanilla_transformer_commands.main import run\n"
    code += "for line in sys.argv[1:]: name, *argv = line.split(); run(name, argv); print('== end of', name)"
    printed = re.split("== end of .*\n", from_wheel(site, "-c", code, *commands).stdout)
    _, scores, translations, shown, _, _ = printed
    assert "run on 3 pairs of the test split" in scores
    assert translations.count("\n") == 1
    assert re.search(r"^layers +1 \+ 1$", shown, re.MULTILINE)
    assert re.search(r"^engine, int8 +(compiled|packed)", shown, re.MULTILINE)
    assert (site.parent / "marian" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", COMMAND_NAMES)
def test_help_of_a_command_needs_no_library(name, site):
    """It imports neither torch nor transformers, so it answers in a fraction of a second."""
    code = "import sys, vanilla_transformer_commands.main as m; sys.argv[1:] = [{!r}, '--help']\n"
    code += "try: m.main()\nexcept SystemExit as end: assert not end.code\nprint(*sys.modules)"
    *shown, loaded = from_wheel(site, "-c", code.format(name)).stdout.splitlines()
    assert shown[0].startswith(f"usage: vanilla-transformer {name} ")
    assert not {"torch", "transformers", "numpy", "yaml"} & set(loaded.split())


@pytest.mark.parametrize("name", [name for name, command in COMMANDS_OF_PROGRAM.items() if command.ready_help])
def test_the_help_that_lies_ready_is_that_of_the_parser(name, monkeypatch):
    """`make help` writes it."""
    monkeypatch.setattr(sys, "argv", [""])
    monkeypatch.setenv("COLUMNS", "80")
    assert (ready_help.FOLDER / f"{name}.txt").read_text(encoding="utf-8") == ready_help.text(name)


def test_the_program_lists_its_commands_and_refuses_others(site):
    assert from_wheel(site, *VANILLA).stdout == from_wheel(site, *VANILLA, "--help").stdout
    refused = from_wheel(site, *VANILLA, "trian", check=False)
    assert (refused.returncode, refused.stderr) == (2, "error: there is no command 'trian': did you mean train?\n")
    refused = run_command("translate", "run", "--bams", 3)
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: unrecognized arguments: --bams 3 (`vanilla-transformer translate --help` lists the options)\n"
    )


def test_a_shell_completes_commands_and_options():
    script = run_command("completion", "bash", check=True)
    ask = "COMP_WORDS=({words}); COMP_CWORD={last}; {function}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    (function,) = re.findall(r"^complete .* -F (\w+)", script.stdout, re.MULTILINE)

    def completed(*words: str) -> list[str]:
        question = ask.format(words=" ".join(words), last=len(words) - 1, function=function)
        shell = subprocess.run(["bash", "-c", f"{script.stdout}\n{question}"], capture_output=True, text=True)
        return shell.stdout.split()

    assert completed("vanilla-transformer", "tr") == ["train", "translate"]
    assert completed("vanilla-transformer", "train", "--label_sm") == ["--label_smoothing"]
    assert completed("vanilla-transformer", "export", "--format", "on") == ["onnx"]

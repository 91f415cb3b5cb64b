"""vanilla-transformer export, and the examples in docs/interoperability.md."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from vanilla_transformer import VanillaTransformerForConditionalGeneration, train_tokenizer
from vanilla_transformer.training.program import run_program
from vanilla_transformer_commands import export as SCRIPT


ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "interoperability.md").read_text(encoding="utf-8")
(SECTION,) = re.findall(r"\n## To other runtimes\n(.*?)\n## ", DOCUMENT, re.DOTALL)
COMMANDS = re.findall(r"^vanilla-transformer export (.*)", SECTION, re.MULTILINE)
EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
TEXTS = ["3 days ago", "1,234.50 euros"]
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({modules}))\n"


@pytest.fixture
def make_model(lively_model, tmp_path):
    """Saves a model that translates the two texts of the examples differently, and ends both; returns it."""

    def save(name="quickstart", **fields) -> VanillaTransformerForConditionalGeneration:
        tokenizer = train_tokenizer(TEXTS, 290)
        model = lively_model(vocab_size=len(tokenizer), max_position_embeddings=100, seed=7, **fields)
        with torch.no_grad():
            model.lm_head.bias[2] += 0.5
        model.save_pretrained(tmp_path / "runs" / name)
        tokenizer.save_pretrained(tmp_path / "runs" / name)
        return model

    return save


def expected_of(model, tokenizer, **options):
    sequences = model.generate(**tokenizer(TEXTS, return_tensors="pt", padding=True), **options)
    assert (sequences == 2).any(dim=1).all()
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    assert texts[0] != texts[1]
    return texts


def printed_by(example, folder, *without):
    """The output of an example's last line, in a process that cannot import these modules."""
    code = WITHOUT.format(modules=["vanilla_transformer", *without]) + example
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize("number", range(4), ids=SCRIPT.FORMATS)
def test_the_command_and_the_example_of_each_format_do_what_they_say(number, make_model, tmp_path, monkeypatch):
    model = make_model()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    kind = list(SCRIPT.FORMATS)[number]
    SCRIPT.main(shlex.split(COMMANDS[number]))
    assert [path.name for path in (tmp_path / "exported").iterdir()] == [kind]
    # onnxruntime needs neither torch nor transformers; torch's programs need only torch
    without = {"onnx": ["torch", "transformers"], "torch": ["transformers"]}.get(kind, [])
    found = printed_by(EXAMPLES[number], tmp_path, *without)
    if kind == "torch":
        assert found == repr(model.generate(torch.tensor([[5, 6, 7, 2]]), num_beams=1, max_length=20))
    elif kind == "ctranslate2":
        # in int8, whose outputs need not be those of the model
        assert len(ast.literal_eval(found)) == len(TEXTS)
    else:
        options = {"num_beams": 1} if kind == "onnx" else {}
        assert ast.literal_eval(found) == expected_of(model, tokenizer, **options)


def test_each_format_has_a_command_and_an_example():
    formats = [shlex.split(command)[2] for command in COMMANDS]
    assert formats == list(SCRIPT.FORMATS)
    assert [re.findall(r"exported/(\w+)", example)[0] for example in EXAMPLES] == formats


def test_ctranslate2_by_the_script_finds_what_generate_finds(make_model, tmp_path):
    model = make_model()
    folder = tmp_path / "exported"
    SCRIPT.main([str(tmp_path / "runs" / "quickstart"), "--format", "ctranslate2", "--output", str(folder)])
    (example,) = [example for example in EXAMPLES if "ctranslate2" in example]
    found = ast.literal_eval(printed_by(example.replace("exported/ctranslate2", str(folder)), tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs" / "quickstart")
    assert found == expected_of(model, tokenizer, early_stopping=True)


def test_quantization_reaches_ctranslate2(make_model, tmp_path):
    make_model()
    sizes = []
    for more in ([], ["--quantization", "int8"]):
        folder = tmp_path / f"exported{len(sizes)}"
        SCRIPT.main([str(tmp_path / "runs" / "quickstart"), "--format", "ctranslate2", "--output", str(folder), *more])
        sizes.append((folder / "model.bin").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize(
    ("fields", "argv", "message"),
    [
        ({}, ["--format", "marian", "--output", "runs"], "output=runs exists: choose another, or delete it first"),
        ({}, ["--format", "onnx", "--quantization", "int8"], "--quantization int8 needs --format ctranslate2"),
        ({}, ["--format", "ctranslate2", "--quantization", "int4"], "int4 is not a valid quantization type"),
        ({"d_v": 3}, ["--format", "ctranslate2"], "d_v=3 is not d_model=16 / encoder_attention_heads=4"),
        ({"normalize_before": True}, ["--format", "marian"], "but normalize_before=True"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(
    fields, argv, message, make_model, tmp_path, monkeypatch, capsys
):
    make_model(**fields)
    monkeypatch.chdir(tmp_path)
    refused(["runs/quickstart", "--output", "new", *argv], message, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def refused(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(SCRIPT.main, argv)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_another_model_or_none_is_refused(make_model, tmp_path, monkeypatch, capsys):
    make_model()
    monkeypatch.chdir(tmp_path)
    SCRIPT.main(["runs/quickstart", "--format", "marian", "--output", "marian"])
    assert type(AutoModelForSeq2SeqLM.from_pretrained("marian")).__name__ == "MarianMTModel"
    refused(["marian", "--format", "onnx", "--output", "new"], "config.json has model_type='marian'", capsys)
    refused(["./nowhere", "--format", "onnx", "--output", "new"], "nowhere: no such folder", capsys)
    assert not Path("new").exists()


def test_a_missing_package_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(SCRIPT.importlib.util, "find_spec", lambda name: None)
    output = str(tmp_path / "new")
    refused(["any", "--format", "onnx", "--output", output], "needs the package onnxscript: pip install", capsys)


def test_what_an_interrupted_export_left_is_replaced(make_model, tmp_path, monkeypatch):
    make_model()
    monkeypatch.chdir(tmp_path)
    Path("new.part").mkdir()
    Path("new.part", "half").write_text("")
    SCRIPT.main(["runs/quickstart", "--format", "marian", "--output", "new"])
    assert not Path("new", "half").exists()
    assert not Path("new.part").exists()

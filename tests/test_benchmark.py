"""scripts/benchmark.py: what it prints and writes, and that both sides are measured doing the same work."""

import gzip
import importlib.util
import json
import math
import random
import runpy
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode

from vanilla_transformer import train_tokenizer
from vanilla_transformer.training.batching import TokenBudgetBatches
from vanilla_transformer.training.data import read_lines


SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
BENCHMARK = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
CPU = not torch.cuda.is_available()
FILES = {"train": 40, "val": 5}
BUDGET, VOCABULARY = 160, 280
SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 32}
FIELDS = {**SIZES, "vocab_size": VOCABULARY, "per_device_train_batch_tokens": BUDGET, "dropout": 0.0, "warmup_steps": 4}
FIELDS = [word for name, value in FIELDS.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def multi30k(tmp_path_factory):
    """A folder with the files that the recipe names, of few and uneven sentences."""
    folder, draw = tmp_path_factory.mktemp("multi30k"), random.Random(0)
    for split, count in FILES.items():
        for language, words in (("en", "a dog runs over the red grass"), ("de", "ein hund rennt über das gras")):
            lines = [" ".join(draw.choices(words.split(), k=draw.randint(2, 9))) for _ in range(count)]
            with gzip.open(folder / f"{split}.lc.norm.tok.{language}.gz", "wt", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
    return folder


@pytest.fixture(scope="module")
def lengths(multi30k):
    """Tokens of every source and target of the training split, counted one by one."""
    lines = {language: list(read_lines(multi30k / f"train.lc.norm.tok.{language}.gz")) for language in ("en", "de")}
    texts = [line for pair in zip(lines["en"], lines["de"], strict=True) for line in pair]
    tokenizer = train_tokenizer(texts, VOCABULARY, pretokenized=True)
    return [[len(tokenizer(line)["input_ids"]) for line in lines[language]] for language in ("en", "de")]


@pytest.mark.skipif(not CPU, reason="measures memory of the process")
def test_the_figures_of_a_run_agree_with_each_other_and_with_a_count(multi30k, lengths, tmp_path):
    # A turn that sees every row equally often, on both sides: its tokens are known.
    ours = len(TokenBudgetBatches(*lengths, BUDGET))
    marian = math.ceil(FILES["train"] / round(FILES["train"] / ours))
    updates = math.lcm(ours, marian)
    assert ours > 1

    command = [sys.executable, SCRIPT, "train", "--cells", "tiny", "--multi30k_dir", multi30k, "--output"]
    turns = ["--rounds", "2", "--updates", updates, "--warmup", updates, "--threads", "1"]
    run = subprocess.run(
        [str(word) for word in (*command, tmp_path / "out.json", *turns, *FIELDS)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["threads"] == 1
    assert results["versions"]["torch"] == torch.__version__
    cell = results["cells"]["tiny"]
    found = {(entry["side"], entry["dtype"]): entry for entry in cell["contenders"]}
    assert set(found) == {(side, dtype) for side in ("ours", "marian") for dtype in ("float32", "bfloat16")}

    def median(entry, what):
        return statistics.median(turn[what] / turn["seconds"] for turn in entry["rounds"])

    flops = {turn["flops"] for entry in found.values() for turn in entry["rounds"]}
    assert max(flops) == pytest.approx(min(flops), rel=1e-12)
    for (_, dtype), entry in found.items():
        assert [turn["tokens"] for turn in entry["rounds"]] == 2 * [sum(lengths[1]) * updates / (
            ours if entry["side"] == "ours" else marian
        )]  # fmt: skip
        assert entry["tokens_per_second"] == pytest.approx(median(entry, "tokens"))
        for name, peer in (("same_dtype", dtype), ("float32", "float32")):
            quotient = median(entry, "tokens") / median(found["marian", peer], "tokens")
            assert entry["ratio_to_marian"][name] == pytest.approx(quotient)
        ceiling = statistics.median(cell["ceilings"][dtype])
        assert entry["share_of_ceiling"] == pytest.approx(median(entry, "flops") / ceiling)
        assert 0 < entry["memory_beyond_state"] < entry["state"]
        assert f"{entry['tokens_per_second']:,.0f}" in run.stdout


def contender(folder: Path, side: str, **options):
    """The Trainer that a worker of tiny builds."""
    told = ["--output_dir", str(folder), "--max_steps", "1000", "--bf16", "false"]
    recipe = [*BENCHMARK.CELLS["tiny"].recipe, *BENCHMARK.TRAINING_ALONE, "--data_dir", str(folder), *FIELDS, *told]
    return BENCHMARK.build_contender(recipe, folder, BENCHMARK.Contender(side, "float32", **options))


@pytest.fixture
def prepared(multi30k):
    """The folder, with tokenizer and rows."""
    recipe = [*BENCHMARK.CELLS["tiny"].recipe, *BENCHMARK.TRAINING_ALONE, "--data_dir", str(multi30k), *FIELDS]
    if not (multi30k / "tokenizer").exists():
        BENCHMARK.prepare(recipe, multi30k)
    return multi30k


def test_both_sides_are_trained_on_the_same_tokens_from_the_same_weights(prepared):
    """Fed the same batches they stay close; what parts them is Marian's constant bias."""
    measured = {}
    for name, options in {"ours": {}, "marian": {}, "fed": {"side": "marian", "same_batches": True}}.items():
        trainer = contender(prepared, **{"side": name, **options})
        measured[name] = BENCHMARK.measure_losses(trainer, prepared, loss_tokens=3000)

    ours = measured["ours"]
    assert ours["after"]["nll"] < ours["before"]["nll"] - 0.1
    for name, found in measured.items():
        assert found["before"] == pytest.approx(ours["before"], rel=1e-5)
        # To the end of the update that reaches the number.
        assert 3000 <= found["tokens"] < 3000 + BUDGET + (BUDGET if name == "marian" else 0)
    assert {"tokens": ours["tokens"], "updates": ours["updates"]}.items() <= measured["fed"].items()
    learned = ours["before"]["nll"] - ours["after"]["nll"]
    assert abs(measured["fed"]["after"]["nll"] - ours["after"]["nll"]) < learned / 4


def test_the_validation_loss_is_that_of_sentences_taken_one_by_one(prepared):
    from datasets import load_from_disk

    rows = load_from_disk(prepared / "validation")
    trainer = contender(prepared, "ours")
    found = BENCHMARK.validation_loss(trainer, rows)

    nll = smoothed = 0.0
    model, smoothing = trainer.model.double().eval(), trainer.model.config.label_smoothing
    for row in rows:
        inputs = [model.config.decoder_start_token_id, *row["labels"][:-1]]
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]]), decoder_input_ids=torch.tensor([inputs])).logits[0]
        scores = logits.log_softmax(-1)
        true = -scores[range(len(inputs)), row["labels"]].sum().item()
        nll += true
        smoothed += (1 - smoothing) * true - smoothing * scores.mean(-1).sum().item()
    count = sum(map(len, rows["labels"]))
    assert found == pytest.approx({"nll": nll / count, "smoothed": smoothed / count}, rel=1e-5)


@pytest.mark.parametrize("side", ["ours", "marian"])
def test_the_operations_of_an_update_are_those_that_torch_counts(side, tiny_model):
    model = tiny_model(attention="eager", d_model=32)
    model = BENCHMARK.build_marian(model) if side == "marian" else model
    model.set_attn_implementation("eager")
    rows, source, target = 3, 7, 5
    sources, targets = (torch.randint(3, 61, (rows, length)) for length in (source, target))
    # torch's counter leaves out products that are added in place.
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        model.train()(input_ids=sources, labels=targets).loss.backward()
    assert BENCHMARK.training_flops(model.config, rows * [(source, target)]) == counted.get_total_flops()


def test_marian_with_our_weights_computes_what_ours_does(tiny_model, padded):
    model = tiny_model()
    marian = BENCHMARK.build_marian(model).eval()
    (source, mask), (target, _) = padded(), padded(seed=1)
    inputs = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}
    with torch.no_grad():
        torch.testing.assert_close(marian(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


CTRANSLATE2 = importlib.util.find_spec("ctranslate2") is not None


@pytest.mark.skipif(not CTRANSLATE2, reason="the dev and bench extras install ctranslate2")
def test_the_figures_of_decoding_agree_with_each_other_and_every_output_has_the_fixed_length(tmp_path):
    names = ["ours int8", "marian float32", "marian bfloat16", "ctranslate2 int8"]
    options = ["--cells", "4x16", "--rounds", "2", "--threads", "1", "--output", tmp_path / "out.json"]
    sizes = [*FIELDS, "--encoder_attention_heads", "2", "--decoder_attention_heads", "2"]
    command = [sys.executable, SCRIPT, "decode", "--contenders", *names, *options, *sizes]
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert "ctranslate2" in results["versions"]
    found = {f"{entry['side']} {entry['dtype']}": entry for entry in results["cells"]["4x16"]["contenders"]}
    assert list(found) == names

    def speed(name):
        return statistics.median(turn["tokens"] / turn["seconds"] for turn in found[name]["rounds"])

    marian = max(speed("marian float32"), speed("marian bfloat16"))
    for name, entry in found.items():
        assert [turn["tokens"] for turn in entry["rounds"]] == 2 * [16 * 32]
        assert entry["tokens_per_second"] == pytest.approx(speed(name))
        peers = {"CTranslate2 int8": speed("ctranslate2 int8"), "Marian's best": marian}
        assert entry["ratios"] == pytest.approx({peer: speed(name) / value for peer, value in peers.items()})
        assert 0 <= entry["memory"] < entry["held"]
        assert f"{entry['tokens_per_second']:,.1f}" in run.stdout


@pytest.fixture(scope="module")
def translating(tiny_model, tmp_path_factory):
    """A folder with a tiny model whose outputs end at many lengths, its tokenizer, and what CTranslate2 loads."""
    folder, model, tokenizer = (
        tmp_path_factory.mktemp("translating"),
        tiny_model(max_position_embeddings=64),
        BENCHMARK.word_tokenizer(61),
    )
    with torch.no_grad():
        model.lm_head.bias[model.config.eos_token_id] += 3
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if CTRANSLATE2:
        from vanilla_transformer.conversion.ctranslate2 import to_ctranslate2

        to_ctranslate2(model, tokenizer.convert_ids_to_tokens(range(61)), folder / "ctranslate2")
    return folder


def decoder(folder: Path, side: str, dtype: str = "float32"):
    return BENCHMARK.build_decoder(BENCHMARK.Contender(side, dtype), str(folder / "model"), folder, threads=1)


@pytest.mark.parametrize(("beams", "new_tokens"), [(1, None), (4, None), (4, 12)])
@pytest.mark.parametrize("side", ["stock", "marian", "ctranslate2"])
def test_every_side_translates_the_same_sentences_into_the_same_tokens(side, beams, new_tokens, translating):
    if side == "ctranslate2" and not CTRANSLATE2:
        pytest.skip("the dev and bench extras install ctranslate2")
    draw = random.Random(0)
    sources = [[*(draw.randrange(4, 61) for _ in range(length)), 2] for length in (9, 7, 6, 4, 1)]
    task = {"beams": beams, "batch": 2, "sources": sources, "new_tokens": new_tokens}
    _, prepare = decoder(translating, "ours")
    expected = prepare(task)()
    _, prepare = decoder(translating, side)
    assert prepare(task)() == expected
    lengths = set(map(len, expected))
    assert lengths == {12} if new_tokens else min(lengths) < max(lengths)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("side", ["ours", "stock"])
def test_stock_is_the_loop_of_transformers_on_our_modules(side, beams, translating):
    _, prepare = decoder(translating, side)
    generate = prepare.args[0]
    while hasattr(generate, "func"):
        model, generate = (generate.args or [generate.func.__self__])[0], generate.func
    calls, forward = [], model.model.decoder.forward
    # Not by a hook: with one in the model, ours leaves the work to transformers.
    model.model.decoder.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    prepare({"beams": beams, "batch": 1, "sources": [[5, 6, 2]], "new_tokens": 8})()
    # Ours works on packed weights, not in the modules.
    assert len(calls) == (8 if side == "stock" else 0)


def test_the_tasks_of_a_test_set_are_sorted_and_the_largest_is_scored(translating):
    tokenizer, _ = decoder(translating, "ours")
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(4, 61)}" for _ in range(draw.randint(1, 9))) for _ in range(120)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pairs = {"source": texts, "target": [text.upper() for text in texts]}
    tasks = BENCHMARK.tasks_of_text(tokenizer, pairs, "none", ["1x1", "4x64"])
    for cell, count in (("1x1", 100), ("4x64", 120)):
        lengths = [len(source) for source in tasks[cell]["sources"]]
        assert lengths == sorted((len(text.split()) for text in texts[:count]), reverse=True)
    assert "references" not in tasks["1x1"]
    scored = tasks["4x64"]
    assert scored["references"] == [" ".join(tokenizer.convert_ids_to_tokens(row)).upper() for row in scored["sources"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "missing"], "error: --model translates the test set of Multi30k"),
        (["--model", "missing", "--multi30k_dir", "missing"], "error: missing/test_2016_flickr.lc.norm.tok.en.gz: no"),
        (["--memory", "--cells", "1x1"], "error: --memory has cells of its own"),
        (["--contenders", "ours int4"], "invalid choice: 'ours int4'"),
    ],
)
def test_a_mistake_ends_decoding_before_anything_is_measured(arguments, message, tmp_path, monkeypatch, capsys):
    fails(["decode", *arguments], message, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: the cell tiny needs Multi30k"),
        (["--multi30k_dir", "missing"], "error: missing/train.lc.norm.tok.en.gz: no such file"),
        (["--cells", "base", "--d_modle", "8"], "unrecognized arguments: --d_modle 8"),
        (["--cells", "base", "--loss_tokens", "8"], "error: --loss_tokens compares the losses of tiny"),
        (
            ["--cells", "base", "--output", "missing/out.json"],
            "output=missing/out.json: there is no such",
        ),
        (["--rounds", "0"], "0 must be at least 1"),
    ],
)
def test_a_mistake_ends_it_before_anything_is_measured(arguments, message, tmp_path, monkeypatch, capsys):
    fails(["train", *arguments], message, tmp_path, monkeypatch, capsys)


def fails(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "--threads", str(torch.get_num_threads())])
    # The variable is read when the command line is parsed.
    monkeypatch.delenv("MULTI30K_DIR", raising=False)
    with pytest.raises(SystemExit) as ended:
        BENCHMARK.run()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err

"""vanilla-transformer benchmark: its output, and that all contenders do the same work."""

import gzip
import importlib.util
import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch
from processes import run_command
from tokenizers import pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode

from vanilla_transformer import train_tokenizer
from vanilla_transformer.conversion.marian import to_marian
from vanilla_transformer.engine_products import is_native
from vanilla_transformer.training.data.batching import TokenBudgetBatches
from vanilla_transformer.training.data.reading.lines import read_lines
from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.machine import processor
from vanilla_transformer.training.program import run_program
from vanilla_transformer_commands.benchmark import (
    availability,
    cells,
    contenders,
    data,
    losses,
    recipes,
    train,
    trainers,
    translators,
)
from vanilla_transformer_commands.benchmark.command import main
from vanilla_transformer_commands.benchmark.contenders import Contender
from vanilla_transformer_commands.benchmark.limits import count_weights, least_seconds, training_flops
from vanilla_transformer_commands.benchmark.tasks import tasks_of_text


CPU = not torch.cuda.is_available()
FILES = {"train": 40, "val": 5}
BUDGET, VOCABULARY = 160, 280
PYMARIAN = importlib.util.find_spec("pymarian") is not None
SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 32}
FIELDS = {**SIZES, "vocab_size": VOCABULARY, "per_device_train_batch_tokens": BUDGET, "dropout": 0.0, "warmup_steps": 4}
FIELDS = [word for name, value in FIELDS.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def multi30k(tmp_path_factory):
    """A folder with the recipe's files: a few sentences of uneven lengths."""
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

    command = ["train", "--cells", "tiny", "--multi30k_dir", multi30k, "--output", tmp_path / "out.json"]
    turns = ["--rounds", 2, "--updates", updates, "--warmup", updates, "--threads", 1]
    run = run_command("benchmark", *command, *turns, *FIELDS, check=True)
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["threads"] == 1
    assert results["versions"]["torch"] == torch.__version__
    cell = results["cells"]["tiny"]
    found = {(entry["side"], entry["dtype"]): entry for entry in cell["contenders"]}
    dtypes = ["float32", "bfloat16"] if is_native("bfloat16", torch.device("cpu")) else ["float32"]
    expected = {(side, dtype) for side in ("ours", "MarianMTModel") for dtype in dtypes}
    assert set(found) == expected | {("Marian C++", "float32")} if PYMARIAN else expected
    assert run.stdout.splitlines()[0].startswith(f"1 thread of {processor()}; torch {torch.__version__}")
    assert run.stdout.count("left out: ours bfloat16: ") == 2 - len(dtypes)
    assert run.stdout.count("left out: Marian C++ float32: pip install pymarian") == (not PYMARIAN)

    def median(entry, what):
        return statistics.median(turn[what] / turn["seconds"] for turn in entry["rounds"])

    whole = {name: entry for name, entry in found.items() if name[0] != "Marian C++"}
    flops = {turn["flops"] for entry in whole.values() for turn in entry["rounds"]}
    assert max(flops) == pytest.approx(min(flops), rel=1e-12)
    for (side, dtype), entry in found.items():
        if side == "Marian C++":
            # It ends its updates where it likes.
            assert all(abs(turn["tokens"] / updates - sum(lengths[1]) / ours) < BUDGET for turn in entry["rounds"])
            per_token = flops.copy().pop() / whole["ours", dtype]["rounds"][0]["tokens"]
            assert all(turn["flops"] / turn["tokens"] == pytest.approx(per_token) for turn in entry["rounds"])
        else:
            assert [turn["tokens"] for turn in entry["rounds"]] == 2 * [sum(lengths[1]) * updates / (
                ours if side == "ours" else marian
            )]  # fmt: skip
            assert 0 < entry["memory_beyond_state"] < entry["state"]
        assert entry["tokens_per_second"] == pytest.approx(median(entry, "tokens"))
        peers = {
            "MarianMTModel, same dtype": ("MarianMTModel", dtype),
            "MarianMTModel, float32": ("MarianMTModel", "float32"),
            "Marian C++": ("Marian C++", "float32"),
        }
        assert entry["ratios"] == pytest.approx(
            {
                name: median(entry, "tokens") / median(found[peer], "tokens")
                for name, peer in peers.items()
                if peer in found
            }
        )
        ceiling = statistics.median(cell["ceilings"][dtype])
        assert entry["share_of_limit"] == pytest.approx(median(entry, "flops") / ceiling)
        assert f"{entry['tokens_per_second']:,.0f}" in run.stdout


def contender(folder: Path, side: str, **options):
    """The Trainer of a worker in the cell tiny."""
    told = ["--output_dir", str(folder), "--max_steps", "1000", "--bf16", "false"]
    recipe = [*cells.CELLS["tiny"].recipe, *recipes.TRAINING_ALONE, "--data_dir", str(folder), *FIELDS, *told]
    return trainers.build_contender(recipe, folder, Contender(side, "float32", **options))


@pytest.fixture
def prepared(multi30k):
    """The folder, with tokenizer and rows."""
    recipe = [*cells.CELLS["tiny"].recipe, *recipes.TRAINING_ALONE, "--data_dir", str(multi30k), *FIELDS]
    if not (multi30k / "tokenizer").exists():
        data.prepare(recipe, multi30k)
    return multi30k


def test_both_sides_are_trained_on_the_same_tokens_from_the_same_weights(prepared):
    """With the same batches the losses stay close; they differ by Marian's constant bias."""
    measured = {}
    for name, options in {
        "ours": {},
        "MarianMTModel": {},
        "fed": {"side": "MarianMTModel", "same_batches": True},
    }.items():
        trainer = contender(prepared, **{"side": name, **options})
        measured[name] = losses.measure_losses(trainer, prepared, loss_tokens=3000)

    ours = measured["ours"]
    assert ours["after"]["nll"] < ours["before"]["nll"] - 0.1
    for name, found in measured.items():
        assert found["before"] == pytest.approx(ours["before"], rel=1e-5)
        # To the end of the update that reaches the number.
        assert 3000 <= found["tokens"] < 3000 + BUDGET + (BUDGET if name == "MarianMTModel" else 0)
    assert {"tokens": ours["tokens"], "updates": ours["updates"]}.items() <= measured["fed"].items()
    learned = ours["before"]["nll"] - ours["after"]["nll"]
    assert abs(measured["fed"]["after"]["nll"] - ours["after"]["nll"]) < learned / 4


def test_the_validation_loss_is_that_of_sentences_taken_one_by_one(prepared):
    from datasets import load_from_disk

    rows = load_from_disk(prepared / "validation")
    trainer = contender(prepared, "ours")
    found = losses.validation_loss(trainer, rows)

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


@pytest.mark.parametrize("side", ["ours", "MarianMTModel"])
def test_the_operations_of_an_update_are_those_that_torch_counts(side, tiny_model):
    model = tiny_model(attention="eager", d_model=32)
    model = to_marian(model) if side == "MarianMTModel" else model
    model.set_attn_implementation("eager")
    rows, source, target = 3, 7, 5
    sources, targets = (torch.randint(3, 61, (rows, length)) for length in (source, target))
    # torch's counter leaves out products that are added in place.
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        model.train()(input_ids=sources, labels=targets).loss.backward()
    assert training_flops(model.config, rows * [(source, target)]) == counted.get_total_flops()


class TestWhatTheMachineLacks:
    """The other contenders are measured."""

    def test_is_left_out_by_name(self, capsys):
        both = [Contender("ours", dtype) for dtype in ("float32", "int8")]
        found = availability.leave_out(both, lambda it: "it is broken" if it.dtype == "int8" else None)
        assert found == both[:1]
        assert capsys.readouterr().out == "left out: ours int8: it is broken\n"

    def test_is_an_error_if_nothing_else_is_asked_for(self):
        with pytest.raises(UserError, match="no contender can be measured"):
            availability.leave_out([Contender("ours", "int8")], lambda _: "it is broken")

    @pytest.mark.parametrize(
        ("fields", "reasons"),
        [
            ({"encoder_attention_heads": 2}, {}),
            ({"normalize_before": True}, dict.fromkeys(("MarianMTModel", "Marian C++"), "normalize_before=True")),
            ({"activation_function": "gelu"}, {"Marian C++": "activation_function='gelu'"}),
            ({"encoder_attention_heads": 4}, {"Marian C++": "encoder_attention_heads=4"}),
        ],
    )
    def test_a_peer_trains_no_other_network_than_the_recipe_s(self, fields, reasons, tiny_model):
        model = tiny_model(**{"encoder_attention_heads": 2, **fields})
        for side in ("ours", "MarianMTModel", "Marian C++"):
            found = train.why_not_held(model, Contender(side, "float32"))
            assert reasons[side] in found if side in reasons else found is None

    def test_has_its_reason(self, monkeypatch):
        reason = {name: availability.why_not_translated(it) for name, it in contenders.DECODERS.items()}
        assert reason["ours float32"] is reason["stock float32"] is reason["MarianMTModel float32"] is None
        slow = None if is_native("bfloat16", torch.device("cpu")) else "torch has no fast product for bfloat16"
        for name in ("ours bfloat16", "MarianMTModel bfloat16"):
            assert reason[name] == slow or (slow and reason[name].startswith(slow))
        # As on a machine that has nothing but torch.
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert availability.why_not_translated(contenders.DECODERS["ctranslate2 int8"]) == "pip install '.[bench]'"
        assert "pip install pymarian" in availability.why_not_translated(contenders.DECODERS["Marian C++ float32"])
        assert "pip install pymarian" in availability.why_not_trained(contenders.DECODERS["Marian C++ float32"])


def test_the_least_time_is_that_of_reading_and_multiplying_each_weight(tiny_model):
    """Compares with a hand-written loop over two batches whose outputs end at different lengths."""
    model = tiny_model()
    d, vocabulary, inner = 16, 61, (24, 32)
    encoder, across = 3 * (4 * d * d + 2 * d * inner[0]), 2 * 2 * d * d
    decoder = 2 * (4 * d * d + 2 * d * d + 2 * d * inner[1]) + d * vocabulary
    assert count_weights(model) == (encoder + across, decoder)
    task = {"beams": 3, "batch": 2, "sources": [[5] * 4, [5] * 6, [5] * 5]}
    # One weight takes a second to be read, two to be multiplied by a row.
    limits = {"bytes": 4.0, "float32": 1.0, "int8": 1e9}
    steps = 3 * decoder * (2 + 2 + 1 + 1 + 1)  # rows of each step: both sentences, both, one; then the last batch's one
    expected = 2 * (encoder + across) * (10 + 5) + 2 * steps
    assert least_seconds(model, task, [2, 3, 2], "float32", limits) == pytest.approx(expected)
    # Four weights of one byte are read in a second, and multiplied in no time.
    expected = (2 * (encoder + across) + 5 * decoder) / 4
    assert least_seconds(model, task, [2, 3, 2], "int8", limits) == pytest.approx(expected)


CTRANSLATE2 = importlib.util.find_spec("ctranslate2") is not None


@pytest.mark.skipif(not CTRANSLATE2, reason="the dev and bench extras install ctranslate2")
def test_the_figures_of_decoding_agree_with_each_other_and_every_output_has_the_fixed_length(tmp_path):
    names = ["ours int8, compiled", "ours int8", "MarianMTModel float32", "MarianMTModel bfloat16", "ctranslate2 int8"]
    names += ["Marian C++ float32"]
    options = ["--cells", "4x16", "--rounds", "2", "--threads", "1", "--output", tmp_path / "out.json"]
    sizes = [*FIELDS, "--encoder_attention_heads", "2", "--decoder_attention_heads", "2"]
    run = run_command("benchmark", "decode", "--contenders", *names, *options, *sizes, check=True)
    assert run.stdout.splitlines()[0].startswith(f"1 thread of {processor()}; torch {torch.__version__}")
    results = json.loads((tmp_path / "out.json").read_text())
    assert "ctranslate2" in results["versions"]
    cell = results["cells"]["4x16"]
    found = {contenders.contender_name(entry): entry for entry in cell["contenders"]}
    # The others are named.
    assert list(found) == [name for name in names if f"left out: {name}: " not in run.stdout]
    assert {"MarianMTModel float32", "ctranslate2 int8"} <= set(found)
    assert ("Marian C++ float32" in found) == PYMARIAN

    def speed(name):
        return statistics.median(turn["tokens"] / turn["seconds"] for turn in found[name]["rounds"])

    bests = {"CTranslate2 int8": "ctranslate2 int8", "MarianMTModel": "MarianMTModel ", "Marian C++": "Marian C++ "}
    peers = {
        peer: max(speed(name) for name in found if name.startswith(start))
        for peer, start in bests.items()
        if peer != "Marian C++" or PYMARIAN
    }
    for name, entry in found.items():
        assert [turn["tokens"] for turn in entry["rounds"]] == 2 * [16 * 32]
        assert entry["tokens_per_second"] == pytest.approx(speed(name))
        assert entry["ratios"] == pytest.approx({peer: speed(name) / value for peer, value in peers.items()})
        assert 0 <= entry["memory"] < entry["held"]
        assert entry["share_of_limit"] > 0
        assert f"{entry['tokens_per_second']:,.1f}" in run.stdout
    assert set(cell["limits"]) >= {"bytes", "float32", "int8"}


@pytest.fixture(scope="module")
def translating(tiny_model, tmp_path_factory):
    """A folder with a tiny model whose outputs end at many lengths, its tokenizer, and its CTranslate2 form."""
    folder, model, tokenizer = (
        tmp_path_factory.mktemp("translating"),
        tiny_model(max_position_embeddings=64),
        data.word_tokenizer(61),
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
    return translators.build_decoder(Contender(side, dtype), str(folder / "model"), folder, threads=1)


@pytest.mark.parametrize(("beams", "new_tokens"), [(1, None), (4, None), (4, 12)])
@pytest.mark.parametrize("side", ["stock", "MarianMTModel", "ctranslate2"])
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
    calls = []
    if side == "stock":
        # With a hook in the model, ours would leave the work to transformers.
        model.model.decoder.register_forward_hook(lambda *_: calls.append(1))
    prepare({"beams": beams, "batch": 1, "sources": [[5, 6, 2]], "new_tokens": 8})()
    if side == "stock":
        assert len(calls) == 8
        assert model.last_engine is None
    else:
        assert model.last_engine.name in ("compiled", "packed")


def test_the_tasks_of_a_test_set_are_sorted_and_the_largest_is_scored(translating):
    tokenizer, _ = decoder(translating, "ours")
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(4, 61)}" for _ in range(draw.randint(1, 9))) for _ in range(120)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pairs = {"source": texts, "target": [text.upper() for text in texts]}
    tasks = tasks_of_text(tokenizer, pairs, "none", ["1x1", "4x64"])
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
        (["--memory", "--cells", "1x1"], "error: --memory has its own cells"),
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
            "output=missing/out.json: there is no folder missing",
        ),
        (["--rounds", "0"], "0 must be at least 1"),
    ],
)
def test_a_mistake_ends_it_before_anything_is_measured(arguments, message, tmp_path, monkeypatch, capsys):
    fails(["train", *arguments], message, tmp_path, monkeypatch, capsys)


def fails(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # The variable is read when the command line is parsed.
    monkeypatch.delenv("MULTI30K_DIR", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_program(main, [*arguments, "--threads", str(torch.get_num_threads())])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err

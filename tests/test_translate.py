"""The command translate: every line once and in its place, whatever the windows, the processes and the kills."""

import fcntl
import io
import json
import lzma
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from compilers import needs_compiler
from processes import place_of, start
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianConfig, MarianMTModel

from vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration, train_tokenizer
from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.program import run_program
from vanilla_transformer.training.translator import encode, translate_rows
from vanilla_transformer_commands import translate as SCRIPT


PROGRAM = [sys.executable, "-m", "vanilla_transformer_commands", "translate"]
WORDS = [f"{first}{last}" for first in ("ba", "do", "ki", "lu", "mé") for last in ("n", "r", "s", "t")]
SIZES = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
}  # fmt: skip
OPTIONS = ["--num_beams", "2", "--max_new_tokens", "3"]


def save_model(folder: Path, seed: int = 0, **fields) -> Path:
    """A model that has learned nothing, but writes something else for each source."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(WORDS, 290)
    model = VanillaTransformerForConditionalGeneration(VanillaTransformerConfig(vocab_size=290, **SIZES, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn_like(parameter))
        # Some translations end before their greatest length, and others do not.
        model.lm_head.bias[model.config.eos_token_id] += 14
        # And some hold a line feed, which byte-level vocabularies write so.
        model.lm_head.bias[tokenizer.convert_tokens_to_ids("Ċ")] += 8
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_lines(number: int) -> list[str]:
    dice = random.Random(number)
    return [" ".join(dice.choices(WORDS, k=dice.randint(1, 6))) if i % 7 != 3 else " " * (i % 2) for i in range(number)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(folder) -> list[SimpleNamespace]:
    """What `generate()` makes of each of 60 lines alone: three texts, their scores, whether the best one ended."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for line in make_lines(60):
        options = {"num_beams": 3, "max_new_tokens": 3, "num_return_sequences": 3}
        output = model.generate(
            **tokenizer([line], return_tensors="pt"), **options, return_dict_in_generate=True, output_scores=True
        )
        texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        texts = [text.replace("\n", " ") for text in texts] if line.strip() else [""] * 3
        scores = output.sequences_scores.tolist() if line.strip() else [0.0] * 3
        ended = model.config.eos_token_id in output.sequences[0, 1:] or not line.strip()
        found.append(SimpleNamespace(texts=texts, scores=scores, ended=ended))
    assert len({one.texts[0] for one in found}) > 15
    return found


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def command(folder: Path, place: Path, lines: list[str], *argv, name: str = "out.txt") -> list[str]:
    source = write(place / "in.txt", lines)
    return list(map(str, [folder, "--input", source, "--output", place / name, *argv]))


def written(path: Path) -> list[str]:
    """The lines of a file, each of which has its end."""
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    assert not rest
    return lines


WAYS = [
    pytest.param([], id="one window"),
    pytest.param(["--window", "7"], id="small windows"),
    pytest.param(["--window", "1"], id="a window for each line"),
    pytest.param(["--batch_tokens", "9", "--window", "40"], id="small batches"),
    pytest.param(["--compiled"], id="compiled", marks=needs_compiler),
]


@pytest.mark.parametrize("argv", WAYS)
def test_each_line_is_translated_as_if_it_were_alone_and_in_its_place(argv, folder, alone, tmp_path):
    SCRIPT.main(command(folder, tmp_path, make_lines(60), "--num_beams", 3, "--max_new_tokens", 3, *argv))
    assert written(tmp_path / "out.txt") == [one.texts[0] for one in alone]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.txt"]


@pytest.mark.parametrize(
    ("name", "options", "content"),
    [
        ("lines.xz", (), lzma.compress("ban\x85dor\u2028kit\r\n\r\nlus\x0b".encode())),
        ("table.tsv", ("--source_column", "2"), "1\tban\x85dor\u2028kit\r\n\n2\t\r\n3\tlus\x0b".encode()),
        (
            "rows.jsonl",
            ("--source_column", "a.en"),
            "".join(json.dumps({"a": {"en": text}}) + "\n" for text in ("ban\x85dor\u2028kit", "", "lus\x0b")).encode(),
        ),
    ],
)
def test_one_translation_a_line_whatever_the_file(name, options, content, folder, tmp_path):
    """A file's sources have the translations that they have in plain lines."""
    (tmp_path / name).write_bytes(content)
    (tmp_path / "plain").write_text("ban\x85dor\u2028kit\n\nlus\x0b\n", encoding="utf-8", newline="\n")
    for file, extra in ((name, options), ("plain", ())):
        SCRIPT.main([str(folder), "--input", str(tmp_path / file), "--output", str(tmp_path / f"{file}.out"), *extra])
    found, expected = ((tmp_path / f"{file}.out").read_bytes() for file in (name, "plain"))
    assert found == expected
    assert found.count(b"\n") == 3


def test_n_best_lists_and_score_columns_hold_what_generate_tells(folder, alone, tmp_path):
    options = ["--num_beams", 3, "--max_new_tokens", 3, "--window", 25]
    SCRIPT.main(command(folder, tmp_path, make_lines(60), *options, "--n_best", 3, name="best.txt"))
    SCRIPT.main(command(folder, tmp_path, make_lines(60), *options, "--scores", name="scores.txt"))
    rows = [re.fullmatch(r"(\d+) \|\|\| (.*) \|\|\| (\S+)", line).groups() for line in written(tmp_path / "best.txt")]
    assert [(int(number), text) for number, text, _ in rows] == [
        (number, text) for number, one in enumerate(alone) for text in one.texts
    ]
    # Six digits are written; more and fewer rows are multiplied by other kernels, which differ in their last bits.
    assert [float(score) for *_, score in rows] == pytest.approx([s for one in alone for s in one.scores], abs=1e-4)
    columns = [line.split("\t", 1) for line in written(tmp_path / "scores.txt")]
    assert [text for _, text in columns] == [one.texts[0] for one in alone]
    assert [float(score) for score, _ in columns] == pytest.approx([one.scores[0] for one in alone], abs=1e-4)


def test_scores_of_a_search_that_tells_them_only_with_all_others(folder):
    """transformers' own search, on a model of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    model = MarianMTModel(MarianConfig(vocab_size=290, **SIZES, **special, max_length=40)).eval()
    rows = tokenizer(["ban dor", "kis"])["input_ids"]
    found = translate_rows(model, tokenizer, rows, 100, n_best=2, scores=True, num_beams=2, max_new_tokens=4)
    for row, hypotheses in zip(rows, found, strict=True):
        options = {"num_beams": 2, "max_new_tokens": 4, "num_return_sequences": 2, "output_scores": True}
        alone = model.generate(torch.tensor([row]), **options, return_dict_in_generate=True)
        assert [h.score for h in hypotheses] == pytest.approx(alone.sequences_scores.tolist(), abs=1e-5)
        assert [h.text for h in hypotheses] == tokenizer.batch_decode(alone.sequences, skip_special_tokens=True)


def test_a_warning_counts_and_names_the_translations_that_did_not_end(folder, alone, tmp_path, capsys):
    options = ["--num_beams", 3, "--max_new_tokens", 3]
    for number, window in enumerate((60, 3)):
        SCRIPT.main(command(folder, tmp_path, make_lines(60), *options, "--window", window, name=f"{number}.txt"))
        cut = [number for number, one in enumerate(alone, 1) if not one.ended]
        assert 5 < len(cut) < 50
        start = f"warning: {len(cut)} of the translations reached the maximum length and may be cut"
        assert f"{start} (lines {', '.join(map(str, cut[:5]))}, ...)" in capsys.readouterr().err


def test_standard_input_and_output_are_read_and_written_in_any_locale(folder, tmp_path):
    lines = ["mén dor", "", "kis"]
    SCRIPT.main(command(folder, tmp_path, lines, *OPTIONS))
    environment = {**os.environ, "LC_ALL": "C", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = [*PROGRAM, folder, *OPTIONS, "--window", "2"]
    result = subprocess.run(program, input="\n".join(lines).encode(), capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == (tmp_path / "out.txt").read_bytes()


def test_memory_holds_two_windows_at_most(folder, tmp_path, monkeypatch):
    class Line(str):
        """A line that is counted as long as somebody holds it."""

        held, most = 0, 0

        def __init__(self, text):
            Line.held += 1
            Line.most = max(Line.most, Line.held)

        def __del__(self):
            Line.held -= 1

    monkeypatch.setattr(
        "vanilla_transformer.training.data.reading.formats.read_lines",
        lambda path: (Line(f"ban {i % 10}") for i in range(200)),
    )
    SCRIPT.main([*command(folder, tmp_path, [], *OPTIONS), "--window", "10"])
    assert len(written(tmp_path / "out.txt")) == 200
    assert 10 <= Line.most <= 21


def test_the_bar_reaches_the_number_of_lines_and_says_how_fast(folder, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    argv = command(folder, tmp_path, make_lines(60), *OPTIONS, "--window", 20)
    for begun in (False, True):
        if begun:  # two of three windows are there
            stop_before(2, argv, monkeypatch)
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        SCRIPT.main(argv)
        assert re.search(r"translating: 100%.* 60/60 \[.*lines", terminal.getvalue())


def stop_before(window: int, argv: list[str], monkeypatch) -> None:
    """Begins a translation that fails at one window."""

    def translate(translator, number, lines, whole=SCRIPT.Translator.translate):
        if number == window:
            raise InterruptedError
        return whole(translator, number, lines)

    with monkeypatch.context() as patch:
        patch.setattr(SCRIPT.Translator, "translate", translate)
        with pytest.raises(InterruptedError):
            SCRIPT.main(argv)


def life(argv: list[str], output: Path, rank: int = 0, world: int = 1, port: int = 0, death: tuple = ()) -> None:
    """What a process of its own does: one of `world`. It dies at an event whose first argument ends in some way."""
    if world > 1:
        os.environ.update(place_of(rank, world, port))
    PartialState._reset_state()  # that of the process that was forked
    log = os.open(output.with_suffix(f".log{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    if death:

        def watch(event: str, arguments: tuple) -> None:
            if event == death[0] and str(arguments[0]).endswith(death[1]):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
    run_program(SCRIPT.main, argv)


def begin(argv: list[str], output: Path, *args, **options) -> multiprocessing.Process:
    return start(life, argv, output, *args, **options)


def finish(*processes: multiprocessing.Process, status: int = 0) -> None:
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [status] * len(processes)


def parts(output: Path) -> dict[str, int]:
    """The finished windows, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(f"{output}.parts").glob("*.txt")}


def kill_at_random(output: Path, processes: list[multiprocessing.Process], more: int, dice: random.Random) -> None:
    """After so many more windows, and a bit."""
    goal = len(parts(output)) + more
    while len(parts(output)) < goal:
        assert all(process.is_alive() for process in processes), output.with_suffix(".log0").read_text()[-3000:]
        time.sleep(0.001)
    time.sleep(dice.random() * 0.03)
    for process in processes:
        process.kill()
    finish(*processes, status=-signal.SIGKILL)


def test_sigkill_at_random_moments_changes_nothing(folder, tmp_path):
    lines, options = make_lines(3000), [*OPTIONS, "--window", 100]
    finish(begin(command(folder, tmp_path, lines, *options, name="unstopped.txt"), tmp_path / "unstopped.txt"))
    output = tmp_path / "out.txt"
    argv = command(folder, tmp_path, lines, *options)
    dice = random.Random(0)
    for _ in range(3):
        before = parts(output)
        kill_at_random(output, [begin(argv, output)], dice.randint(1, 5), dice)
        # What was there has not been written again.
        assert before.items() <= parts(output).items()
        assert not output.exists()
    finish(begin(argv, output))
    assert output.read_bytes() == (tmp_path / "unstopped.txt").read_bytes()
    assert len(written(output)) == 3000
    assert not list(tmp_path.glob("*.part*"))


DEATHS = {
    "before the settings": ("os.rename", "settings.json.part"),
    "writing a part": ("open", "00000002.txt.part"),
    "naming a part": ("os.rename", "00000002.txt.part"),
    "joining": ("open", "00000001.txt"),
    "naming the output": ("os.rename", "out.txt.part"),
    "cleaning up": ("shutil.rmtree", ".parts"),
    "the settings gone": ("os.remove", "settings.json"),
}


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
def test_sigkill_at_each_stage_changes_nothing(death, folder, tmp_path):
    output = tmp_path / "out.txt"
    argv = command(folder, tmp_path, make_lines(40), *OPTIONS, "--window", 10)
    SCRIPT.main([word.replace("out.txt", "unstopped.txt") for word in argv])
    if death[1] == "00000001.txt":  # it is opened to be joined only
        finish(begin(argv, output, death=("os.rename", "out.txt.part")), status=-signal.SIGKILL)
    finish(begin(argv, output, death=death), status=-signal.SIGKILL)
    finish(begin(argv, output))
    assert output.read_bytes() == (tmp_path / "unstopped.txt").read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_what_a_finished_translation_has_left_is_no_beginning(folder, tmp_path):
    output = tmp_path / "out.txt"
    argv = command(folder, tmp_path, make_lines(40), *OPTIONS, "--window", 10)
    finish(begin(argv, output, death=DEATHS["cleaning up"]), status=-signal.SIGKILL)
    finished, left = output.read_bytes(), parts(output)
    assert len(left) == 4
    for name in ("out.txt", "other.txt"):
        SCRIPT.main([*argv, "--scores", "--output", str(tmp_path / name)])
    assert output.read_bytes() == (tmp_path / "other.txt").read_bytes() != finished


def test_two_processes_share_the_windows_and_another_number_may_go_on(folder, tmp_path):
    lines, output = make_lines(1500), tmp_path / "out.txt"
    argv = command(folder, tmp_path, lines, *OPTIONS, "--window", 50)
    finish(begin([word.replace("out.txt", "unstopped.txt") for word in argv], tmp_path / "unstopped.txt"))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    two = [begin(argv, output, rank, 2, port) for rank in range(2)]
    kill_at_random(output, two, 4, random.Random(0))
    kill_at_random(output, [begin(argv, output)], 2, random.Random(1))
    finish(*(begin(argv, output, rank, 2, port) for rank in range(2)))
    assert output.read_bytes() == (tmp_path / "unstopped.txt").read_bytes()
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize(("lines", "window", "processes"), [(0, 5, 2), (23, 5, 1), (23, 5, 2), (4, 5, 3), (40, 10, 4)])
def test_every_line_is_one_processes_own(lines, window, processes):
    owners = [number // window % processes for number in range(lines)]
    for index in range(processes):
        state = SimpleNamespace(num_processes=processes, process_index=index)
        assert SCRIPT.own_lines(lines, window, state) == owners.count(index)


# What a run is that goes on with one of 20-line windows, a beam of 2 and three new tokens.
OTHERS = {
    "beams": (["--num_beams", "3"], "num_beams=2, but this run has num_beams=3"),
    "length penalty": (["--length_penalty", "2"], "length_penalty=None, but this run has length_penalty=2.0"),
    "greatest length": (["--max_new_tokens", "4"], "max_new_tokens=3, but this run has max_new_tokens=4"),
    "columns": (["--scores"], "scores=False, but this run has scores=True"),
    "n-best": (["--n_best", "2"], "n_best=None, but this run has n_best=2"),
    "compiled": (["--compiled"], "compiled=None, but this run has compiled=True"),
    "windows": (["--window", "30"], "window=20, but this run has window=30"),
}


@pytest.fixture
def stopped(folder, tmp_path, monkeypatch) -> list[str]:
    """The command line of a translation of which one window is there and two are not."""
    argv = command(folder, tmp_path, make_lines(60), *OPTIONS, "--window", 20)
    stop_before(1, argv, monkeypatch)
    return argv


@pytest.mark.parametrize(("argv", "message"), OTHERS.values(), ids=OTHERS)
def test_a_translation_does_not_go_on_with_other_options(argv, message, stopped, tmp_path):
    before = parts(tmp_path / "out.txt")
    with pytest.raises(UserError, match=message) as error:
        SCRIPT.main([*stopped, *argv])
    assert "delete the folder to start over" in str(error.value)
    assert parts(tmp_path / "out.txt") == before


def test_a_translation_does_not_go_on_with_another_model_or_input(stopped, tmp_path):
    before = parts(tmp_path / "out.txt")
    with pytest.raises(UserError, match="begun with another model"):
        SCRIPT.main([str(save_model(tmp_path / "other", seed=1)), *stopped[1:]])
    other = write(tmp_path / "other.txt", make_lines(61))
    with pytest.raises(UserError, match=f"began with other lines than {other}"):
        SCRIPT.main([*stopped, "--input", str(other)])
    assert parts(tmp_path / "out.txt") == before


def test_a_translation_goes_on_with_other_batches_and_a_moved_input(stopped, tmp_path):
    SCRIPT.main([*stopped, "--output", str(tmp_path / "unstopped.txt")])
    (tmp_path / "in.txt").rename(tmp_path / "moved.txt")
    SCRIPT.main([*stopped, "--batch_tokens", "30", "--input", str(tmp_path / "moved.txt")])
    assert (tmp_path / "out.txt").read_bytes() == (tmp_path / "unstopped.txt").read_bytes()


def test_two_runs_do_not_write_the_same_output(stopped, tmp_path):
    with open(tmp_path / "out.txt.parts" / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(UserError, match=r"out\.txt\.parts is being written to by another process"):
            SCRIPT.main(stopped)
    SCRIPT.main(stopped)
    assert len(written(tmp_path / "out.txt")) == 60


def test_a_line_beyond_learned_positions_is_named_and_what_was_done_is_kept(tmp_path, monkeypatch):
    model = save_model(tmp_path / "model", position_embedding_type="learned", max_position_embeddings=30)
    lines, translated = make_lines(50), []
    lines[43] = "ban " * 40
    argv = command(model, tmp_path, lines, *OPTIONS, "--window", 10)

    def translate(translator, number, lines, whole=SCRIPT.Translator.translate):
        found = whole(translator, number, lines)
        translated.append(number)
        return found

    monkeypatch.setattr(SCRIPT.Translator, "translate", translate)
    message = r"in\.txt, line 44 has \d+ tokens, but the model has learned positions for max_position_embeddings=30"
    with pytest.raises(UserError, match=message):
        SCRIPT.main(argv)
    # The line is corrected, and the first four windows are not translated again.
    lines[43] = "ban"
    write(tmp_path / "in.txt", lines)
    SCRIPT.main(argv)
    assert translated == [0, 1, 2, 3, 4]
    assert len(written(tmp_path / "out.txt")) == 50
    # Nor is a window whose lines have changed taken for what it was.
    stop_before(4, argv, monkeypatch)
    write(tmp_path / "in.txt", lines := [*lines[:20], "dor dor", *lines[21:]])
    SCRIPT.main(argv)
    tokenizer, model = AutoTokenizer.from_pretrained(model), AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    rows = encode(model, tokenizer, lines)
    expected = translate_rows(model, tokenizer, rows, 100, num_beams=2, max_new_tokens=3)
    assert written(tmp_path / "out.txt") == [found[0].text.replace("\n", " ") for found in expected]


MISTAKES = {
    "no model": (["./nowhere"], "nowhere: no such folder"),
    "no input": (["MODEL", "--input", "./nowhere"], "nowhere: no such file"),
    "no folder for the output": (["MODEL", "--output", "./no/where"], "output=no/where: there is no folder no"),
    "an output that is no file": (["MODEL", "--output", "/dev/null"], "output=/dev/null is not a file"),
    "no tokens": (["MODEL", "--batch_tokens", "0"], "batch_tokens=0 must be at least 1"),
    "no lines": (["MODEL", "--window", "-1"], "window=-1 must be at least 1"),
    "scores without a beam": (["MODEL", "--scores", "--num_beams", "1"], "--scores and --n_best need --num_beams 2"),
    "more than the beams": (["MODEL", "--n_best", "5"], "--n_best 5 is more than num_beams=4"),
    "no such program": (
        ["MODEL", "--compiled", "--compute_type", "bfloat16"],
        "compiled=True: the compiled program computes in float32 or int8, not in bfloat16",
    ),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(argv, message, folder, tmp_path):
    argv = [str(folder) if word == "MODEL" else word for word in argv]
    with pytest.raises(UserError, match=re.escape(message)):
        SCRIPT.main([*command(folder, tmp_path, ["ban"])[1:], *argv])


def test_wrong_bytes_are_named_before_anything_is_translated(folder, tmp_path):
    argv = command(folder, tmp_path, ["ban"] * 30, *OPTIONS, "--window", 10)
    (tmp_path / "in.txt").write_bytes(b"ban\n" * 24 + b"m\xe9n\n")
    with pytest.raises(UserError, match=r"in\.txt, line 25: byte 0xe9 is not UTF-8"):
        SCRIPT.main(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_a_model_with_several_ends_translates(folder, tmp_path):
    other = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("Ċ")
    ends = shutil.copytree(folder, tmp_path / "ends")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((ends / name).read_text())
        (ends / name).write_text(json.dumps(settings | {"eos_token_id": [2, other]}))
    lines = [line for line in make_lines(20) if line.strip()]
    SCRIPT.main(command(ends, tmp_path, lines, *OPTIONS))
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(ends).eval(), AutoTokenizer.from_pretrained(ends)
    found = [model.generate(**tokenizer([line], return_tensors="pt"), num_beams=2, max_new_tokens=3) for line in lines]
    assert {2, other} <= {int(row[0, -1]) for row in found}
    texts = [tokenizer.decode(row[0], skip_special_tokens=True).replace("\n", " ") for row in found]
    assert written(tmp_path / "out.txt") == texts


def said(errors: str) -> str:
    """Without the bar of transformers."""
    return re.sub(r"Loading weights.*", "", errors).strip()


@pytest.mark.parametrize("name", ["input", "output"])
def test_a_closed_stream_is_an_error_only_where_it_is_used(name, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, {"input": "__stdin__", "output": "__stdout__"}[name], None)
    argv = command(folder, tmp_path, ["ban"], *OPTIONS)
    SCRIPT.main(argv)
    with pytest.raises(UserError, match=f"the standard {name} is closed: name a file by --{name}"):
        SCRIPT.main([*argv, f"--{name}", "-"])


def test_ctrl_c_is_one_line_and_what_was_done_is_kept(folder, tmp_path, monkeypatch, capsys):
    def translate(translator, number, lines, whole=SCRIPT.Translator.translate):
        if number == 1:
            raise KeyboardInterrupt
        return whole(translator, number, lines)

    argv = command(folder, tmp_path, make_lines(60), *OPTIONS, "--window", 20)
    with monkeypatch.context() as patch:
        patch.setattr(SCRIPT.Translator, "translate", translate)
        with pytest.raises(SystemExit) as ended:
            run_program(SCRIPT.main, argv)
    assert ended.value.code == 130
    assert said(capsys.readouterr().err) == "interrupted"
    assert list(parts(tmp_path / "out.txt")) == ["00000000.txt"]


def test_head_takes_a_line_and_the_rest_is_silence(folder, tmp_path):
    source = write(tmp_path / "in.txt", make_lines(2) * 2000)
    words = f"{shlex.join(PROGRAM)} '{folder}' --input '{source}' --window 2 --max_new_tokens 3 | head -1"
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    run = subprocess.run(["bash", "-c", f"set -o pipefail; {words}"], env=environment, capture_output=True)
    assert run.returncode == 141
    assert run.stdout.count(b"\n") == 1
    assert said(run.stderr.decode()) == ""


@pytest.mark.parametrize("kind", ["a file", "no folder to lock"])
def test_parts_that_cannot_be_written_are_named(kind, folder, tmp_path):
    argv = command(folder, tmp_path, ["ban"], *OPTIONS)
    if kind == "a file":
        (tmp_path / "out.txt.parts").write_text("")
    else:
        (tmp_path / "out.txt.parts" / "lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"out\.txt\.parts cannot be written into: "):
        SCRIPT.main(argv)

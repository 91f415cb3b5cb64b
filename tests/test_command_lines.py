"""Every option that `--help` of a program lists, with values of a wrong type, out of range, and its default."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vanilla_transformer import train_tokenizer
from vanilla_transformer.conversion.checkpoints import pack_tokenizer, word_tokenizer
from vanilla_transformer.tokenization_vanilla_transformer import SPECIAL_TOKENS
from vanilla_transformer.training import evaluate
from vanilla_transformer.training.program import run_program
from vanilla_transformer_commands import average, convert, export, tokenizer, translate
from vanilla_transformer_commands.benchmark import command, decode, train


TEXTS = ["3 days ago", "1,234.50 euros"]


def measure(argv: list[str]) -> None:
    """The benchmark, to where it begins to measure."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, decode):
            patch.setattr(module, "about_this_run", lambda *_: exit(0))
        command.main(argv)


# Command lines that end without an error. The option that is tried is added to them.
PROGRAMS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "translate": (translate.main, "model --input a.txt --output out.txt --max_new_tokens 2"),
    "evaluate": (evaluate.main, "model --test_file a.txt a.txt --max_new_tokens 2"),
    "export": (export.main, "model --format marian --output new"),
    "convert": (
        convert.main,
        "model.pt --format torch --output new --tokenizer words --heads 4 --prefix net. --positions pe "
        "--source_embedding src.weight --target_embedding tgt.weight --output_projection out.weight",
    ),
    "average": (average.main, "run --last 2 --output_dir new"),
    "tokenizer": (tokenizer.main, "--train_file a.txt a.txt --vocab_size 300 --output_dir new"),
    "benchmark train": (measure, "train --cells base --vocab_size 300"),
    "benchmark decode": (measure, "decode --cells 1x1 --vocab_size 300"),
}
NUMBERS = ["0", "-1", "nan", "inf", "1.5", "1" + 30 * "0"]
# What is right of these, or at least harmless.
TAKEN = {
    "--length_penalty": ("0", "-1", "1.5"),
    "--bpe_dropout": ("0",),
    "--max_length_ratio": ("inf", "1.5", "1" + 30 * "0"),
    "--layer_norm_eps": ("1.5", "1" + 30 * "0"),
}
WRONG_TOO = {"--length_penalty": ("51", "-51")}
# How long something goes on.
UNBOUNDED = ("--rounds", "--warmup", "--updates", "--loss_tokens")
NAMES = ["", "no/such/name", "a.txt", "~no_such_user/here", "n" * 300, "-1", "none", "../../../../..", "a b", "\udcff"]


def options_of(program: str) -> list[argparse.Action]:
    """The options of a program, as its own parser has them."""
    found = []

    def keep(parser, *_: object, **__: object) -> None:
        found.append(parser)
        raise SystemExit

    main, argv = PROGRAMS[program]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", keep)
        with pytest.raises(SystemExit):
            main(argv.split())
    (parser,) = found
    if "benchmark" in program:
        parser = next(action for action in parser._actions if action.choices).choices[argv.split()[0]]
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


def wrong_values(action: argparse.Action) -> list[str]:
    """What a user may write by mistake."""
    if action.nargs == 0:
        return []
    if action.choices:
        return ["nothing", ""]
    kind = getattr(action.type, "__name__", "str")
    if kind in ("int", "float", "positive"):
        taken = TAKEN.get(action.option_strings[0], ())
        others = WRONG_TOO.get(action.option_strings[0], ())
        return ["many", "", *(number for number in NUMBERS if number not in taken), *others]
    return ["maybe", ""] if kind == "string_to_bool" else []


EVERY = [(program, action) for program in PROGRAMS for action in options_of(program)]
WRONG = [
    pytest.param(program, action.option_strings[0], value, id=f"{program} {action.option_strings[0]} {value}")
    for program, action in EVERY
    for value in wrong_values(action)
    if not (value == NUMBERS[-1] and action.option_strings[0] in UNBOUNDED)
]
HARMLESS = [
    pytest.param(program, action.option_strings[0], value, id=f"{program} {action.option_strings[0]} {value[:9]}")
    for program, action in EVERY
    if action.nargs != 0
    for value in (
        [str(action.default)] * (action.default is not None)
        + list(TAKEN.get(action.option_strings[0], ()))
        + [NUMBERS[-1]] * (action.option_strings[0] in UNBOUNDED)
        + NAMES * (getattr(action.type, "__name__", "str") in ("str", "Path") and not action.choices)
    )
]


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Path:
    """A model, the state dict of one of torch's with its tokenizer, a run with two checkpoints, and some text."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = train_tokenizer(TEXTS, 290)
    places = ["model", "run/checkpoint-1", "run/checkpoint-2"]
    for seed, name in enumerate(places):
        tiny_model(vocab_size=len(tokenizer), seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "a.txt").write_text("\n".join(TEXTS) + "\n")
    words = [*SPECIAL_TOKENS.values(), *(f"w{number}" for number in range(28))]
    pack_tokenizer(word_tokenizer(words, "<unk>"), SPECIAL_TOKENS, append_eos=True).save_pretrained(folder / "words")
    module = nn.Module()
    module.net = nn.Transformer(16, 4, 1, 1, dim_feedforward=24)
    module.src, module.tgt, module.out = nn.Embedding(40, 16), nn.Embedding(32, 16), nn.Linear(16, 32)
    module.register_buffer("pe", torch.randn(20, 1, 16))
    torch.save(module.state_dict(), folder / "model.pt")
    return folder


@pytest.fixture
def status_of(folder, tmp_path, monkeypatch, packed_engine) -> Callable[..., int]:
    """Runs a program with more options, or with another first word, beside the files."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("MULTI30K_DIR", raising=False)
    threads = torch.get_num_threads()

    def run(program: str, *words: str, first: str | None = None) -> int:
        main, line = PROGRAMS[program]
        argv = [*line.split(), *words]
        if first is not None:
            argv[0] = first
        try:
            run_program(main, argv)
        except SystemExit as ended:
            return ended.code
        finally:
            torch.set_num_threads(threads)
        return 0

    return run


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_programs_run(program, status_of, capsys):
    assert status_of(program) == 0, capsys.readouterr().err


@pytest.mark.parametrize(("program", "option", "value"), WRONG)
def test_a_wrong_value_is_refused_by_name(program, option, value, status_of, capsys, tmp_path):
    before = sorted(os.listdir(tmp_path))
    assert status_of(program, f"{option}={value}") == 2
    lines = capsys.readouterr().err.splitlines()
    assert "error: " in lines[-1]
    assert option.strip("-") in lines[-1]
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(("program", "option", "value"), HARMLESS)
def test_any_other_value_is_used_or_refused_in_a_line(program, option, value, status_of, capsys):
    status = status_of(program, f"{option}={value}")
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert (status, len(lines)) in ((0, 0), (2, 1))


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (program, name)
        for program in ("translate", "evaluate", "export", "convert", "average")
        for name in NAMES
        if (program, name) != ("evaluate", "a.txt")  # scores a file of translations
    ],
)
def test_any_other_name_in_the_first_place_is_refused_in_a_line(program, name, status_of, capsys):
    assert status_of(program, first=name) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(line) < 1000

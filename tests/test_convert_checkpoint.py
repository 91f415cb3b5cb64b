"""vanilla-transformer convert: folders and files as the other libraries save them, translated before and after."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from processes import run_command
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    FSMTConfig,
    FSMTForConditionalGeneration,
    FSMTTokenizer,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    T5Config,
)

from vanilla_transformer.conversion.checkpoints import pack_tokenizer, word_tokenizer
from vanilla_transformer.conversion.torch_transformer import from_torch_transformer
from vanilla_transformer.tokenization_vanilla_transformer import SPECIAL_TOKENS
from vanilla_transformer.training.errors import UserError
from vanilla_transformer_commands import convert as command
from vanilla_transformer_commands import translate


ROOT = Path(__file__).parents[1]
ENGLISH = ["The cat sat on a mat.", "A dog ran to the house.", "The dog sat on the cat!", "A cat ran on and on."]
GERMAN = ["Die Katze saß auf der Matte.", "Ein Hund lief zum Haus.", "Der Hund saß auf der Katze!", "Sie lief weiter."]
SENTENCES = ["The house ran.", "A zebra sat on the mat!", "on"]
SIZES = {
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 40,
    "max_length": 16,
}


class Hostile:
    """Unpickling it, with code allowed, creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def convert(*arguments):
    command.main([str(argument) for argument in arguments])


def refused(*arguments) -> str:
    """The error message, one line, that ends the program."""
    with pytest.raises(UserError) as caught:
        convert(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lively(model):
    """Gives parameters values that reveal mistakes; the tables of sinusoids stay."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def opus(tmp_path_factory):
    """A folder like OPUS-MT's: two sentencepiece models, one vocabulary with pad last; pad starts the decoder."""
    folder = tmp_path_factory.mktemp("opus")
    pieces = {}
    for side, texts in (("source", ENGLISH), ("target", GERMAN)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=str(folder / side),
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        shutil.move(folder / f"{side}.model", folder / f"{side}.spm")
        lines = (folder / f"{side}.vocab").read_text(encoding="utf-8").splitlines()
        pieces |= dict.fromkeys(line.split("\t")[0] for line in lines[3:])
    tokens = ["</s>", "<unk>", *pieces, "<pad>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    tokenizer = MarianTokenizer(*(str(folder / name) for name in ("source.spm", "target.spm", "vocab.json")))
    torch.manual_seed(0)
    pad = vocabulary["<pad>"]
    config = MarianConfig(
        vocab_size=len(tokens),
        **SIZES,
        activation_function="swish",
        scale_embedding=True,
        pad_token_id=pad,
        decoder_start_token_id=pad,
        eos_token_id=0,
        forced_eos_token_id=0,
    )
    model = lively(MarianMTModel(config))
    with torch.no_grad():
        model.final_logits_bias.normal_()
        model.final_logits_bias[0, 0] += 2
    model.generation_config.bad_words_ids = [[pad]]
    model.generation_config.num_beams = 3
    model.generation_config.max_length = 20
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def wmt(tmp_path_factory):
    """A folder like fairseq's WMT19 models: two vocabularies, one list of merges."""
    folder = tmp_path_factory.mktemp("wmt")
    for side, texts in (("src", ENGLISH), ("tgt", GERMAN)):
        letters = sorted({letter for text in texts for letter in text if letter != " "})
        tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>"]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        (folder / f"vocab-{side}.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("t h 2\nth e</w> 1\n", encoding="utf-8")
    tokenizer = FSMTTokenizer(
        langs=["en", "de"],
        src_vocab_file=str(folder / "vocab-src.json"),
        tgt_vocab_file=str(folder / "vocab-tgt.json"),
        merges_file=str(folder / "merges.txt"),
    )
    torch.manual_seed(1)
    config = FSMTConfig(
        src_vocab_size=tokenizer.src_vocab_size, tgt_vocab_size=tokenizer.tgt_vocab_size, langs=["en", "de"], **SIZES
    )
    model = lively(FSMTForConditionalGeneration(config))
    # A padding token in a target is masked there, and a token like others here.
    model.generation_config.suppress_tokens = [config.pad_token_id]
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("kind", ["marian", "fsmt"])
def test_a_folder_of_transformers_translates_as_before(kind, request, tmp_path, capsys):
    source, output = request.getfixturevalue({"marian": "opus", "fsmt": "wmt"}[kind]), tmp_path / "converted"
    convert(source, "--format", kind, "--output", output)
    assert f"saved in {output}" in capsys.readouterr().out

    loaded = {"theirs": source, "ours": output}
    tokenizers = {name: AutoTokenizer.from_pretrained(folder) for name, folder in loaded.items()}
    models = {name: AutoModelForSeq2SeqLM.from_pretrained(folder).eval() for name, folder in loaded.items()}
    assert type(models["ours"]).__name__ == "VanillaTransformerForConditionalGeneration"
    batch = tokenizers["theirs"](SENTENCES, return_tensors="pt", padding=True)
    again = tokenizers["ours"](SENTENCES, return_tensors="pt", padding=True)
    assert again.input_ids.tolist() == batch.input_ids.tolist()
    texts = {}
    for name, model in models.items():
        for beams in (1, model.generation_config.num_beams):
            outputs = model.generate(**batch, num_beams=beams)
            assert (outputs[:, 1:] != 2).any()
            texts[name, beams] = outputs.tolist(), tokenizers[name].batch_decode(outputs, skip_special_tokens=True)
    assert [texts[key] for key in texts if key[0] == "ours"] == [texts[key] for key in texts if key[0] == "theirs"]

    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    translate.main([str(output), "--input", str(text), "--output", str(tmp_path / "translated.txt")])
    beams = models["ours"].generation_config.num_beams
    # Line by line: a batch of other lengths rounds otherwise.
    assert (tmp_path / "translated.txt").read_text(encoding="utf-8").splitlines() == texts["ours", beams][1]


def test_marians_padding_is_forbidden_where_the_folder_does_not_say_so(opus, tmp_path):
    folder = shutil.copytree(opus, tmp_path / "opus")
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    del settings["bad_words_ids"]
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    convert(folder, "--format", "marian", "--output", tmp_path / "converted")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "converted")
    assert model.generation_config.bad_words_ids == [[model.config.pad_token_id]]


def state_dict(**options):
    """A state dict around a torch.nn.Transformer, and the folder of a tokenizer that fits it."""
    torch.manual_seed(0)
    module = nn.Module()
    module.net = nn.Transformer(16, 4, 2, 2, dim_feedforward=24, **options)
    module.src, module.tgt, module.out = nn.Embedding(40, 16), nn.Embedding(32, 16), nn.Linear(16, 32)
    module.register_buffer("pe", torch.randn(20, 1, 16))
    return lively(module).state_dict()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The folder of a tokenizer of 32 words."""
    tokens = [*SPECIAL_TOKENS.values(), *(f"w{number}" for number in range(len(SPECIAL_TOKENS), 32))]
    folder = tmp_path_factory.mktemp("tokenizer")
    pack_tokenizer(word_tokenizer(tokens, "<unk>"), SPECIAL_TOKENS, append_eos=True).save_pretrained(folder)
    return folder


NAMES = ["--prefix", "net.", "--source_embedding", "src.weight", "--target_embedding", "tgt.weight"]
NAMES += ["--output_projection", "out.weight", "--positions", "pe", "--heads", "4"]


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_what_the_command_line_says_of_a_state_dict_counts(ending, tokenizer, tmp_path):
    state, path = state_dict(norm_first=True, layer_norm_eps=1e-3), tmp_path / f"model.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    said = [*NAMES, "--norm_first", "--unscaled", "--activation", "gelu", "--layer_norm_eps", "1e-3"]
    convert(path, "--format", "torch", "--output", tmp_path / "new", "--tokenizer", tokenizer, *said)
    expected = from_torch_transformer(
        state,
        AutoTokenizer.from_pretrained(tokenizer),
        heads=4,
        prefix="net.",
        source_embedding="src.weight",
        target_embedding="tgt.weight",
        output="out.weight",
        positions="pe",
        normalize_before=True,
        activation_function="gelu",
        scale_embedding=False,
        layer_norm_eps=1e-3,
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new")
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        assert torch.equal(*(each(ids, decoder_input_ids=ids).logits for each in (model, expected)))
    assert AutoTokenizer.from_pretrained(tmp_path / "new")("w7 w9")["input_ids"] == [7, 9, 2]


def test_a_pickle_that_carries_code_is_refused_and_nothing_is_run(opus, wmt, tokenizer, tmp_path):
    made = tmp_path / "made"
    torch.save({**state_dict(), "more": Hostile(made)}, tmp_path / "model.pt")
    folders = {"marian": shutil.copytree(opus, tmp_path / "opus"), "fsmt": shutil.copytree(wmt, tmp_path / "wmt")}
    for folder in folders.values():
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save({**state, "more": Hostile(made)}, folder / "pytorch_model.bin")
    said = [*NAMES, "--tokenizer", tokenizer]
    with (tmp_path / "bare.pt").open("wb") as file:
        pickle.dump(Hostile(made), file)
    for name in ("model.pt", "bare.pt"):
        assert "It was refused, and no code was run" in refused(
            tmp_path / name, "--format", "torch", "--output", tmp_path / "new", *said
        )
    for kind, folder in folders.items():
        assert "weights_only" in refused(folder, "--format", kind, "--output", tmp_path / "new").lower().replace(
            " ", "_"
        )
    assert not made.exists()
    assert not (tmp_path / "new").exists()
    # With code allowed, it would have been run.
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert made.exists()


def lying_header(folder):
    """The header has a tensor that extends past the end of the file."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    next(value for name, value in header.items() if name != "__metadata__")["data_offsets"][1] += 2**40
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])


def change_weights(change):
    def apply(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


FC1 = "model.encoder.layers.0.fc1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lying_header, "cannot convert"),
        (change_weights(lambda state: state.pop(FC1)), f"{FC1} is missing"),
        (change_weights(lambda state: state.update(more=torch.zeros(2))), "more is unexpected"),
        (
            change_weights(lambda state: state.update({FC1: torch.zeros(5, 16)})),
            "is [5, 16], but [24, 16] is expected",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, opus, tmp_path):
    folder = shutil.copytree(opus, tmp_path / "opus")
    change(folder)
    assert message in refused(folder, "--format", "marian", "--output", tmp_path / "new")
    assert list(tmp_path.iterdir()) == [folder]


FORMATS = ("marian", "fsmt", "joeynmt", "eole", "torch")


@pytest.mark.parametrize("kind", FORMATS)
def test_what_the_folder_is_is_said_before_a_library_reads_it(kind, tiny_model, opus, wmt, tmp_path):
    """Otherwise the error would be the library's, about settings of another form."""
    output = ["--format", kind, "--output", tmp_path / "new"]
    tiny_model().save_pretrained(tmp_path / "ours")
    assert "ours/config.json describes a model of this package: there is nothing to convert" in refused(
        tmp_path / "ours", *output
    )
    T5Config(vocab_size=9).save_pretrained(tmp_path / "t5")
    assert "t5/config.json has model_type='t5': of transformers' models, 'marian' and 'fsmt' can be" in refused(
        tmp_path / "t5", *output
    )
    for other, folder in (("marian", opus), ("fsmt", wmt)):
        if other != kind:
            assert f"config.json has model_type={other!r}: give --format {other}" in refused(folder, *output)
    for text, message in (("[1]", "contains [1], which is not an object"), ("x", "is not valid JSON")):
        (tmp_path / "ours" / "config.json").write_text(text)
        assert f"ours/config.json {message}" in refused(tmp_path / "ours", *output)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_and_a_folder_are_not_taken_for_each_other(kind, tmp_path):
    output = ["--format", kind, "--output", tmp_path / "new"]
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "folder").mkdir()
    message = {
        "marian": "is missing or empty: a folder of --format marian has config.json, vocab",
        "fsmt": "is missing or empty: a folder of --format fsmt has config.json, vocab-src.json",
        "joeynmt": "has no best.ckpt",
        "eole": "No such file",
        "torch": "is a folder: --format torch reads one file, a state dict",
    }[kind]
    assert message in refused(tmp_path / "folder", *output)
    if kind in ("marian", "fsmt", "eole"):
        assert f"is a file: --format {kind} reads a folder" in refused(tmp_path / "file", *output)


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"null", b"\xff", None], ids=str)
@pytest.mark.parametrize("kind", ["marian", "fsmt"])
def test_a_damaged_or_missing_file_is_named(kind, damage, request, tmp_path):
    source = request.getfixturevalue({"marian": "opus", "fsmt": "wmt"}[kind])
    # What transformers can do without, and texts, in which every byte means something.
    spared = (
        {"generation_config.json", "tokenizer_config.json", "merges.txt"} if damage in (None, b"{}") else {"merges.txt"}
    )
    for path in sorted(source.iterdir()):
        if path.name not in spared:
            folder = shutil.copytree(source, tmp_path / "damaged")
            (folder / path.name).unlink() if damage is None else (folder / path.name).write_bytes(damage)
            message = refused(folder, "--format", kind, "--output", tmp_path / "new")
            assert path.name in message
            assert not [word for word in ("NoneType", "attribute", "odd") if word in message]
            shutil.rmtree(folder)


def test_mistakes_on_the_command_line_end_with_one_line(opus, tokenizer, tmp_path):
    output = ["--output", tmp_path / "new"]
    assert "has model_type='marian': give --format marian" in refused(opus, "--format", "fsmt", *output)
    assert "no such file or folder" in refused(tmp_path / "none", "--format", "eole", *output)
    assert "exists: choose another" in refused(opus, "--format", "marian", "--output", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "has no best.ckpt" in refused(tmp_path / "empty", "--format", "joeynmt", *output)
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "No such file" in refused(tmp_path / "empty", "--format", "eole", *output)
    (tmp_path / "model.pt").write_bytes(b"no weights")
    assert "or is not a checkpoint" in refused(
        tmp_path / "model.pt", "--format", "torch", *output, *NAMES, "--tokenizer", tokenizer
    )
    assert "--format torch needs --heads" in refused(
        tmp_path / "model.pt", "--format", "torch", *output, "--tokenizer", tokenizer
    )


def test_help_lists_every_format_and_the_program_ends_with_one_line(tmp_path):
    shown = run_command("convert", "--help", check=True)
    for word in ("marian", "fsmt", "joeynmt", "eole", "torch", "--source_embedding", "--norm_first"):
        assert word in shown.stdout
    done = run_command("convert", tmp_path / "none", "--format", "eole", "--output", tmp_path / "new")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        f"error: {tmp_path / 'none'}: no such file or folder",
    )

"""conversion/joeynmt.py: compares models that JoeyNMT has trained and saved with JoeyNMT's own output."""

import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
import yaml
from transformers import AutoTokenizer

from vanilla_transformer.conversion.checkpoints import TARGET_ONLY
from vanilla_transformer.conversion.joeynmt import from_joeynmt
from vanilla_transformer_commands import convert, translate


PAIRS = [
    ("The cat sat on a mat .", "Die Katze saß auf einer Matte ."),
    ("A dog ran to the house .", "Ein Hund lief zum Haus ."),
    ("The dog sat on the cat !", "Der Hund saß auf der Katze !"),
    ("A cat ran on , and on .", "Eine Katze lief weiter und weiter ."),
    ("Is the house on the mat ?", "Ist das Haus auf der Matte ?"),
]
TEST = ["The house ran .", "A zebra sat on the mat !", "And “the” cat’s mat ﬁts ?", "the cat : a dog", "on"]
STACK = {"hidden_size": 16, "layer_norm": "post"}
ENCODER = {"type": "transformer", "num_layers": 3, "num_heads": 4, "ff_size": 24, **STACK}
DECODER = {"type": "transformer", "num_layers": 2, "num_heads": 2, "ff_size": 32, **STACK}
PRE = {"layer_norm": "pre"}
TIED = {"tied_embeddings": True, "tied_softmax": True}


def settings(model=(), both=(), scale=True, data=(), src=(), trg=(), testing=()):
    """A configuration of JoeyNMT, with some parts changed."""
    embeddings = {"embeddings": {"embedding_dim": 16, "scale": scale}}
    return {
        "name": "tiny",
        "use_cuda": False,
        "data": {
            "dataset_type": "plain",
            "src": {"lang": "en", "level": "word", **dict(data), **dict(src)},
            "trg": {"lang": "de", "level": "word", **dict(data), **dict(trg)},
        },
        "testing": {"batch_size": 8, "beam_size": 1, "max_output_length": 12, **dict(testing)},
        "training": {
            "batch_size": 8,
            "epochs": 1,
            "learning_rate": 1e-4,
            "validation_freq": 1,
            "logging_freq": 1,
            "scheduling": "noam",
            "eval_metrics": [],
        },
        "model": {
            "encoder": {**ENCODER, **embeddings, **dict(both)},
            "decoder": {**DECODER, **embeddings, **dict(both)},
            **dict(model),
        },
    }


# FOLDER stands for the folder of the models and vocabularies.
SENTENCEPIECE = {"level": "bpe", "tokenizer_type": "sentencepiece"}
JOBS = {
    "words, pre-norm": settings(both=PRE),
    "normalised lower-case words, post-norm, gelu": settings(
        both={"activation": "gelu"}, scale=False, data={"normalize": True, "lowercase": True}
    ),
    "characters, tied output, no unknown": settings(
        model={"tied_softmax": True}, both=PRE, data={"level": "char"}, testing={"generate_unk": False}
    ),
    "sentencepiece, one vocabulary": settings(
        model=TIED,
        data={**SENTENCEPIECE, "tokenizer_cfg": {"model_file": "FOLDER/joint.model"}, "voc_file": "FOLDER/joint.txt"},
    ),
    "two sentencepiece models": settings(
        both=PRE,
        src={**SENTENCEPIECE, "tokenizer_cfg": {"model_file": "FOLDER/src.model"}},
        trg={**SENTENCEPIECE, "tokenizer_cfg": {"model_file": "FOLDER/trg.model"}},
    ),
    "bpe of sentencepiece": settings(
        model={"tied_embeddings": True},
        data={**SENTENCEPIECE, "tokenizer_cfg": {"model_file": "FOLDER/merges.model"}, "voc_file": "FOLDER/merges.txt"},
    ),
    "subword-nmt": settings(
        both=PRE, data={"level": "bpe", "tokenizer_type": "subword-nmt", "tokenizer_cfg": {"codes": "FOLDER/codes"}}
    ),
}


def train_sentencepiece(folder, name, texts, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / name),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    pieces = [line.split("\t")[0] for line in (folder / f"{name}.vocab").read_text(encoding="utf-8").splitlines()]
    (folder / f"{name}.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def folders(run_peer, tmp_path_factory):
    """For each job, the folder of the model, with JoeyNMT's own output beside it."""
    texts = tmp_path_factory.mktemp("texts")
    for side, lang in enumerate(("en", "de")):
        lines = [pair[side] for pair in PAIRS]
        train_sentencepiece(texts, ("src", "trg")[side], lines)
        for split, text in (("train", lines), ("dev", lines), ("test", TEST)):
            (texts / f"{split}.{lang}").write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    both = [line for pair in PAIRS for line in pair]
    train_sentencepiece(texts, "joint", both)
    train_sentencepiece(texts, "merges", both, model_type="bpe")
    (texts / "codes").write_text("#version: 0.2\nt h\nth e</w>\na t</w>\nu s\n", encoding="utf-8")
    jobs = {}
    for number, (name, job) in enumerate(JOBS.items()):
        folder = jobs[name] = texts / str(number)
        folder.mkdir()
        job = json.loads(json.dumps(job).replace("FOLDER", str(texts)))
        job["model_dir"] = str(folder / "model")
        job["data"] |= {split: str(texts / split) for split in ("train", "dev", "test")}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    run_peer("joeynmt", *(folder / "job.json" for folder in jobs.values()))
    return jobs


@pytest.mark.parametrize("name", JOBS)
def test_ids_logits_and_greedy_output_stay(name, folders, tmp_path):
    folder = folders[name]
    references = json.loads((folder / "references.json").read_text(encoding="utf-8"))
    model, tokenizer = from_joeynmt(folder / "model")
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    source, target = references["source_vocabulary"], references["target_vocabulary"]
    tokens = [token.removeprefix(TARGET_ONLY) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    assert tokens[: len(source)] == source
    assert sorted(tokens) == sorted({*source, *target})
    order = [tokens.index(token) for token in target]
    for line, row in zip(TEST, references["rows"], strict=True):
        # The tokenizer takes what subword-nmt has split.
        ids = tokenizer(" ".join(row["pieces"]) if name == "subword-nmt" else line)["input_ids"]
        # A token that only the target has is unknown in a source.
        assert [number if number < len(source) else source.index("<unk>") for number in ids] == row["ids"]

        prefix = torch.tensor([[order[number] for number in row["target"]]])
        with torch.no_grad():
            logits = model(torch.tensor([ids]), decoder_input_ids=prefix).logits[0]
        expected = torch.tensor(row["logits"])
        assert expected.std() > 0.5
        torch.testing.assert_close(logits[:, order], expected, atol=1e-4, rtol=0)
        others = sorted(set(range(len(tokens))) - set(order))
        assert logits.softmax(dim=-1)[:, others].sum() == 0

        output = model.generate(torch.tensor([ids]))[0]
        # JoeyNMT leaves out padding wherever it stands.
        found = [tokens[number] for number in output[1:] if tokens[number] != "<pad>"]
        assert found == row["tokens"]
        if "<unk>" not in found and found != ["</s>"]:
            assert tokenizer.decode(output, skip_special_tokens=True) == row["text"]


def test_the_commands_convert_and_translate(folders, tmp_path):
    source, output, text = (
        folders["sentencepiece, one vocabulary"] / "model",
        tmp_path / "converted",
        tmp_path / "text.txt",
    )
    text.write_text("\n".join(TEST) + "\n", encoding="utf-8")
    convert.main([str(source), "--format", "joeynmt", "--output", str(output)])
    options = ["--num_beams", "1", "--max_new_tokens", "12", "--output", str(tmp_path / "translated.txt")]
    translate.main([str(output), "--input", str(text), *options])
    rows = json.loads((source.parent / "references.json").read_text(encoding="utf-8"))["rows"]
    # What the searches find is compared above; here a special token within an output may show, or not.
    plain = [not {"<unk>", "<s>", "</s>", "<pad>", "<blank>"} & set(row["tokens"][:-1]) for row in rows]
    found = (tmp_path / "translated.txt").read_text(encoding="utf-8").splitlines()
    assert len(found) == len(TEST)
    assert [line for line, kept in zip(found, plain, strict=True) if kept] == [
        row["text"] for row, kept in zip(rows, plain, strict=True) if kept
    ]


def change_model(**changes):
    return lambda job: job["model"].update(changes)


def change_stack(stack, **changes):
    return lambda job: job["model"][stack].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_stack("encoder", type="recurrent"), "model.encoder.type is 'recurrent'"),
        (change_stack("decoder", alpha=1.2), "model.decoder.alpha=1.2 weights the residual"),
        (change_model(initializer="xavier_normal"), "xavier_normal weights the residual connections (DeepNet)"),
        (lambda job: job["model"]["encoder"].pop("layer_norm"), "model.encoder.layer_norm is absent"),
        (change_stack("decoder", layer_norm="post"), "layer_norm is 'pre' in the encoder and 'post' in the decoder"),
        (change_stack("decoder", activation="gelu"), "activation is 'relu' in the encoder and 'gelu'"),
        (lambda job: job["model"]["decoder"]["embeddings"].update(scale=False), "embeddings.scale differs"),
        (lambda job: job["data"]["src"].update(has_prompt=True), "data.src.has_prompt adds embeddings"),
        (lambda job: job["data"]["trg"].update(tokenizer_cfg={"pretokenizer": "moses"}), "tokenizers do not support"),
        (change_stack("encoder", num_layers=2), "holds encoder.layers.2.feed_forward.layer_norm.bias"),
        (change_stack("encoder", num_layers=4), "lacks the tensor encoder.layers.3.src_src_att.q_layer.weight"),
        (change_stack("decoder", ff_size=40), "feed_forward.pwff_layer.0.weight has shape [32, 16]"),
        (change_model(tied_softmax=True), "trg_embed.lut.weight and decoder.output_layer.weight differ"),
        (lambda job: job["data"].update(special_symbols={"bos_id": 7}), "bos_token '<s>' is not at bos_id=7"),
        (lambda job: job.pop("data"), "has no section data.src"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(change, message, folders, tmp_path):
    folder = shutil.copytree(folders["words, pre-norm"] / "model", tmp_path / "model", symlinks=True)
    path = folder / "config.yaml"
    job = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(job)
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        from_joeynmt(folder)


def test_a_vocabulary_of_another_size_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["words, pre-norm"] / "model", tmp_path / "model", symlinks=True)
    with (folder / "trg_vocab.txt").open("a", encoding="utf-8") as file:
        file.write("more\n")
    with pytest.raises(ValueError, match=r"the target vocabulary has \d+ tokens, but its table has \d+ rows"):
        from_joeynmt(folder)


def test_the_best_checkpoint_comes_before_the_last_and_a_file_may_be_named(folders, tmp_path):
    folder = shutil.copytree(folders["words, pre-norm"] / "model", tmp_path / "model")
    best = from_joeynmt(folder)[0].state_dict()
    (folder / "best.ckpt").unlink()
    (folder / "9.ckpt").write_bytes(b"older")
    shutil.copy(folder / "1.ckpt", folder / "10.ckpt")
    for source in (folder, folder / "1.ckpt"):
        found = from_joeynmt(source)[0].state_dict()
        assert all(torch.equal(best[name], value) for name, value in found.items())
    with pytest.raises(FileNotFoundError, match="has no best"):
        from_joeynmt(tmp_path)


class Hostile:
    """Unpickling it, with code allowed, creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_carries_code_is_refused_and_nothing_is_run(folders, tmp_path):
    folder = shutil.copytree(folders["words, pre-norm"] / "model", tmp_path / "model")
    state = torch.load(folder / "best.ckpt", weights_only=True)
    torch.save({**state, "stats_state": Hostile(tmp_path / "made")}, folder / "best.ckpt")
    with pytest.raises(ValueError, match="It was refused, and no code was run"):
        from_joeynmt(folder)
    assert not (tmp_path / "made").exists()

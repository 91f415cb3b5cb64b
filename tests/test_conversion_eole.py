"""conversion/eole.py: compares models that Eole has trained and saved with Eole's own output."""

import json
import re
import shutil

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from vanilla_transformer.conversion.checkpoints import TARGET_ONLY
from vanilla_transformer.conversion.eole import from_eole
from vanilla_transformer_commands import convert, translate


PAIRS = [
    ("The cat sat on a mat .", "Die Katze saß auf einer Matte ."),
    ("A dog ran to the house .", "Ein Hund lief zum Haus ."),
    ("The dog sat on the cat !", "Der Hund saß auf der Katze !"),
    ("A cat ran on , and on .", "Eine Katze lief weiter und weiter ."),
    ("Is the house on the mat ?", "Ist das Haus auf der Matte ?"),
]
TEST = ["The house ran .", "A zebra sat on the mat !", "And “the” cat’s mat ﬁts ?", "on"]
NEW_TOKENS = 12


def settings(model=(), embeddings=(), shared=False, vocabulary="words", transforms=(), options=()):
    """A configuration of Eole, with some parts changed. FOLDER stands for the folder of texts and vocabularies."""
    return {
        "data": {"corpus": {"path_src": "FOLDER/train.src", "path_tgt": "FOLDER/train.tgt"}},
        "src_vocab": f"FOLDER/{vocabulary}.{'joint' if shared else 'src'}.vocab",
        "tgt_vocab": f"FOLDER/{vocabulary}.{'joint' if shared else 'tgt'}.vocab",
        "share_vocab": shared,
        "overwrite": True,
        "transforms": list(transforms),
        "transforms_configs": dict(options),
        "model": {
            "architecture": "transformer",
            "hidden_size": 16,
            "encoder": {"layers": 3, "heads": 4, "transformer_ff": 24},
            "decoder": {"layers": 2, "heads": 2, "transformer_ff": 32},
            "embeddings": {"word_vec_size": 16, **dict(embeddings)},
            **dict(model),
        },
        "training": {
            "train_steps": 1,
            "save_checkpoint_steps": 1,
            "batch_size": 8,
            "batch_type": "sents",
            "bucket_size": 8,  # the corpus is read until that is full
            "world_size": 0,
            "gpu_ranks": [],
            "num_workers": 0,
            "optim": "adam",
            # of every parameter, between -0.5 and 0.5
            "param_init_method": "uniform",
            "param_init": 0.5,
        },
    }


SHARED = {"share_embeddings": True, "share_decoder_embeddings": True}
JOBS = {
    "words": settings(),
    "one table, all biases, sines before cosines, gelu": settings(
        model={
            **SHARED,
            "add_qkvbias": True,
            "add_final_linear_bias": True,
            "add_ffnbias": True,
            "mlp_activation_fn": "gelu",
        },
        embeddings={"position_encoding_type": "SinusoidalConcat"},
        shared=True,
    ),
    "learned positions, some biases, silu, another epsilon": settings(
        model={
            "add_qkvbias": True,
            "add_key_bias": False,
            "add_final_linear_bias": False,
            "generator_bias": False,
            "mlp_activation_fn": "silu",
            "norm_eps": 1e-3,
            "share_decoder_embeddings": True,
        },
        embeddings={"position_encoding_type": "Learned", "n_positions": 32, "position_shift": 2},
    ),
    "scaled learned positions": settings(
        embeddings={"position_encoding_type": "Learned", "n_positions": 32, "normalize": True}
    ),
    "sentencepiece": settings(
        model=SHARED,
        shared=True,
        vocabulary="pieces",
        transforms=["sentencepiece", "filtertoolong"],
        options={
            "sentencepiece": {"src_subword_model": "FOLDER/joint.model", "tgt_subword_model": "FOLDER/joint.model"}
        },
    ),
    "two sentencepiece models": settings(
        vocabulary="pieces",
        transforms=["sentencepiece"],
        options={"sentencepiece": {"src_subword_model": "FOLDER/src.model", "tgt_subword_model": "FOLDER/tgt.model"}},
    ),
    "subword-nmt": settings(
        vocabulary="subwords",
        transforms=["bpe"],
        options={"bpe": {"src_subword_model": "FOLDER/codes", "tgt_subword_model": "FOLDER/codes"}},
    ),
}
SUBWORDS = ["T@@", "h@@", "th@@", "the", "at", "us@@", "H@@", "a@@", "e", "e@@", "t", "s", "s@@", "o@@", "n", "d@@"]


def write_vocabulary(path, tokens):
    path.write_text("".join(f"{token}\t1\n" for token in dict.fromkeys(tokens)), encoding="utf-8")


@pytest.fixture(scope="module")
def folders(run_peer, tmp_path_factory):
    """For each job, the folder of the model, with Eole's own output beside it."""
    texts = tmp_path_factory.mktemp("texts")
    lines = {"src": [source for source, _ in PAIRS], "tgt": [target for _, target in PAIRS]}
    lines["joint"] = lines["src"] + lines["tgt"]
    for side, sentences in lines.items():
        (texts / f"train.{side}").write_text("".join(f"{line}\n" for line in sentences), encoding="utf-8")
        write_vocabulary(texts / f"words.{side}.vocab", " ".join(sentences).split())
        write_vocabulary(texts / f"subwords.{side}.vocab", [*SUBWORDS, f"only-{side}"])
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_prefix=str(texts / side),
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        pieces = (texts / f"{side}.vocab").read_text(encoding="utf-8").splitlines()
        write_vocabulary(texts / f"pieces.{side}.vocab", [piece.split("\t")[0] for piece in pieces[3:]])
    (texts / "codes").write_text("#version: 0.2\nt h\nth e</w>\na t</w>\nu s\n", encoding="utf-8")
    jobs = {}
    for number, (name, job) in enumerate(JOBS.items()):
        folder = jobs[name] = texts / str(number)
        folder.mkdir()
        config = json.loads(json.dumps(job).replace("FOLDER", str(texts)))
        config["training"]["model_path"] = str(folder / "model")
        job = {"config": config, "sentences": TEST, "new_tokens": NEW_TOKENS}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    run_peer("eole", *(folder / "job.json" for folder in jobs.values()))
    return jobs


@pytest.mark.parametrize("name", JOBS)
def test_ids_logits_and_greedy_output_stay(name, folders, tmp_path):
    folder = folders[name]
    references = json.loads((folder / "references.json").read_text(encoding="utf-8"))
    model, tokenizer = from_eole(folder / "model")
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
        assert expected.std() > 0.3
        torch.testing.assert_close(logits[:, order], expected, atol=1e-4, rtol=0)
        others = sorted(set(range(len(tokens))) - set(order))
        assert logits.softmax(dim=-1)[:, others].sum() == 0

        output = model.generate(torch.tensor([ids]), num_beams=1, max_new_tokens=NEW_TOKENS)[0]
        found = [tokens[number] for number in output[1:] if tokens[number] != "</s>"]
        assert found == row["tokens"]
        if not {"<unk>", "<s>", "<blank>"} & set(found):
            assert tokenizer.decode(output, skip_special_tokens=True) == row["text"]


def test_the_commands_convert_and_translate(folders, tmp_path):
    source, output, text = folders["sentencepiece"] / "model", tmp_path / "converted", tmp_path / "text.txt"
    text.write_text("\n".join(TEST) + "\n", encoding="utf-8")
    convert.main([str(source), "--format", "eole", "--output", str(output)])
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


def in_section(section, **changes):
    return lambda settings: settings["model"].setdefault(section, {}).update(changes)


REFUSED = {
    "rotary": (in_section("embeddings", position_encoding_type="Rotary"), "position_encoding_type='Rotary'"),
    "alibi": (in_section("embeddings", position_encoding_type="Alibi"), "position_encoding_type='Alibi'"),
    "relative": (in_section("embeddings", position_encoding_type="Relative"), "position_encoding_type='Relative'"),
    "no positions": (in_section("embeddings", position_encoding_type=None), "position_encoding_type=None"),
    "rms": (in_section("decoder", layer_norm="rms"), "model.decoder has layer_norm='rms'"),
    "gated": (in_section("encoder", mlp_activation_fn="gated-silu"), "mlp_activation_fn='gated-silu'"),
    "multiquery": (in_section("decoder", heads_kv=1), "model.decoder has heads_kv=1"),
    "post-norm encoder": (in_section("encoder", encoder_layer_style="postnorm"), "encoder_layer_style='postnorm'"),
    "window": (in_section("decoder", sliding_window=5), "sliding_window=5"),
    "experts": (in_section("decoder", num_experts=2), "num_experts=2"),
    "parallel": (in_section("decoder", parallel_residual=True), "parallel_residual=True"),
    "recurrent": (in_section("encoder", encoder_type="rnn"), "encoder_type='rnn'"),
    "two epsilons": (in_section("encoder", norm_eps=1e-6), "norm_eps is 1e-06 in the encoder and 1e-05"),
    "language model": (lambda settings: settings["model"].update(architecture="transformer_lm"), "architecture"),
    "onmt_tokenize": (lambda settings: settings.update(transforms=["onmt_tokenize"]), "transforms ['onmt_tokenize']"),
    "one layer less": (in_section("encoder", layers=2), "holds encoder.transformer_layers.2.input_layernorm.bias"),
    "one layer more": (in_section("encoder", layers=4), "lacks the tensor encoder.transformer_layers.3.self_attn"),
    "biases": (in_section("encoder", add_ffnbias=True), "lacks the tensor encoder.transformer_layers.0.mlp.gate_up"),
    "sizes": (in_section("decoder", transformer_ff=40), "mlp.gate_up_proj.weight has shape [32, 16]"),
    "shared tables": (
        lambda settings: settings["model"].update(share_embeddings=True),
        "src_emb.embeddings.weight and tgt_emb.embeddings.weight differ",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(change, message, folders, tmp_path):
    folder = shutil.copytree(folders["words"] / "model" / "step_1", tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        from_eole(folder)


def lying_header(path):
    """The header has a tensor that extends past the end of the file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["decoder.layer_norm.bias"]["data_offsets"][1] += 2**40
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])


def quantised(path):
    tensors = load_file(path)
    tensors["generator.weight"] = tensors["generator.weight"].to(torch.int8)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lying_header, "model.00.safetensors is damaged"),
        (quantised, "generator.weight has dtype torch.int8: quantised weights"),
        (lambda path: shutil.copy(path, path.with_name("model.01.safetensors")), "which another file also contains"),
    ],
)
def test_damaged_weights_are_refused(change, message, folders, tmp_path):
    folder = shutil.copytree(folders["words"] / "model" / "step_1", tmp_path / "model")
    change(folder / "model.00.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)):
        from_eole(folder)


def test_a_vocabulary_that_does_not_fit_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["words"] / "model" / "step_1", tmp_path / "model")
    path = folder / "vocab.json"
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    for change, message in (
        (lambda found: found["tgt"].pop(), r"the target vocabulary has \d+ tokens, but its table has \d+ rows"),
        (lambda found: found["src"].append(found["src"][5]), "2 times"),
        (lambda found: found["specials"].update(pad_token="<none>"), "src lacks the pad_token '<none>'"),
    ):
        changed = json.loads(json.dumps(vocabulary))
        change(changed)
        path.write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            from_eole(folder)

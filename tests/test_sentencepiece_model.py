"""A SentencePiece model as a tokenizer: the ids and the texts are those of the library sentencepiece."""

import pytest
import sentencepiece
from transformers import AutoTokenizer

from vanilla_transformer.training.errors import UserError
from vanilla_transformer.training.saved_model import load_tokenizer
from vanilla_transformer.training.train import main as train


SENTENCES = [
    "Two young, White males are outside near many bushes.",
    "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    "On 12 March 2024 we paid 1,234.50 for it.",
    "Am 12. März 2024 zahlten wir dafür 1.234,50.",
] * 20
TEXTS = [*SENTENCES[:4], "", "bushes", "  two  spaces ", "Māori ﬁsh 彼は", "x" * 50]
MODELS = {
    "unigram": {"model_type": "unigram", "vocab_size": 70},
    "bpe": {"model_type": "bpe", "vocab_size": 120},
    "with padding": {"model_type": "unigram", "vocab_size": 70, "pad_id": 3, "pad_piece": "<blank>"},
    "without specials": {"model_type": "bpe", "vocab_size": 120, "bos_id": -1, "eos_id": -1},
    "bytes": {"model_type": "unigram", "vocab_size": 320, "byte_fallback": True},
    "bytes, bpe": {"model_type": "bpe", "vocab_size": 380, "byte_fallback": True},
    "as it is": {
        "model_type": "bpe",
        "vocab_size": 120,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
    },
}


def learn(folder, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(folder / "joint"), minloglevel=2, **options
    )
    return folder / "joint.model"


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_ids_and_texts_are_those_of_sentencepiece(options, tmp_path):
    path = learn(tmp_path, **options)
    known = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(str(path))
    tokenizer.save_pretrained(tmp_path / "saved")
    for ours in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        for text in TEXTS:
            ids = ours(text, text_target=text)
            assert ids["input_ids"] == ids["labels"] == [*known.encode(text), ours.eos_token_id]
            assert ours.decode(ids["input_ids"], skip_special_tokens=True) == known.decode(
                [number for number in known.encode(text) if number != known.unk_id()]
            )
        inside = ours("</s> <unk> many<s>")["input_ids"][:-1]
        assert not set(inside) & {ours.pad_token_id, ours.bos_token_id, ours.eos_token_id}
        wanted = [known.pad_id(), known.bos_id(), known.eos_id()]
        found = [ours.pad_token_id, ours.bos_token_id, ours.eos_token_id]
        assert all(theirs in (-1, id_) for theirs, id_ in zip(wanted, found, strict=True))
        added = sorted(id_ for theirs, id_ in zip(wanted, found, strict=True) if theirs == -1)
        assert added == list(range(len(known), len(ours)))


def test_a_model_is_trained_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = learn(tmp_path, **MODELS["unigram"])
    for name, texts in (("en", SENTENCES[::2]), ("de", SENTENCES[1::2])):
        (tmp_path / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
    options = (
        "--train_file en de --tokenizer joint.model --max_steps 1 --eval_strategy no --load_best_model_at_end false "
        "--save_strategy no --d_model 16 --encoder_layers 1 --decoder_layers 1 --encoder_ffn_dim 16 "
        "--decoder_ffn_dim 16 --encoder_attention_heads 2 --decoder_attention_heads 2 --max_new_tokens 2 "
        "--max_train_samples 8 --report_to none --output_dir run"
    )
    train(options.split())
    known = sentencepiece.SentencePieceProcessor(model_file=str(path))
    saved = load_tokenizer("run")
    assert saved("bushes")["input_ids"] == [*known.encode("bushes"), known.eos_id()]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xff\xff", "is not a sentencepiece model"), (None, "has user-defined pieces such as '<2de>'")],
)
def test_what_cannot_be_read_is_named(content, message, tmp_path):
    path = learn(tmp_path, model_type="unigram", vocab_size=70, user_defined_symbols=["<2de>"])
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"tokenizer=\S+joint\.model cannot be loaded: .*{message}"):
        load_tokenizer(str(path))

"""Compares the packed network with the modules that it is made from."""

import logging

import pytest
import torch
from networks import NETWORKS

from vanilla_transformer import engine_packed
from vanilla_transformer.engine_packed import PackedTransformer, PositionTable
from vanilla_transformer.engine_products import COMPUTE_TYPES


pytestmark = pytest.mark.usefixtures("packed_engine", "small_matrices_in_int8_too")


CONFIGURATIONS = {
    **NETWORKS,
    "two vocabularies": {**NETWORKS["separate vocabularies"], "tie_word_embeddings": False},
}


# Largest error of a logit, as a share of the logits' standard deviation. These models showed 2e-6, 0.11 and 0.29.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.2, "int8": 0.5}


@pytest.fixture(scope="session")
def source(padded):
    return dict(zip(("input_ids", "attention_mask"), padded(side="left"), strict=True))


def logits_by_steps(engine: PackedTransformer, source: dict, targets: torch.Tensor, padding=None) -> torch.Tensor:
    """Logits `[B, T, V]` of one target for each sentence, read token by token; `padding` is true at the left."""
    memory = engine.encode(**source)
    state = engine.start(memory, source.get("attention_mask"), 1, False, padding is not None)
    logits = []
    for column in range(targets.shape[1]):
        position = state.position
        logits.append(engine.step(targets[:, column, None], state)[:, 0])
        if padding is not None:
            state.target.hide_last(padding[:, column])
            state.position = position + (~padding[:, column, None]).long()
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("fields", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
@pytest.mark.usefixtures("way")
@torch.inference_mode()
def test_logits_and_encodings_are_those_of_the_modules(tiny_model, source, padded, fields, compute_type):
    model = tiny_model(**fields)
    engine = PackedTransformer(model, compute_type)
    targets = padded((12,) * 4, vocab_size=53, seed=3)[0]
    expected = model(**source, decoder_input_ids=targets)
    error = (logits_by_steps(engine, source, targets) - expected.logits).abs().max() / expected.logits.std()
    assert error < TOLERANCE[compute_type]
    kept = source["attention_mask"].bool()
    wrong = (engine.encode(**source) - expected.encoder_last_hidden_state)[kept]
    assert wrong.abs().max() / expected.encoder_last_hidden_state.std() < TOLERANCE[compute_type]


@torch.inference_mode()
def test_target_positions_beyond_those_prepared_are_right(tiny_model, source, padded):
    model = tiny_model()
    targets = padded((150,) * 4, seed=3)[0]
    logits = logits_by_steps(PackedTransformer(model, "float32"), source, targets)
    expected = model(**source, decoder_input_ids=targets).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("last", [3, 200])
def test_a_table_that_another_thread_replaces_is_long_enough(tiny_model, monkeypatch, last):
    """Simulates another thread that replaces the table with a shorter one between two reads."""
    table = PositionTable(tiny_model().model.encoder)
    tables = iter([table.upto(100), *[table.upto(0)[:1]] * 9])
    monkeypatch.setattr(PositionTable, "table", property(lambda _: next(tables), lambda *_: None), raising=False)
    assert len(table.upto(last)) > last


def test_learned_positions_end_in_the_model_s_error(tiny_model, source):
    model = tiny_model(position_embedding_type="learned")
    model.lm_head.bias.data[2] = -1e4
    assert model.generate(**source, max_length=48).shape[1] == 48
    with pytest.raises(ValueError, match="position 48 has no learned embedding"):
        model.generate(**source, max_length=50)


@torch.inference_mode()
def test_padding_may_be_longer_than_learned_positions(tiny_model, padded):
    model = tiny_model(position_embedding_type="learned", max_position_embeddings=7)
    ids, mask = padded(side="left")
    wide, wide_mask = (torch.nn.functional.pad(each, (5, 0)) for each in (ids, mask))
    engine = PackedTransformer(model, "float32")
    torch.testing.assert_close(
        engine.encode(wide, wide_mask)[:, 5:][mask.bool()], engine.encode(ids, mask)[mask.bool()]
    )


@torch.inference_mode()
def test_products_of_a_type_without_instructions_are_told_once(tiny_model, monkeypatch, caplog):
    monkeypatch.setattr(engine_packed, "is_native", lambda compute_type, device: compute_type == "float32")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    engine_packed.logger.warning_once.cache_clear()
    for compute_type in (*COMPUTE_TYPES, *COMPUTE_TYPES):
        PackedTransformer(tiny_model(), compute_type)
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        "compute_type='bfloat16'",
        "compute_type='int8'",
    ]
    engine_packed.logger.warning_once.cache_clear()


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 4}], ids=["greedy", "beams"])
def test_a_sentence_is_decoded_alike_alone_and_in_a_batch(lively_model, padded, compute_type, options):
    model, (ids, mask) = lively_model(), padded((9, 4, 7, 2, 9, 5, 3, 8))
    options = {**options, "compute_type": compute_type, "compiled": False, "max_new_tokens": 20}
    together = model.generate(ids, attention_mask=mask, **options)
    for number, length in enumerate(mask.sum(dim=1).tolist()):
        alone = model.generate(ids[number, None, :length], **options)[0]
        assert torch.equal(together[number, : len(alone)], alone)
        assert torch.isin(together[number, len(alone) :], torch.tensor([0, 2])).all()  # padding


# In nats: how far a token that was found in this type may be behind the likeliest. Another one is 5 behind on average.
LOST_BY_ROUNDING = {None: 1e-4, "float32": 1e-4, "bfloat16": 0.2, "int8": 0.6}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("compute_type", LOST_BY_ROUNDING)
def test_what_is_found_in_every_type_is_likely_in_float32(lively_model, source, compute_type, seed):
    """Scores every token of greedy search, and whole outputs of beam search, with the model itself."""
    model = lively_model(seed=seed, d_model=128, encoder_ffn_dim=256, decoder_ffn_dim=192)

    def scored(beams: int, compute_type: str | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For tokens up to the end: their log-probabilities, and those of the likeliest tokens."""
        found = model.generate(**source, num_beams=beams, max_new_tokens=20, compute_type=compute_type)
        with torch.no_grad():
            scores = model(**source, decoder_input_ids=found[:, :-1]).logits.log_softmax(dim=-1)
        live = found[:, :-1].eq(model.config.eos_token_id).cumsum(dim=1) == 0
        assert live.sum() > 12
        return scores.gather(2, found[:, 1:, None])[..., 0] * live, scores.amax(dim=-1) * live, live.sum(dim=1)

    chosen, likeliest, _ = scored(1, compute_type)
    assert (likeliest - chosen).max() < LOST_BY_ROUNDING[compute_type]
    (exact, _, of_exact), (rounded, _, of_rounded) = scored(4, "float32"), scored(4, compute_type)
    assert (exact.sum(dim=1) / of_exact - rounded.sum(dim=1) / of_rounded).max() < LOST_BY_ROUNDING[compute_type]


def test_the_encoder_reads_a_source_once(lively_model, source, monkeypatch):
    model, calls = lively_model(), []
    encode = PackedTransformer.encode
    monkeypatch.setattr(PackedTransformer, "encode", lambda *args: calls.append(1) or encode(*args))
    model.generate(**source, max_new_tokens=3)
    assert len(calls) == 1
    assert model.last_engine.name == "packed"

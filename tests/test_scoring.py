"""Compares scores with a float64 softmax and beam search, alignments with attention, choices with brute force."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sacrebleu.metrics import CHRF
from torch.nn import functional as F

from vanilla_transformer import minimum_bayes_risk, to_pharaoh, train_tokenizer, word_alignment
from vanilla_transformer.scoring import sentence_chrf
from vanilla_transformer.training.publishing.pictures import draw_alignment


@pytest.fixture
def source(padded):
    input_ids, attention_mask = padded()
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture
def labels(padded):
    """Four targets of other lengths than their sources, each with its end of sentence, -100 as padding, `[B, T]`."""
    return ended((3, 9, 5, 1), padded)


def ended(lengths, padded, side="right") -> torch.Tensor:
    tokens, mask = padded(lengths, side, seed=1)
    last = mask.cumsum(1).masked_fill(mask == 0, -1).argmax(1)
    return tokens.scatter(1, last[:, None], 2).masked_fill(mask == 0, -100)


def state_of(model) -> tuple:
    return model.config._attn_implementation, [(name, module.training) for name, module in model.named_modules()]


class TestScore:
    @pytest.mark.parametrize(
        "fields",
        [{}, {"decoder_vocab_size": 67, "share_encoder_decoder_embeddings": False}, {"normalize_before": True}],
        ids=["paper", "two vocabularies", "pre-norm"],
    )
    def test_log_probabilities_are_those_of_a_float64_softmax(self, tiny_model, source, labels, fields):
        model = tiny_model(**fields).double()
        scores = model.score(**source, labels=labels)
        expected = model(**source, labels=labels).logits.log_softmax(-1)
        expected = expected.gather(2, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)
        torch.testing.assert_close(scores.token_log_probs, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(scores.sequence_log_probs, expected.sum(1), atol=1e-12, rtol=0)
        assert scores.tokens.tolist() == [3, 9, 5, 1]
        for row, perplexity in enumerate(scores.perplexity):
            logits = model(**source, labels=labels).logits[row]
            torch.testing.assert_close(perplexity, F.cross_entropy(logits, labels[row]).exp())

    def test_the_mean_is_the_evaluation_loss(self, tiny_model, source, labels):
        model = tiny_model(label_smoothing=0.3)
        scores = model.score(**source, labels=labels)
        expected = model(**source, labels=labels).loss
        torch.testing.assert_close(-scores.sequence_log_probs.sum() / scores.tokens.sum(), expected)

    @pytest.mark.parametrize("num_beams", [2, 4])
    def test_sums_are_the_scores_of_the_beam(self, tiny_model, source, num_beams):
        model = tiny_model()
        with torch.no_grad():
            model.lm_head.bias[2] += 4  # so that sentences end, some sooner than others
        beam = model.generate(
            **source,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_new_tokens=12,
            length_penalty=1.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        repeated = {name: value.repeat_interleave(num_beams, 0) for name, value in source.items()}
        scores = model.score(**repeated, labels=beam.sequences[:, 1:])
        assert scores.tokens.unique().numel() > 1
        expected = beam.sequences_scores * scores.tokens
        torch.testing.assert_close(scores.sequence_log_probs, expected, atol=1e-4, rtol=0)

    def test_more_rows_than_a_chunk_score_as_each_alone(self, tiny_model, padded):
        model = tiny_model()
        input_ids, attention_mask = padded((7,) * 40)
        labels = ended((8,) * 40, padded)  # 320 tokens
        together = model.score(input_ids, attention_mask, labels).token_log_probs
        alone = [model.score(*(x[row : row + 1] for x in (input_ids, attention_mask, labels))) for row in range(40)]
        torch.testing.assert_close(together, torch.cat([score.token_log_probs for score in alone]))

    @pytest.mark.parametrize("padding", [0, -100])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, tiny_model, padded, side, padding):
        model = tiny_model()
        input_ids, attention_mask = padded(side=side)
        labels = ended((3, 9, 5, 1), padded, side)
        scores = model.score(input_ids, attention_mask, labels.masked_fill(labels == -100, padding))
        unmasked = model.score(input_ids, labels=labels)
        torch.testing.assert_close(unmasked.token_log_probs, scores.token_log_probs)
        for row in range(4):
            words, target = input_ids[row][attention_mask[row].bool()], labels[row][labels[row] != -100]
            alone = model.score(words[None], labels=target[None])
            torch.testing.assert_close(scores.token_log_probs[row][labels[row] != -100], alone.token_log_probs[0])
            assert (scores.token_log_probs[row][labels[row] == -100] == 0).all()
            torch.testing.assert_close(scores.perplexity[row], alone.perplexity[0])

    def test_what_follows_the_end_of_the_sentence_does_not_count(self, tiny_model, source):
        model = tiny_model()
        scores = model.score(**source, labels=torch.tensor([[5, 7, 2, 2, 9]] * 4))
        expected = model.score(**source, labels=torch.tensor([[5, 7, 2]] * 4))
        assert scores.tokens.tolist() == [3] * 4
        torch.testing.assert_close(scores.sequence_log_probs, expected.sequence_log_probs)
        assert (model.align(**source, labels=torch.tensor([[5, 7, 2, 2, 9]] * 4)).weights[:, 3:] == 0).all()

    def test_a_padding_token_inside_a_translation_counts(self, tiny_model, source):
        labels = torch.tensor([[5, 0, 7, 2, 0]] * 4)
        scores = tiny_model().score(**source, labels=labels)
        assert scores.tokens.tolist() == [4] * 4
        assert (scores.token_log_probs[:, 1] < 0).all()

    def test_a_translation_that_was_cut_short_has_no_end_to_count(self, tiny_model, source):
        scores = tiny_model().score(
            **source, labels=torch.tensor([[5, 7, 0, 0], [5, 7, 9, -100], [5, 7, 9, 9], [5, 2, 2, 2]])
        )
        assert scores.tokens.tolist() == [2, 3, 4, 2]

    def test_half_precision_scores_in_float32(self, tiny_model, source, labels):
        scores = tiny_model().bfloat16().score(**source, labels=labels)
        assert scores.token_log_probs.dtype == torch.float32
        expected = tiny_model().score(**source, labels=labels)
        torch.testing.assert_close(scores.sequence_log_probs, expected.sequence_log_probs, atol=0.3, rtol=0.05)


class TestTheModelIsLeftAsItWas:
    @pytest.mark.parametrize("method", ["score", "align"])
    def test_dropout_is_off_and_comes_back(self, tiny_model, source, labels, method):
        model = tiny_model(dropout=0.5, attention_dropout=0.5)
        expected = getattr(model, method)(**source, labels=labels)
        model.train()
        model.model.encoder.eval()  # a part that someone has frozen
        before = state_of(model)
        assert before[0] == "sdpa"
        torch.testing.assert_close(getattr(model, method)(**source, labels=labels)[0], expected[0])
        assert state_of(model) == before
        assert not expected[0].requires_grad

    @pytest.mark.parametrize("method", ["score", "align"])
    def test_it_comes_back_after_an_error_too(self, tiny_model, source, labels, method, monkeypatch):
        model = tiny_model().train()
        before = state_of(model)
        monkeypatch.setattr(model.model.decoder, "embed", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            getattr(model, method)(**source, labels=labels)
        assert state_of(model) == before


MISTAKES = {
    "labels is missing": {"labels": None},
    r"input_ids has shape \[4\] and labels \[4, 9\]": {"input_ids": torch.ones(4, dtype=torch.long)},
    r"input_ids has shape \[4, 7\] and labels \[3, 9\]": {"labels": torch.full((3, 9), 2)},
    r"attention_mask has shape \[4, 9\], input_ids \[4, 7\]": {"attention_mask": torch.ones(4, 9)},
    "input_ids holds id 61, .* 0 to 60": {"input_ids": torch.full((4, 7), 61)},
    "labels holds id -1, .* 0 to 60": {"labels": torch.full((4, 9), -1)},
    "labels: row 2 has no token": {"labels": torch.tensor([[5, 2], [5, 2], [0, -100], [5, 2]])},
    "labels begin with decoder_start_token_id=1": {"labels": torch.tensor([[1, 5, 2]] * 4)},
}


@pytest.mark.parametrize("method", ["score", "align"])
@pytest.mark.parametrize(("message", "wrong"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_named(tiny_model, source, labels, method, message, wrong):
    with pytest.raises(ValueError, match=message):
        getattr(tiny_model(), method)(**{**source, "labels": labels, **wrong})


class TestAlign:
    @pytest.mark.parametrize(("layers", "layer", "read"), [(4, None, 2), (1, None, 0), (4, 0, 0), (4, -1, 3)])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_weights_are_the_mean_over_the_heads_of_one_layer(
        self, tiny_model, source, labels, attention, layers, layer, read
    ):
        alignment = tiny_model(attention=attention, decoder_layers=layers).align(**source, labels=labels, layer=layer)
        eager = tiny_model(attention="eager", decoder_layers=layers)
        heads = eager(**source, labels=labels, output_attentions=True).cross_attentions[read]
        expected = (heads[:, 0] + heads[:, 1]) / 2
        counted = labels != -100
        torch.testing.assert_close(alignment.weights[counted], expected[counted])
        torch.testing.assert_close(alignment.weights.sum(-1), counted.float())

    def test_pairs_take_the_largest_weight_of_the_words(self, tiny_model, padded):
        input_ids, attention_mask = padded((8, 5, 2, 7))
        input_ids[torch.arange(4), torch.tensor([7, 4, 1, 6])] = 2  # the end of each source
        labels = ended((4, 10, 6, 1), padded)
        model = tiny_model()
        alignment = model.align(input_ids, attention_mask, labels)
        ends = 0
        for row, (words, wanted) in enumerate(zip((7, 4, 1, 6), (3, 9, 5, 0), strict=True)):
            weights = alignment.weights[row].numpy()
            ends += sum(weights[target].argmax() == words for target in range(wanted))
            expected = [(int(np.argmax(weights[target, :words])), target) for target in range(wanted)]
            assert alignment.pairs[row] == expected
        assert ends  # some tokens look most at the end of the source, which is no word

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_moves_the_columns_only(self, tiny_model, padded, side):
        model = tiny_model()
        input_ids, attention_mask = padded(side=side)
        labels = ended((3, 9, 5, 2), padded, side)
        together = model.align(input_ids, attention_mask, labels)
        for row in range(4):
            source, target = attention_mask[row].bool(), labels[row] != -100
            alone = model.align(input_ids[row][source][None], labels=labels[row][target][None])
            torch.testing.assert_close(together.weights[row][target][:, source], alone.weights[0])
            assert together.weights[row].sum() == pytest.approx(target.sum().item())
            columns, rows = source.nonzero()[:, 0].tolist(), target.nonzero()[:, 0].tolist()
            assert together.pairs[row] == [(columns[i], rows[j]) for i, j in alone.pairs[0]]

    def test_a_layer_that_attends_to_one_place_aligns_to_it(self, tiny_model, padded):
        """Keys and queries are made such that every target token must look at the source token 9, wherever it is."""
        model = tiny_model()
        attention = model.model.decoder.layers[0].encoder_attn
        encoder = model.get_encoder()
        input_ids = torch.tensor([[5, 9, 33, 14, 2], [9, 21, 5, 2, 0], [40, 30, 20, 9, 2]])
        with torch.no_grad():
            # The encoder is only its embeddings, of unit length in one direction where the token is 9.
            encoder.embed_tokens.weight.zero_()
            encoder.embed_tokens.weight[9, 3] = 100.0
            encoder.layers = torch.nn.ModuleList()
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight.zero_()
                projection.bias.zero_()
            attention.k_proj.weight[:, 3] = 1.0
            attention.q_proj.bias.fill_(1.0)
        alignment = model.align(input_ids, labels=torch.tensor([[7, 8, 2]] * 3))
        assert alignment.pairs == [[(1, 0), (1, 1)], [(0, 0), (0, 1)], [(3, 0), (3, 1)]]
        assert (alignment.weights.max(-1).values > 0.99).all()

    def test_threads_that_score_meanwhile_do_so_as_alone(self, tiny_model, source, labels):
        """Only the alignment needs the attention that keeps its weights, which masks otherwise."""
        model = tiny_model(attention="sdpa")
        aligned, scored = model.align(**source, labels=labels), model.score(**source, labels=labels)
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)

        def call(number: int) -> bool:
            if number % 2:
                return torch.equal(model.align(**source, labels=labels).weights, aligned.weights)
            found = model.score(**source, labels=labels).sequence_log_probs
            return torch.equal(found, scored.sequence_log_probs)

        try:
            with ThreadPoolExecutor(8) as pool:
                assert all(pool.map(call, range(200)))
        finally:
            sys.setswitchinterval(before)
        assert model.config._attn_implementation == "sdpa"

    def test_a_layer_that_is_not_there_is_named(self, tiny_model, source, labels):
        with pytest.raises(ValueError, match="layer=2: the decoder has 2 layers"):
            tiny_model().align(**source, labels=labels, layer=2)

    def test_a_source_without_words_has_no_pairs(self, tiny_model):
        alignment = tiny_model().align(torch.tensor([[2, 0], [5, 2]]), labels=torch.tensor([[7, 2], [7, 2]]))
        assert alignment.pairs == [[], [(0, 0)]]


class TestWords:
    def test_words_are_aligned_if_any_of_their_subwords_are(self):
        pairs = [(0, 0), (1, 1), (0, 2), (4, 2), (3, 3), (1, 3)]
        assert word_alignment(pairs, [0, 0, 1, 1, None], [0, 1, 1, 2]) == [(0, 0), (0, 1), (0, 2), (1, 2)]
        assert to_pharaoh(word_alignment(pairs, [0, 0, 1, 1, None], [0, 1, 1, 2])) == "0-0 0-1 0-2 1-2"
        assert to_pharaoh(word_alignment([], [], [])) == ""

    @pytest.mark.parametrize("side", ["source", "target"])
    def test_word_numbers_of_another_sentence_are_refused(self, side):
        words = {"source_words": [0, 1, 2], "target_words": [0, 1, 2], f"{side}_words": [0, 1]}
        with pytest.raises(ValueError, match=f"{side} subword 2, but {side}_words has 2 entries"):
            word_alignment([(2, 2)], **words)

    def test_words_of_our_tokenizer_are_those_of_white_space(self, tiny_model):
        tokenizer = train_tokenizer(["He's gone for 12 days."], 280)
        texts = [["He's gone for 12 days.", "gone"], ["days, 2 gone", "He's 12"]]
        source, target = (
            tokenizer([text.split() for text in side], is_split_into_words=True, padding=True, return_tensors="pt")
            for side in texts
        )
        assert source.input_ids[0].tolist() == tokenizer(texts[0][0]).input_ids
        model = tiny_model(vocab_size=len(tokenizer))
        alignment = model.align(source.input_ids, source.attention_mask, target.input_ids)
        for row, (left, right) in enumerate(zip(*texts, strict=True)):
            pairs = word_alignment(alignment.pairs[row], source.word_ids(row), target.word_ids(row))
            assert {j for _, j in pairs} == set(range(len(right.split())))  # each word of the target has a partner
            assert {i for i, _ in pairs} <= set(range(len(left.split())))


def test_the_picture_is_darkest_where_the_weight_is(tmp_path):
    weights = torch.full((3, 4), 0.05)
    weights[2, 1] = 0.95
    draw_alignment(weights, ["$5", "US$", "</s>", "x_1^2"], ["a", "b", "c"], tmp_path / "a.png")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    picture = imread(tmp_path / "a.png")
    assert picture.min() < 0.1
    with pytest.raises(ValueError, match=r"\[3, 4\], but there are 4 target and 3 source"):
        draw_alignment(weights, ["a", "b", "c"], ["$5", "US$", "</s>", "x_1^2"], tmp_path / "a.png")


def brute_force(candidates: list[str], utility) -> list[float]:
    """The mean utility of each candidate against each of the others."""
    places = range(len(candidates))
    return [np.mean([utility(candidates[i], candidates[j]) for j in places if j != i]) for i in places]


class TestMinimumBayesRisk:
    # Drawn texts of a few words repeat themselves and tie.
    DRAWS = [
        [" ".join(word) for word in itertools.islice(itertools.cycle(words), 9)]
        for words in (
            itertools.product(["the house", "a house"], ["is small", "is little", "was small"]),
            [["eins zwei"], ["eins zwei drei"], ["eins"], ["zwei"]],
            [["ein Haus"], ["mein Haus"], ["dein Haus"], ["ein Haus"], [""]],
        )
    ]

    @pytest.mark.parametrize("candidates", DRAWS)
    def test_the_choice_is_that_of_all_pairs(self, candidates):
        metric = CHRF()
        means = brute_force(
            candidates, lambda hypothesis, reference: metric.sentence_score(hypothesis, [reference]).score
        )
        chosen = minimum_bayes_risk(candidates)
        assert means[chosen] == pytest.approx(max(means), abs=1e-9)
        assert chosen == next(i for i, mean in enumerate(means) if mean > max(means) - 1e-9)

    def test_a_utility_has_sides(self):
        """Whether the hypothesis holds the reference prefers the longest text; the other way round, the shortest."""
        candidates = ["b", "a b", "a b c", "b c"]
        assert minimum_bayes_risk(candidates, lambda hypothesis, reference: float(reference in hypothesis)) == 2
        assert minimum_bayes_risk(candidates, lambda hypothesis, reference: float(hypothesis in reference)) == 0

    def test_equal_texts_weigh_as_often_as_they_come_and_are_compared_once(self):
        calls = []

        def utility(hypothesis: str, reference: str) -> float:
            calls.append((hypothesis, reference))
            return -abs(len(hypothesis) - len(reference))

        candidates = ["aaaaaa", "a", "aa", "a", "aaaaaa", "aaaaaa"]
        assert minimum_bayes_risk(candidates, utility) == int(np.argmax(brute_force(candidates, utility)))
        calls.clear()
        minimum_bayes_risk(candidates, utility)
        assert len(calls) == len(set(calls)) <= 9

    def test_a_text_is_no_reference_for_itself(self):
        assert (
            minimum_bayes_risk(["a", "bbb"], lambda hypothesis, reference: len(hypothesis) * (hypothesis == reference))
            == 0
        )
        assert minimum_bayes_risk(["aaaa", "b", "b"], lambda hypothesis, reference: hypothesis == reference) == 1

    def test_the_first_of_equals_is_chosen(self):
        assert minimum_bayes_risk(["x", "y", "z"], lambda *_: 0.1) == 0
        assert minimum_bayes_risk(["q", "ab", "cd", "ab", "cd"]) == 1
        assert minimum_bayes_risk(["alone"]) == 0

    def test_no_candidates_are_refused(self):
        with pytest.raises(ValueError, match="candidates is empty"):
            minimum_bayes_risk([])

    def test_a_missing_sacrebleu_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sacrebleu", None)
        with pytest.raises(ImportError, match="pip install sacrebleu"):
            sentence_chrf("a", "b")


class TestGenerateMinimumBayesRisk:
    @pytest.fixture
    def tokenizer(self):
        return train_tokenizer(["He's gone for 12 days."], 280)

    @pytest.fixture
    def model(self, tiny_model, tokenizer):
        return tiny_model(vocab_size=len(tokenizer))

    def test_the_sequences_are_the_best_of_those_that_generate_draws(self, model, tokenizer, source):
        options = {"temperature": 0.7, "max_new_tokens": 6}
        torch.manual_seed(1)
        chosen = model.generate_minimum_bayes_risk(tokenizer, **source, num_samples=5, **options)
        torch.manual_seed(1)
        drawn = model.generate(**source, do_sample=True, num_beams=1, num_return_sequences=5, top_k=0, **options).view(
            4, 5, -1
        )
        assert len(chosen) == 4
        for row, sequence in enumerate(chosen):
            texts = tokenizer.batch_decode(drawn[row], skip_special_tokens=True)
            assert len(set(texts)) > 1
            expected = drawn[row, int(np.argmax(brute_force(texts, sentence_chrf)))]
            assert sequence.tolist() == expected[: len(sequence)].tolist()
            assert (expected[len(sequence) :] == 0).all()
        assert (chosen[:, -1] != 0).any()

    def test_a_utility_of_ones_own_and_options_are_passed_on(self, model, tokenizer, source):
        chosen = model.generate_minimum_bayes_risk(
            tokenizer, **source, num_samples=4, utility=lambda *_: 1.0, top_k=1, max_new_tokens=6
        )
        greedy = model.generate(**source, num_beams=1, do_sample=False, max_new_tokens=6)
        assert chosen.tolist() == greedy[:, : chosen.shape[1]].tolist()

    def test_columns_that_only_other_samples_filled_are_cut_off(self, model, tokenizer, source):
        with torch.no_grad():
            model.lm_head.bias[2] += 4
        torch.manual_seed(0)
        longest = model.generate_minimum_bayes_risk(tokenizer, **source, utility=lambda h, _: len(h))
        torch.manual_seed(0)
        shortest = model.generate_minimum_bayes_risk(tokenizer, **source, utility=lambda h, _: -len(h))
        assert shortest.shape[1] < longest.shape[1]
        assert (shortest[:, -1] != 0).any()
        assert (longest[:, -1] != 0).any()

    def test_samples_are_of_the_whole_vocabulary(self, model, tokenizer):
        """A flat distribution draws more than the 50 likeliest tokens, which is transformers' default limit."""
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.bias.zero_()
        torch.manual_seed(0)
        sequences = model.generate_minimum_bayes_risk(
            tokenizer, torch.full((64, 2), 5), num_samples=1, max_new_tokens=5
        )
        assert sequences.unique().numel() > 100

    def test_no_samples_are_refused(self, model, tokenizer, source):
        with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
            model.generate_minimum_bayes_risk(tokenizer, **source, num_samples=0)

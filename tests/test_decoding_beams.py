"""Compares our searches with transformers', with a search over lists, with all possible outputs, and with formulas."""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from compilers import HAS_COMPILER, needs_compiler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from vanilla_transformer.decoding_beams import top_of_rows


pytestmark = pytest.mark.usefixtures("packed_engine")

LENGTHS = (7, 4, 1, 6, 3, 8, 2, 5, 6, 3, 7, 5)
CONFIGURATIONS = {
    "paper": {},
    "tied": {"tie_word_embeddings": True, "seed": 7},
    "pre-norm": {"normalize_before": True, "seed": 1},
    "learned positions": {"position_embedding_type": "learned", "seed": 2},
    "free d_k and d_v, gelu": {"d_kv": 6, "d_v": 10, "activation_function": "gelu", "seed": 3},
    "two vocabularies": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 53, "seed": 4},
}


@pytest.fixture(scope="session")
def models(lively_model):
    """The lively models by the names of their configurations, each created once."""
    made: dict = {}

    def get(name: str):
        if name not in made:
            made[name] = lively_model(**CONFIGURATIONS[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def source(padded) -> Callable[..., dict]:
    def build(lengths=LENGTHS, **options) -> dict:
        return dict(zip(("input_ids", "attention_mask"), padded(lengths, **options), strict=True))

    return build


def assert_same(ours, stock) -> None:
    """Identical tokens and beams, and scores to five digits."""
    assert ours.past_key_values is None  # it was our search
    assert torch.equal(ours.sequences, stock.sequences)
    if "beam_indices" in stock:
        assert torch.equal(ours.beam_indices, stock.beam_indices)
        assert ours.beam_indices.dtype == stock.beam_indices.dtype
    if stock.get("sequences_scores") is not None:
        torch.testing.assert_close(ours.sequences_scores, stock.sequences_scores, atol=1e-5, rtol=1e-6)
    for name in ("scores", "logits"):
        assert (ours.get(name) is None) == (stock.get(name) is None), name
        for one, other in zip(ours.get(name) or (), stock.get(name) or (), strict=True):
            assert one.shape == other.shape
            # Of two beams that differ in the last bit, machines put the one or the other first.
            one, other = one.nan_to_num(neginf=-1e30)[:, None], other.nan_to_num(neginf=-1e30)[None]
            alike = ((one - other).abs() <= 1e-4 + 1e-4 * other.abs()).all(dim=-1)  # [B * W, B * W]
            assert alike.any(dim=0).all(), name
            assert alike.any(dim=1).all(), name


def both(model, seed: int = 0, **arguments) -> tuple:
    """The results of our `generate` (also compiled) and of transformers' own, with the same random numbers."""
    arguments = {"max_new_tokens": 14, "return_dict_in_generate": True, "output_scores": True} | arguments
    torch.manual_seed(seed)
    stock = GenerationMixin.generate(model, **arguments)
    if HAS_COMPILER:
        torch.manual_seed(seed)
        # The program tells no scores of steps: with them it would not be used.
        compiled = model.generate(**{**arguments, "output_scores": False, "output_logits": False}, compiled=True)
        assert_same(compiled, type(stock)(**{**stock, "scores": None, "logits": None, "past_key_values": None}))
    torch.manual_seed(seed)
    return model.generate(**arguments), stock


class TakesNoMultiplesOfFive(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, ::5] = float("-inf")
        return scores


class StopsAtMultiplesOfSeven(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % 7 == 0) & (input_ids[:, -1] > 0)


def only_even_tokens(sentence: int, tokens: torch.Tensor) -> list[int]:
    assert tokens.dim() == 1
    return [2, *range(4 + 2 * (sentence % 3), 50, 2)]


OTHER_ENDS = [2, *range(20, 50)]
PROCESSORS = {"logits_processor": LogitsProcessorList([TakesNoMultiplesOfFive()])}
CRITERIA = {"stopping_criteria": StoppingCriteriaList([StopsAtMultiplesOfSeven()])}
BEAM_SEARCHES = {
    "two beams": {"num_beams": 2},
    "the default": {},
    "eight beams": {"num_beams": 8, "num_return_sequences": 8},
    "three of five beams": {"num_beams": 5, "num_return_sequences": 3},
    "early stopping": {"num_beams": 4, "early_stopping": True, "num_return_sequences": 4},
    "never stopping early": {"num_beams": 4, "early_stopping": "never", "num_return_sequences": 4},
    "short is good": {"num_beams": 4, "length_penalty": -1.0},
    "no length penalty": {"num_beams": 4, "length_penalty": 0.0, "early_stopping": "never"},
    "long is good": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never", "num_return_sequences": 3},
    "long is good, stopping early": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "minimum length": {"num_beams": 4, "min_length": 7},
    "minimum of new tokens": {"num_beams": 4, "min_new_tokens": 5, "num_return_sequences": 2},
    "both minima": {"num_beams": 4, "min_new_tokens": 5, "min_length": 8, "max_new_tokens": None, "max_length": 12},
    "no repeated pair": {"num_beams": 4, "no_repeat_ngram_size": 2},
    "bad words": {"num_beams": 4, "bad_words_ids": [[20], [30, 31], [7], [11], [2]]},
    "repetition penalty": {"num_beams": 4, "repetition_penalty": 1.7},
    "repetition penalty of the source": {"num_beams": 4, "encoder_no_repeat_ngram_size": 2},
    "suppressed tokens": {"num_beams": 4, "suppress_tokens": list(range(3, 30)), "begin_suppress_tokens": [2, 33]},
    "forced first and last token": {"num_beams": 4, "forced_bos_token_id": 9, "forced_eos_token_id": 2},
    "growing will to end": {"num_beams": 4, "exponential_decay_length_penalty": (3, 1.3)},
    "renormalised": {"num_beams": 4, "renormalize_logits": True, "remove_invalid_values": True, "bad_words_ids": [[5]]},
    "allowed tokens": {"num_beams": 4, "prefix_allowed_tokens_fn": only_even_tokens},
    "processor": {"num_beams": 4, **PROCESSORS},
    "criterion": {"num_beams": 4, **CRITERIA},
    "criterion and processor": {"num_beams": 3, "num_return_sequences": 3, **CRITERIA, **PROCESSORS},
    "time": {"num_beams": 4, "max_time": 1000.0},
    "own maximum": {"num_beams": 4, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(6)])},
    "own minimum": {
        "num_beams": 4,
        "min_length": 5,
        "logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(9, OTHER_ENDS)]),
    },
    "five ends": {"num_beams": 4, "eos_token_id": [2, *range(20, 24)], "num_return_sequences": 4},
    "no end": {"num_beams": 4, "eos_token_id": None, "pad_token_id": 0},
    "logits": {"num_beams": 3, "output_logits": True, "output_scores": False},
    "scores and logits": {"num_beams": 3, "output_logits": True, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 4, "do_sample": True, "num_return_sequences": 2},
    "sampled beams, top k": {"num_beams": 3, "do_sample": True, "top_k": 8, "temperature": 1.5, "output_scores": False},
}
WITHOUT_BEAMS = {
    "greedy": {},
    "greedy, scores and logits": {"output_logits": True},
    "greedy, nothing told": {"output_scores": False},
    "minimum length": {"min_length": 9},
    "no repeated token": {"no_repeat_ngram_size": 1, "output_scores": False},
    "repetition penalty": {"repetition_penalty": 1.7},
    "allowed tokens": {"prefix_allowed_tokens_fn": only_even_tokens},
    "criterion and processor": {**CRITERIA, **PROCESSORS},
    "own maximum": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(6)])},
    "own longer maximum": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(18)])},
    "own end": {"stopping_criteria": StoppingCriteriaList([EosTokenCriteria(OTHER_ENDS)])},
    "five ends": {"eos_token_id": [2, *range(20, 24)]},
    "no end": {"eos_token_id": None, "pad_token_id": 0},
    "sampling": {"do_sample": True, "output_logits": True},
    "three samples": {"do_sample": True, "num_return_sequences": 3},
    "sampling among few": {"do_sample": True, "top_k": 5, "top_p": 0.8, "temperature": 0.7, "output_scores": False},
    "sampling, allowed tokens": {"do_sample": True, "prefix_allowed_tokens_fn": only_even_tokens},
    "sampling, typical": {"do_sample": True, "typical_p": 0.6, "min_new_tokens": 4, "num_return_sequences": 2},
    "sampling, minimum probability": {"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.3},
}
TABLE = [
    pytest.param({**options, **({} if beams else {"num_beams": 1})}, configuration, id=f"{name}-{configuration}")
    for beams, table in ((True, BEAM_SEARCHES), (False, WITHOUT_BEAMS))
    for (name, options), configuration in zip(table.items(), itertools.cycle(CONFIGURATIONS), strict=False)
]


@pytest.mark.parametrize(("options", "configuration"), TABLE)
def test_outputs_are_those_of_transformers(models, source, options, configuration):
    ours, stock = both(models(configuration), **source(), **options)
    assert_same(ours, stock)
    assert len({tuple(row) for row in ours.sequences.tolist()}) > 1  # else little has been compared


def test_the_models_here_end_sentences_at_different_lengths(models, source):
    """Otherwise the tests above would cover only half of a search."""
    ends = []
    for configuration in CONFIGURATIONS:
        outputs = GenerationMixin.generate(models(configuration), **source(), num_beams=1, max_new_tokens=14)
        ends += [row.tolist().index(2) for row in outputs if 2 in row]
    assert len(ends) > 3 * len(CONFIGURATIONS)
    assert len(set(ends)) > 4


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    configuration=st.sampled_from(sorted(CONFIGURATIONS)),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=9),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 1000),
    beams=st.integers(1, 8),
    returned=st.integers(1, 8),
    early_stopping=st.sampled_from([False, True, "never"]),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.0]),
    maximum=st.integers(1, 20),
    minimum=st.integers(0, 10),
    ngram=st.sampled_from([0, 0, 1, 2]),
    told=st.booleans(),
)
def test_outputs_are_those_of_transformers_for_any_options(
    models, source, configuration, lengths, side, seed, beams, returned, early_stopping, length_penalty, maximum,
    minimum, ngram, told,
):  # fmt: skip
    options = {"early_stopping": early_stopping, "length_penalty": length_penalty} if beams > 1 else {}
    ours, stock = both(
        models(configuration),
        **source(tuple(lengths), side=side, seed=seed),
        **options,
        num_beams=beams,
        num_return_sequences=min(beams, returned),
        max_new_tokens=maximum,
        min_new_tokens=min(minimum, maximum),
        no_repeat_ngram_size=ngram,
        output_scores=told,
    )
    assert_same(ours, stock)


INPUTS = {
    "no mask": lambda source: {"input_ids": source(side="left")["input_ids"]},
    "left padding": lambda source: source(side="left"),
    "first argument": lambda source: {"inputs": source()["input_ids"], "attention_mask": source()["attention_mask"]},
    "ids and mask of 32 bits": lambda source: {name: each.int() for name, each in source().items()},
    "mask of truth values": lambda source: source() | {"attention_mask": source()["attention_mask"].bool()},
    "one sentence": lambda source: {"input_ids": source((6,))["input_ids"]},
    "configuration object": lambda source: (
        source() | {"generation_config": GenerationConfig(num_beams=3, eos_token_id=2, pad_token_id=0)}
    ),
}


@pytest.mark.parametrize("build", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_return_sequences": 2}], ids=["greedy", "beams"])
def test_inputs_are_taken_as_transformers_takes_them(models, source, build, options):
    inputs = build(source)
    if "generation_config" in inputs:
        options = {}
    assert_same(*both(models("paper"), **inputs, **options))


PREFIXED = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "beams, minimum of new tokens": {"num_beams": 4, "min_new_tokens": 3},
    "samples": {"num_beams": 1, "do_sample": True, "num_return_sequences": 3},
    "beams, repetition penalty": {"num_beams": 3, "repetition_penalty": 1.5},
    "samples, repetition penalty": {
        "num_beams": 1, "do_sample": True, "num_return_sequences": 2, "repetition_penalty": 1.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("is_padded", [True, False], ids=["padded", "even"])
@pytest.mark.parametrize("options", PREFIXED.values(), ids=PREFIXED.keys())
def test_prefixes_are_continued_as_by_transformers(models, source, padded, options, is_padded):
    if is_padded and "repetition_penalty" in options:
        pytest.skip("transformers' own loop decodes this: its processor counts the padding of expanded rows")
    lengths = tuple(1 + row % 4 if is_padded else 3 for row in range(len(LENGTHS)))
    prefix, mask = padded(lengths, "left", vocab_size=61, seed=3)
    prefix[torch.arange(len(prefix)), mask.argmax(dim=1)] = 1  # each begins with the decoder's start token
    arguments = {"decoder_input_ids": prefix} | ({"decoder_attention_mask": mask} if is_padded else {})
    for configuration in ("paper", "learned positions"):
        assert_same(*both(models(configuration), **source(), **arguments, **options))


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}])
def test_scores_of_transitions_add_up_to_those_of_outputs(models, source, options):
    model = models("pre-norm")
    results = []
    for output in both(model, **source(), **options):
        transitions = model.compute_transition_scores(
            output.sequences, output.scores, output.get("beam_indices"), normalize_logits=options["num_beams"] == 1
        )
        results.append(transitions)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    if options["num_beams"] > 1:
        told = model.generate(**source(), **options, max_new_tokens=14, return_dict_in_generate=True)
        lengths = (told.beam_indices >= 0).sum(dim=1)
        torch.testing.assert_close(results[0].sum(dim=1) / lengths, told.sequences_scores, atol=1e-5, rtol=1e-5)


def test_a_streamer_receives_what_transformers_gives_it(models, source):
    class Collector(BaseStreamer):
        def __init__(self):
            self.received = []

        def put(self, value):
            self.received.append(value.tolist())

        def end(self):
            self.received.append("end")

    collectors = Collector(), Collector()
    arguments = {**source(), "num_beams": 1, "max_new_tokens": 9}
    models("paper").generate(**arguments, streamer=collectors[0])
    GenerationMixin.generate(models("paper"), **arguments, streamer=collectors[1])
    assert collectors[0].received == collectors[1].received
    assert collectors[0].received[-1] == "end"


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_return_sequences": 5},
        {"num_beams": 1, "num_return_sequences": 2},
        {"lenght_penalty": 2.0},
        {"max_length": 0},
    ],
    ids=["more outputs than beams", "two greedy outputs", "misspelt", "no room"],
)
def test_mistakes_are_told_as_by_transformers(models, source, wrong):
    messages = []
    for generate in (models("paper").generate, lambda **options: GenerationMixin.generate(models("paper"), **options)):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            generate(**source(), **wrong)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


class TestNeighbours:
    """A sentence's output does not depend on the others in its batch, nor on when they end."""

    # By the compiled program scores are the same to the last bit, in 8 bits too.
    INT8 = {"compiled": True, "compute_type": "int8"}
    WAYS = [
        pytest.param({}, 1e-5, id="some leave"),
        pytest.param({"output_scores": True}, 1e-5, id="all stay"),
        pytest.param({"compiled": True}, 0.0, id="compiled", marks=needs_compiler),
        pytest.param(INT8, 0.0, id="compiled, int8", marks=needs_compiler),
    ]

    @pytest.mark.parametrize(("way", "tolerance"), WAYS)
    @pytest.mark.parametrize("beams", [1, 4])
    def test_alone_and_in_batches_outputs_are_the_same(self, models, source, beams, way, tolerance):
        model = models("paper")
        options = {"num_beams": beams, "max_new_tokens": 20, "return_dict_in_generate": True, **way}
        everything = source()

        def outputs(rows: list[int], extra: int, side: str) -> list[tuple]:
            """Tokens until the end, and score, of these sentences decoded together, with columns of padding added."""
            batch = {name: torch.zeros(len(rows), 8 + extra, dtype=torch.long) for name in everything}
            for place, row in enumerate(rows):
                kept = everything["attention_mask"][row].bool()
                columns = slice(8 + extra - int(kept.sum()), None) if side == "left" else slice(0, int(kept.sum()))
                batch["input_ids"][place, columns] = everything["input_ids"][row, kept]
                batch["attention_mask"][place, columns] = 1
            result = model.generate(**batch, **options)
            scores = result.sequences_scores.tolist() if beams > 1 else [0.0] * len(rows)
            tokens = [row[1 : row.index(2, 1) + 1] if 2 in row[1:] else row[1:] for row in result.sequences.tolist()]
            return list(zip(tokens, scores, strict=True))

        alone = [outputs([row], 0, "right")[0] for row in range(len(LENGTHS))]
        assert len({len(tokens) for tokens, _ in alone}) > 2  # sentences end at different times
        for size, extra, side in ((len(LENGTHS), 0, "right"), (5, 3, "left"), (7, 1, "right")):
            order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(size)).tolist()
            for begin in range(0, len(order), size):
                rows = order[begin : begin + size]
                for row, (tokens, score) in zip(rows, outputs(rows, extra, side), strict=True):
                    assert tokens == alone[row][0]
                    assert score == pytest.approx(alone[row][1], abs=tolerance, rel=0.0)


class Reference:
    """The models' next-token probabilities in float64 by full forward passes, averaged, for one sentence."""

    def __init__(self, models, input_ids: torch.Tensor):
        self.models = [copy.deepcopy(model).double() for model in models]
        self.input_ids = input_ids

    @torch.no_grad()
    def next_log_probabilities(self, prefixes: list[tuple[int, ...]]) -> torch.Tensor:
        """`[len(prefixes), V]` after each of some prefixes of one length."""
        sources, targets = self.input_ids.expand(len(prefixes), -1), torch.tensor(prefixes)
        logits = [model(sources, decoder_input_ids=targets, use_cache=False).logits[:, -1] for model in self.models]
        return torch.stack([each.softmax(dim=-1) for each in logits]).mean(dim=0).log()

    @torch.no_grad()
    def log_probabilities(self, outputs: list[tuple[int, ...]]) -> torch.Tensor:
        """Of each token of outputs of one length (the start token first), `[len(outputs), T]`."""
        sources, targets = self.input_ids.expand(len(outputs), -1), torch.tensor(outputs)
        logits = [model(sources, decoder_input_ids=targets[:, :-1], use_cache=False).logits for model in self.models]
        mean = torch.stack([each.softmax(dim=-1) for each in logits]).mean(dim=0).log()
        return mean.gather(2, targets[:, 1:, None]).squeeze(2)

    @torch.no_grad()
    def coverage(self, output: tuple[int, ...]) -> float:
        """sum_i log(min(sum_j p_ij, 1)) of one output: `p_ij` from its token j to source token i."""
        total = 0.0
        for model in self.models:
            model.set_attn_implementation("eager")
            attention = model(
                self.input_ids, decoder_input_ids=torch.tensor([output[:-1]]), output_attentions=True
            ).cross_attentions[-1]  # [1, H, T, S]
            total = total + attention.mean(dim=1).sum(dim=1)[0] / len(self.models)
        return sum(math.log(min(float(source_token), 1.0)) for source_token in total)

    def search(
        self, beams: int, new_tokens: int, groups: int = 1, diversity: float = 0.0
    ) -> list[tuple[float, tuple[int, ...]]]:
        """
        Beam search as transformers does it (length penalty 1, stopping when the best that runs is behind all that have
        ended), in groups as Vijayakumar et al. do, over lists: the best outputs and their scores, the best first.
        """
        width = beams // groups
        running = [[(0.0, (1,))] for _ in range(groups)]
        ended: list[list] = [[] for _ in range(groups)]
        is_done = [False] * groups
        for length in range(1, new_tokens + 1):
            chosen: Counter[int] = Counter()
            for group in range(groups):
                following = self.next_log_probabilities([tokens for _, tokens in running[group]])
                for token, times in chosen.items():
                    following[:, token] -= diversity * times
                candidates = sorted(
                    (
                        (score + new, (*tokens, token))
                        for (score, tokens), row in zip(running[group], following.tolist(), strict=True)
                        for token, new in enumerate(row)
                    ),
                    reverse=True,
                )[: 2 * width]
                if not is_done[group]:
                    is_last = length == new_tokens
                    new = [(score / length, each) for score, each in candidates[:width] if each[-1] == 2 or is_last]
                    ended[group] = sorted(ended[group] + new, reverse=True)[:width]
                running[group] = [(score, each) for score, each in candidates if each[-1] != 2][:width]
                chosen.update(tokens[-1] for _, tokens in running[group])
                full = len(ended[group]) == width
                is_done[group] |= full and running[group][0][0] / length <= ended[group][-1][0]
            if all(is_done):
                break
        return sorted((hypothesis for group in ended for hypothesis in group), reverse=True)


def assert_found(output, expected: list[tuple[float, tuple[int, ...]]]) -> None:
    """Checks that a sentence has these outputs, in this order, with these scores."""
    for row, score, (true_score, tokens) in zip(
        output.sequences.tolist(), output.sequences_scores.tolist(), expected, strict=True
    ):
        assert tuple(row[: len(tokens)]) == tokens
        assert set(row[len(tokens) :]) <= {0, 2}
        assert score == pytest.approx(true_score, abs=2e-5)


class TestReference:
    """Searches that transformers does not have (any more), compared with one over lists in float64."""

    OPTIONS = {"max_new_tokens": 8, "return_dict_in_generate": True}

    @pytest.mark.parametrize("row", range(3))
    @pytest.mark.parametrize(
        "options",
        [
            {"num_beams": 5},
            {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.5},
            {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 0.7},
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.0},
        ],
        ids=["one group", "groups of two", "groups of one", "no penalty"],
    )
    def test_the_n_best_of_a_search_in_groups_are_those_of_a_search_over_lists(self, models, source, options, row):
        batch = source()
        output = models("paper").generate(**batch, **options, **self.OPTIONS, num_return_sequences=options["num_beams"])
        reference = Reference([models("paper")], batch["input_ids"][row : row + 1, : LENGTHS[row]])
        expected = reference.search(
            options["num_beams"], 8, options.get("num_beam_groups", 1), options.get("diversity_penalty", 0.0)
        )
        mine = slice(row * options["num_beams"], (row + 1) * options["num_beams"])
        own = {"sequences": output.sequences[mine], "sequences_scores": output.sequences_scores[mine]}
        assert_found(type(output)(**own), expected)

    def test_groups_differ_where_beams_do_not(self, models, source):
        options = {**self.OPTIONS, "num_beams": 4, "num_return_sequences": 4}
        one = models("paper").generate(**source(), **options)
        groups = models("paper").generate(**source(), **options, num_beam_groups=4, diversity_penalty=2.0)

        def firsts(output) -> int:
            return sum(len(set(tokens)) for tokens in output.sequences[:, 1].view(-1, 4).tolist())

        assert firsts(groups) > firsts(one)

    def test_beams_that_cannot_be_divided_are_an_error(self, models, source):
        with pytest.raises(ValueError, match=r"num_beams=5 .*num_beam_groups=2"):
            models("paper").generate(**source(), num_beams=5, num_beam_groups=2, diversity_penalty=1.0)

    @pytest.mark.parametrize("row", range(3))
    def test_an_ensemble_searches_with_the_mean_of_its_probabilities(self, models, source, lively_model, row):
        other = lively_model(seed=7, d_model=24, decoder_layers=1, decoder_attention_heads=3)
        batch = source()
        output = models("paper").generate(
            **batch, **self.OPTIONS, num_beams=4, num_return_sequences=4, ensemble=[other]
        )
        reference = Reference([models("paper"), other], batch["input_ids"][row : row + 1, : LENGTHS[row]])
        mine = slice(4 * row, 4 * row + 4)
        own = {"sequences": output.sequences[mine], "sequences_scores": output.sequences_scores[mine]}
        assert_found(type(output)(**own), reference.search(4, 8))

    @pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 4}], ids=["greedy", "beams"])
    def test_an_ensemble_of_a_model_with_itself_is_the_model(self, models, source, options):
        model = models("paper")
        arguments = {**source(), **options, "max_new_tokens": 12, "return_dict_in_generate": True}
        alone, twice = model.generate(**arguments), model.generate(**arguments, ensemble=[model, model])
        assert torch.equal(alone.sequences, twice.sequences)
        if options["num_beams"] > 1:
            torch.testing.assert_close(alone.sequences_scores, twice.sequences_scores, atol=1e-5, rtol=0)

    @torch.no_grad()
    def test_greedy_search_of_an_ensemble_takes_the_likeliest_by_the_mean(self, models, source, lively_model):
        other = lively_model(seed=7)
        batch = source((7, 7, 7))
        output = models("paper").generate(**batch, num_beams=1, max_new_tokens=8, ensemble=[other])
        for row in range(3):
            reference = Reference([models("paper"), other], batch["input_ids"][row : row + 1])
            tokens = [1]
            while len(tokens) < 9 and tokens[-1] != 2:
                tokens.append(int(reference.next_log_probabilities([tuple(tokens)]).argmax()))
            assert output[row, : len(tokens)].tolist() == tokens

    def test_an_ensemble_of_other_vocabularies_is_an_error(self, models, source, lively_model):
        with pytest.raises(ValueError, match="model 1 has vocab_size=67, this one has 61"):
            models("paper").generate(**source(), ensemble=[lively_model(vocab_size=67)])
        training = lively_model().train()
        with pytest.raises(ValueError, match=r"model 1 cannot be packed .training mode.*it must be in evaluation mode"):
            models("paper").generate(**source(), ensemble=[training])


def power(exponent: float) -> Callable[[int], float]:
    return lambda length: float(length) ** exponent


def gnmt(alpha: float) -> Callable[[int], float]:
    """Wu et al. (2016), equation 14."""
    return lambda length: (5 + length) ** alpha / (5 + 1) ** alpha


# Arguments, the divisor of the log-probability, and beta.
PENALTIES = {
    "none": ({"length_penalty": 0.0}, power(0.0), 0.0),
    "mean": ({"length_penalty": 1.0}, power(1.0), 0.0),
    "square": ({"length_penalty": 2.0}, power(2.0), 0.0),
    "gnmt": ({"length_penalty": 0.6, "length_penalty_form": "gnmt"}, gnmt(0.6), 0.0),
    "coverage": ({"length_penalty": 1.0, "coverage_penalty": 0.4}, power(1.0), 0.4),
    "gnmt and coverage": (
        {"length_penalty": 0.6, "length_penalty_form": "gnmt", "coverage_penalty": 0.2}, gnmt(0.6), 0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("compiled", [False, pytest.param(True, id="compiled", marks=needs_compiler)])
@pytest.mark.parametrize(("options", "penalty", "beta"), PENALTIES.values(), ids=PENALTIES.keys())
class TestPenalties:
    """Length and coverage penalties, computed by hand in float64."""

    def test_beams_as_wide_as_the_space_find_the_best_of_all_outputs(
        self, lively_model, padded, options, penalty, beta, compiled
    ):
        new_tokens = 3
        model = lively_model(vocab_size=5, seed=1)
        input_ids, mask = padded((5, 3), vocab_size=5, side="left")
        output = model.generate(
            input_ids,
            attention_mask=mask,
            num_beams=96,
            num_return_sequences=6,
            max_new_tokens=new_tokens,
            early_stopping="never",
            return_dict_in_generate=True,
            compiled=compiled,
            **options,
        )
        others = [0, 1, 3, 4]
        for row, length in enumerate((5, 3)):
            reference = Reference([model], input_ids[row : row + 1, -length:])
            every = []
            for size in range(1, new_tokens + 1):
                last = range(5) if size == new_tokens else [2]
                outputs = list(itertools.product([1], *[others] * (size - 1), last))
                totals = reference.log_probabilities(outputs).sum(dim=1).tolist()
                every += [
                    (total / penalty(size) + (beta * reference.coverage(each) if beta else 0.0), each)
                    for total, each in zip(totals, outputs, strict=True)
                ]
            mine = slice(6 * row, 6 * row + 6)
            own = {"sequences": output.sequences[mine], "sequences_scores": output.sequences_scores[mine]}
            assert_found(type(output)(**own), sorted(every, reverse=True)[:6])

    def test_scores_of_outputs_follow_the_formula(self, models, source, options, penalty, beta, compiled):
        model, batch = models("paper"), source()
        options = {**options, "num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 12, "compiled": compiled}
        output = model.generate(**batch, **options, return_dict_in_generate=True)
        references = [
            Reference([model], row[None, :length]) for row, length in zip(batch["input_ids"], LENGTHS, strict=True)
        ]
        for number, reference in enumerate(each for each in references for _ in range(2)):
            length = int((output.beam_indices[number] >= 0).sum())
            tokens = tuple(output.sequences[number, : length + 1].tolist())
            assert 2 not in tokens[:-1]
            expected = float(reference.log_probabilities([tokens]).sum()) / penalty(length)
            expected += beta * reference.coverage(tokens)
            assert float(output.sequences_scores[number]) == pytest.approx(expected, abs=1e-5)


def test_the_coverage_of_an_ensemble_is_the_mean_of_its_models(models, source, lively_model):
    other = lively_model(seed=7, decoder_attention_heads=4)
    batch = source((6, 6))
    output = models("paper").generate(
        **batch, num_beams=3, max_new_tokens=6, coverage_penalty=0.3, ensemble=[other], return_dict_in_generate=True
    )
    for row in range(2):
        reference = Reference([models("paper"), other], batch["input_ids"][row : row + 1])
        length = int((output.beam_indices[row] >= 0).sum())
        tokens = tuple(output.sequences[row, : length + 1].tolist())
        expected = float(reference.log_probabilities([tokens]).sum()) / length + 0.3 * reference.coverage(tokens)
        assert float(output.sequences_scores[row]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("vocabulary", [10, 2047, 2048, 2100, 6001])
def test_the_top_of_rows_is_that_of_topk(vocabulary):
    scores = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    scores[1, : vocabulary // 2] = float("-inf")
    scores[2, vocabulary - 3 :] += 10
    for k in (1, 5, 8):
        values, indices = top_of_rows(scores, k)
        expected = scores.topk(k)
        assert torch.equal(values, expected.values)
        assert torch.equal(indices, expected.indices)
    values, indices = top_of_rows(scores, 2 * vocabulary)
    assert values.shape == (5, vocabulary)

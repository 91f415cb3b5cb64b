"""
Random searches with random networks, by `generate()` and by transformers' own loops.

    make fuzz                                  for a minute, by a seed that is another each time; SECONDS=600 for ten
    python tests/stock_loops.py SECONDS SEED   beginning with this seed: 0 shows one search again

All must find the same tokens, descend from the same beams, and give the same scores to `SCORES_AGREE`. Two kinds of
difference do not count. Rounding may decide between hypotheses that are nearly as good: transformers' loop itself finds
what ours has found, once its scores are changed at random by no more than `NOISE`. And where scores leave the range in
which single precision tells hypotheses apart, all tie exactly: at -1e9 where fewer outputs are possible than are asked
for, at infinity where processors multiply. Both must then give scores beyond `BEYOND`.
"""

import functools
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from compilers import HAS_COMPILER
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, logging

from vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration


# In single precision log-probabilities of these networks are 2e-5 from those in double.
SCORES_AGREE, NOISE, NOISY_RUNS = 1e-4, 5e-5, 20
BEYOND = 1e6
PAD, START, END = 0, 1, 2
PROCESSORS = {
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "exponential_decay_length_penalty", "renormalize_logits", "remove_invalid_values",
}  # fmt: skip


class Case(NamedTuple):
    """A network, and arguments of `generate()`."""

    fields: dict[str, Any]
    model: Any
    options: dict[str, Any]


def random_case(seed: int) -> Case:
    """The same for the same seed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    fields = random_fields(draw)
    model = VanillaTransformerForConditionalGeneration(VanillaTransformerConfig(**fields)).eval()
    vocabulary = model.config.decoder_vocab_size
    ends = draw.choice([END, END, [END], [END, vocabulary - 1], [vocabulary - 2, END, 3], None])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        # Outputs of all lengths: some token in eight ends a sentence.
        targets = torch.randint(3, vocabulary, (6, 12))
        logits = model(targets % fields["vocab_size"], decoder_input_ids=targets).logits
        for end in [ends] if isinstance(ends, int) else ends or []:
            behind = logits.amax(dim=-1) - logits[..., end]
            model.lm_head.bias[end] += behind.quantile(1 / 8)
    options = random_inputs(draw, model) | random_lengths(draw) | {"eos_token_id": ends, "pad_token_id": PAD}
    options |= random_beams(draw)
    if draw.random() < 0.6:  # else what the compiled program knows
        options |= random_processors(draw, vocabulary)
    return Case(fields, model, options)


def random_fields(draw: random.Random) -> dict[str, Any]:
    """Of a config."""
    fields = {
        "vocab_size": draw.choice([7, 20, 61, 300]),
        "d_model": draw.choice([8, 16, 24]),
        "encoder_layers": draw.randint(1, 2),
        "decoder_layers": draw.randint(1, 2),
        "encoder_attention_heads": draw.choice([1, 2, 4]),
        "decoder_attention_heads": draw.choice([1, 2, 4]),
        "encoder_ffn_dim": draw.choice([8, 30]),
        "decoder_ffn_dim": draw.choice([8, 30]),
        "activation_function": draw.choice(["relu", "relu", "silu", "gelu", "tanh"]),
        "normalize_before": draw.random() < 0.5,
        "scale_embedding": draw.random() < 0.7,
        "tie_word_embeddings": draw.random() < 0.3,
        "position_embedding_type": draw.choice(["sinusoidal", "learned"]),
        "max_position_embeddings": 64,
    }
    if draw.random() < 0.4:
        # More words than a search looks at one by one.
        fields |= {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": draw.choice([6, 53, 2500])}
    if draw.random() < 0.3:
        fields |= {"d_kv": draw.choice([3, 6]), "d_v": draw.choice([5, 10])}
    return fields


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, `[B, L]`."""
    longest = max(map(len, rows))
    filling = [[PAD] * (longest - len(row)) for row in rows]
    ids = [fill + row if side == "left" else row + fill for fill, row in zip(filling, rows, strict=True)]
    mask = [
        [0] * len(fill) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(fill)
        for fill, row in zip(filling, rows, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def random_inputs(draw: random.Random, model: Any) -> dict[str, torch.Tensor]:
    """Sources, padded on either side, and perhaps prefixes of one length or of several."""

    def rows(vocabulary: int, lengths: list[int]) -> list[list[int]]:
        return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]

    sentences = draw.randint(1, 6)
    lengths = [draw.randint(1, 10) for _ in range(sentences)]
    ids, mask = padded(rows(model.config.vocab_size, lengths), draw.choice(["left", "right"]))
    inputs = {"input_ids": ids, "attention_mask": mask}
    if draw.random() < 0.4:
        even = draw.random() < 0.6
        lengths = [draw.randint(0, 3)] * sentences if even else [draw.randint(0, 3) for _ in range(sentences)]
        prefixes = [[START, *row] for row in rows(model.config.decoder_vocab_size, lengths)]
        inputs["decoder_input_ids"], mask = padded(prefixes, "left")
        if not even:
            inputs["decoder_attention_mask"] = mask
    return inputs


def random_lengths(draw: random.Random) -> dict[str, Any]:
    """Least and greatest lengths, with or without the prefix."""
    options: dict[str, Any] = {}
    longest = draw.randint(1, 16)
    if draw.random() < 0.7:
        options["max_new_tokens"] = longest
    else:
        options["max_length"] = longest + 4  # longer than any prefix
    if draw.random() < 0.3:
        options["min_new_tokens"] = draw.randint(0, longest)
    if draw.random() < 0.3:
        options["min_length"] = draw.randint(0, longest)
    return options


def random_beams(draw: random.Random) -> dict[str, Any]:
    """Greedy search, or beams."""
    beams = draw.choice([1, 1, 2, 3, 4, 6])
    if beams == 1:
        return {"num_beams": 1}
    return {
        "num_beams": beams,
        "num_return_sequences": draw.randint(1, beams),
        "early_stopping": draw.choice([False, True, "never"]),
        "length_penalty": draw.choice([-1.0, 0.0, 0.6, 1.0, 2.0]),
    }


def random_processors(draw: random.Random, vocabulary: int) -> dict[str, Any]:
    """What changes scores: two or three of all that there are."""

    def token() -> int:
        return draw.randrange(vocabulary)

    def tokens(most: int) -> list[int]:
        return [token() for _ in range(draw.randint(1, most))]

    every: dict[str, Callable[[], Any]] = {
        "repetition_penalty": lambda: draw.choice([0.7, 1.3, 2.0]),
        "encoder_repetition_penalty": lambda: draw.choice([0.7, 1.5]),
        "no_repeat_ngram_size": lambda: draw.randint(1, 3),
        "encoder_no_repeat_ngram_size": lambda: draw.randint(1, 2),
        "bad_words_ids": lambda: [tokens(3) for _ in range(draw.randint(1, 4))],
        "sequence_bias": lambda: [[tokens(2), draw.uniform(-3.0, 3.0)] for _ in range(3)],
        "forced_bos_token_id": token,
        "forced_eos_token_id": lambda: draw.choice([END, END, token()]),
        "suppress_tokens": lambda: tokens(4),
        "begin_suppress_tokens": lambda: tokens(4),
        "exponential_decay_length_penalty": lambda: (draw.randint(0, 4), draw.choice([0.8, 1.3])),
        "renormalize_logits": lambda: True,
        "remove_invalid_values": lambda: True,
    }
    return {name: every[name]() for name in draw.sample(sorted(PROCESSORS), draw.randint(2, 3))}


class Noise(LogitsProcessor):
    """Changes scores by no more than `NOISE`."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + NOISE * (2 * torch.rand(scores.shape, generator=self.generator) - 1)


class Output(NamedTuple):
    """Of a search. Greedy search has neither beams nor scores."""

    tokens: list[int]
    beams: list[int] | None
    score: float | None


def search(case: Case, stock: bool, **more: Any) -> list[list[Output]]:
    """What transformers' own loop, or the model's `generate()`, finds for each sentence."""
    options = {**case.options, "return_dict_in_generate": True, "output_scores": stock, **more}
    generate = GenerationMixin.generate if stock else type(case.model).generate
    result = generate(case.model, **options)
    tokens, count = result.sequences.tolist(), case.options.get("num_return_sequences", 1)
    beams, scores = result.get("beam_indices"), result.get("sequences_scores")
    beams = [None] * len(tokens) if beams is None else beams.tolist()
    scores = [None] * len(tokens) if scores is None else scores.tolist()
    outputs = [Output(*fields) for fields in zip(tokens, beams, scores, strict=True)]
    return [outputs[row : row + count] for row in range(0, len(outputs), count)]


def told_apart(outputs: list[Output]) -> list[Output]:
    """Those whose place is not arbitrary."""
    return [each for each in outputs if each.score is None or abs(each.score) < BEYOND]


def agree(ours: list[Output], theirs: list[Output]) -> bool:
    """Whether tokens and beams are the same, and scores nearly."""
    if len(told_apart(ours)) != len(told_apart(theirs)):
        return False
    return all(
        a[:2] == b[:2] and (a.score is None or abs(a.score - b.score) <= SCORES_AGREE * (1 + abs(b.score)))
        for a, b in zip(told_apart(ours), told_apart(theirs), strict=True)
    )


def trimmed(outputs: list[Output]) -> list[list[int]]:
    """Tokens without what fills them up behind the end, which depends on the longest output of a batch."""
    rows = []
    for row in (each.tokens for each in told_apart(outputs)):
        while len(row) > 1 and row[-1] == row[-2]:
            row = row[:-1]
        rows.append(row)
    return rows


def differences(seed: int) -> Iterator[str]:
    """What `generate()` does otherwise than transformers' loop in one random search, in words."""
    case = random_case(seed)

    @functools.cache
    def noisy(number: int) -> list[list[Output]]:
        return search(case, stock=True, logits_processor=LogitsProcessorList([Noise(number)]))

    try:
        stock = search(case, stock=True)
    except (IndexError, RuntimeError, ValueError):
        return  # it does not know such arguments
    for compiled in (False, True) if HAS_COMPILER else (False,):
        ours = search(case, stock=False, compiled=compiled)
        engine = case.model.last_engine.name
        if engine == "transformers" or (compiled and engine != "compiled"):
            continue
        for sentence, (a, b) in enumerate(zip(ours, stock, strict=True)):
            near = (trimmed(noisy(number)[sentence]) == trimmed(a) for number in range(NOISY_RUNS))
            if not agree(a, b) and not any(near):
                told = f"seed {seed}, sentence {sentence}: {engine} finds {a}, transformers {b}"
                yield f"{told}\n    {case.fields}\n    {case.options}"


def main(argv: list[str]) -> int:
    """The exit status: 0 if nothing was found."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    end = time.monotonic() + float(argv[0])
    seed = int(argv[1]) if len(argv) > 1 else int(time.time()) * 1000
    first, found = seed, 0
    while seed == first or time.monotonic() < end:
        for difference in differences(seed):
            found += 1
            print(difference, flush=True)
        seed += 1
    print(f"{seed - first} searches from seed {first}: {found} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

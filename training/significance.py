"""Confidence intervals of scores, and whether one model is better than another: sacrebleu's paired tests.

- Paired bootstrap (Koehn, 2004): the test set is drawn anew 1,000 times, with replacement. It gives the 95 %
  intervals too.
- Approximate randomisation (Riezler and Maxwell, 2005): 10,000 times the two translations of a random half of the rows
  change places.

The p-value is how often chance alone makes a difference as large as the one found. sacrebleu's seed is fixed
(SACREBLEU_SEED), so the same texts give the same figures.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from sacrebleu import significance
from sacrebleu.significance import PairedTest, Result

from .errors import UserError
from .metric_names import TITLES
from .metrics import References, make_metrics, streams


logger = logging.getLogger(__name__)

# sacrebleu holds the counts of all resamples in memory: at this many rows about 1 GB.
MOST_ROWS = 10_000
# sacrebleu's names of its tests -> ours, and how many resamples or trials each makes, which are its defaults.
TESTS = {"bs": "bootstrap", "ar": "randomisation"}
SAMPLES = {"bs": 1000, "ar": 10_000}
# Two differences that are equal but for rounding. Scores run from 0 to 100.
TIE = 1e-6


def confidence_intervals(
    predictions: list[str], references: References, bleu_tokenize: str, metrics: Sequence[str]
) -> dict[str, Any] | None:
    """
    The 95 % confidence interval of each score, by bootstrap.

    Returns:
        The `level` (95), the number of `resamples`, and for each metric of `intervals` the `mean` of the resamples and
        the `half_width` of the interval, as sacrebleu writes them: mean ± half width. None for more rows than
        `MOST_ROWS`, which the log says.
    """
    if len(predictions) > MOST_ROWS:
        logger.warning("no confidence intervals: %d rows, and at most %d fit into memory", len(predictions), MOST_ROWS)
        return None
    (results,) = _test("bs", {"": predictions}, references, bleu_tokenize, metrics)
    return {
        "level": 95,
        "resamples": SAMPLES["bs"],
        "intervals": _intervals(results),
    }


def refuse_too_many(rows: int) -> None:
    """
    Raises:
        UserError: no test can be made on so many rows.
    """
    if rows > MOST_ROWS:
        raise UserError(
            f"compare: the test set has {rows} rows, but significance tests take at most {MOST_ROWS} (sacrebleu holds "
            "all resamples in memory): set max_eval_samples"
        )


def compare(
    ours: list[str], others: dict[str, list[str]], references: References, bleu_tokenize: str, metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """
    Tests each other system's translations against ours, by bootstrap and by approximate randomisation.

    Args:
        ours: our translations.
        others: the others' translations of the same rows, by name.

    Returns:
        For each name: the other's `scores`, its `intervals` (as in `confidence_intervals`), and for each metric of
        `p_values` the p-value of `bootstrap` and of `randomisation`.
    """
    # None of the others has an empty name.
    systems = {"": ours} | others
    by_test = {test: _test(test, systems, references, bleu_tokenize, metrics)[1:] for test in TESTS}
    found = {}
    for number, name in enumerate(others):
        bootstrap = by_test["bs"][number]
        found[name] = {
            "scores": {metric: result.score for metric, result in bootstrap.items()},
            "intervals": _intervals(bootstrap),
            "p_values": {
                metric: {words: by_test[test][number][metric].p_value for test, words in TESTS.items()}
                for metric in metrics
            },
        }
    return found


def _intervals(results: dict[str, Result]) -> dict[str, dict[str, float]]:
    """For each metric mean and half width, as floats of Python's: numpy's cannot be written as JSON."""
    found = {}
    for name, result in results.items():
        assert result.mean is not None
        assert result.ci is not None
        found[name] = {"mean": float(result.mean), "half_width": float(result.ci)}
    return found


def _test(
    kind: str, systems: dict[str, list[str]], references: References, bleu_tokenize: str, metrics: Sequence[str]
) -> list[dict[str, Result]]:
    """The results of each system, by metric. The first system is the one that the others are compared with."""
    known = make_metrics(metrics, bleu_tokenize)
    test = PairedTest(list(systems.items()), known, streams(references), kind, SAMPLES[kind])
    with counting_ties():
        _, found = test()
    # The names of the systems, then the results of each metric, in the order of the metrics.
    _, *by_metric = found.values()
    return [dict(zip(metrics, results, strict=True)) for results in zip(*by_metric, strict=True)]


@contextmanager
def counting_ties() -> Iterator[None]:
    """
    sacrebleu counts how often chance makes a larger difference. By definition one as large counts too (Phipson and
    Smyth, 2010). Otherwise two equal systems, or two that differ in one sentence, would differ with p = 0.0001.
    """
    theirs = significance._compute_p_value
    significance._compute_p_value = _p_value
    try:
        yield
    finally:
        significance._compute_p_value = theirs


def _p_value(stats: np.ndarray, real_difference: float) -> float:
    return (int(np.sum(stats >= real_difference - TIE)) + 1) / (len(stats) + 1)


def format_comparison(
    name: str, other: str, rows: int, scores: dict, confidence: dict, comparison: dict[str, Any]
) -> str:
    """
    A comparison as a table to print.

    Args:
        name: our system.
        other: the other.
        rows: the number of rows.
        scores: our scores.
        confidence: our intervals.
        comparison: one of those that `compare` returns.
    """
    wide = max(len(name), len(other), 15)
    lines = [
        f"{name} and {other}, {rows:,} rows",
        f"{'':>11}  {name:>{wide}}  {other:>{wide}}  difference  p (bootstrap)  p (randomisation)",
    ]
    for metric, p_values in comparison["p_values"].items():
        ours, theirs = scores[metric], comparison["scores"][metric]
        cells = [
            f"{score:.2f} ± {intervals[metric]['half_width']:.2f}"
            for score, intervals in ((ours, confidence["intervals"]), (theirs, comparison["intervals"]))
        ]
        both = "  ".join(f"{cell:>{wide}}" for cell in cells)
        lines.append(
            f"{TITLES[metric]:>11}  {both}  {ours - theirs:+10.2f}  {p_values['bootstrap']:13.4f}  "
            f"{p_values['randomisation']:17.4f}"
        )
    return "\n".join(lines)

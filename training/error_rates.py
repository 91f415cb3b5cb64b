"""Exact match and error rates (WER, CER, PER) as metrics of sacrebleu.

As such they have its confidence intervals and significance tests: those need only each sentence's own counts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from sacrebleu.metrics.base import Metric, Score


class SentenceCounts(Metric):
    """
    A metric of two counts a sentence, summed over the corpus: 100 times the first sum divided by the second.

    Args:
        title: its name.
    """

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def _preprocess_segment(self, sent: str) -> str:
        return sent

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"references": refs}

    def _aggregate_and_compute(self, stats: Any) -> Score:
        return self._compute_score_from_stats(np.sum(stats, axis=0))

    def _compute_score_from_stats(self, stats: Any) -> Score:
        """Where all references are empty: 0 for empty predictions, else 100, as TER has it."""
        counted, total = (float(count) for count in stats)
        share = counted / total if total else float(counted > 0)
        return Score(self.title, 100 * share)


class ExactMatch(SentenceCounts):
    """
    The share of predictions that equal a reference, from 0 to 100.

    Args:
        title: its name.
        wrong: count those that equal none instead: the word error rate of SIGMORPHON's shared tasks, where a row is one
            word.
    """

    def __init__(self, title: str, wrong: bool = False):
        super().__init__(title)
        self.wrong = wrong

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict[str, Any]) -> list[float]:
        return [int((hypothesis in ref_kwargs["references"]) != self.wrong), 1]


class ErrorRate(SentenceCounts):
    """
    Levenshtein's distance between prediction and reference (substitutions, deletions and insertions), summed over the
    corpus and divided by the length of the references, times 100. It may exceed 100. Of several references the nearest
    counts, and their mean length, as in TER.

    Args:
        title: its name.
        units: splits a text into what is compared: words, phones, characters.
    """

    def __init__(self, title: str, units: Callable[[str], Sequence[str]]):
        super().__init__(title)
        self.units = units

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict[str, Any]) -> list[float]:
        units, references = self.units(hypothesis), [self.units(text) for text in ref_kwargs["references"]]
        edits = min(Levenshtein.distance(units, reference) for reference in references)
        return [edits, sum(map(len, references)) / len(references)]

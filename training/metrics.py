"""Scores of translations: BLEU, chrF and TER (sacrebleu, Post 2018), exact match, WER, CER and PER.

They are one `evaluate.Metric`. It needs no download, unlike `evaluate.load("sacrebleu")`, which fetches a script from
the Hub.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import datasets
import evaluate
import sacrebleu
from sacrebleu.metrics.base import Metric

from .error_rates import ErrorRate, ExactMatch
from .metric_names import DEFAULT_METRICS, TITLES


DESCRIPTION = "Corpus-level scores by sacrebleu (BLEU, chrF, TER), the share of exact matches, and error rates."
CITATION = "Matt Post. A Call for Clarity in Reporting BLEU Scores. WMT 2018."
INPUTS = """
Args:
    predictions: translations, one string each.
    references: for each prediction one reference string, or a list of them, in which None stands for a missing one.
    tokenize: sacrebleu's tokenizer for BLEU, "13a" by default, "none" for text that is already tokenised.
    metrics: names of the scores to compute; by default bleu, chrf, ter and exact_match.

Returns:
    For each name a score from 0 to 100, and for those of sacrebleu a signature. Lower is better for ter, wer, cer, per
    and g2p_wer, and all of these but g2p_wer may exceed 100.

    bleu, chrf, ter: sacrebleu's. chrfpp: chrF++, which is chrF with words of one and two.
    exact_match: the share of predictions that equal a reference.
    wer, cer: word and character error rate, as for speech: the edits (substitutions, deletions, insertions) divided by
        the words, or characters, of the references. White space separates words. A character is a code point; spaces
        count, those around the text do not.
    per: phone error rate: the edits of phones divided by the phones of the references. White space separates phones.
    g2p_wer: the word error rate of grapheme-to-phoneme conversion (SIGMORPHON's shared tasks), in which a row is one
        word: the share of predictions that are not exactly right, 100 - exact_match.
"""

# One reference for each prediction, or a list of references for each.
References = Sequence[str] | Sequence[Sequence[str | None]]


def make_metrics(names: Sequence[str] = DEFAULT_METRICS, tokenize: str = "13a") -> dict[str, Metric]:
    """
    The metrics of these names, as sacrebleu's classes or classes derived from them.

    Args:
        names: keys of `METRICS` (metric_names.py).
        tokenize: sacrebleu's tokenizer for BLEU.
    """
    makers = {
        # `force` turns off the warning about tokenised text, which is intended here.
        "bleu": lambda: sacrebleu.BLEU(tokenize=tokenize, force=tokenize == "none"),
        "chrf": lambda: sacrebleu.CHRF(),
        "chrfpp": lambda: sacrebleu.CHRF(word_order=2),
        "ter": lambda: sacrebleu.TER(),
        "exact_match": lambda: ExactMatch(TITLES["exact_match"]),
        "wer": lambda: ErrorRate(TITLES["wer"], str.split),
        "cer": lambda: ErrorRate(TITLES["cer"], str.strip),
        "per": lambda: ErrorRate(TITLES["per"], str.split),
        "g2p_wer": lambda: ExactMatch(TITLES["g2p_wer"], wrong=True),
    }
    return {name: makers[name]() for name in names}


def streams(references: References) -> list[list[Any]]:
    """The references as sacrebleu takes them: the first of each prediction, then the second of each, and so on."""
    # None stands for a missing one, which sacrebleu's annotations leave out.
    lists = [[texts] if isinstance(texts, str) else texts for texts in references]
    return [list(stream) for stream in zip_longest(*lists)]


class TranslationMetrics(evaluate.Metric):
    """`TranslationMetrics().compute(predictions=[...], references=[...])` gives all scores at once."""

    def __init__(self):
        # Writing a cache folder could fail after all sentences are translated (`HF_HOME` on a read-only file system).
        super().__init__(keep_in_memory=True)

    def _build_data_dir(self) -> str:
        return ""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features({"predictions": text, "references": datasets.List(text)}),
            ],
        )

    def _compute(
        self,
        predictions: list[str],
        references: References,
        tokenize: str = "13a",
        metrics: Sequence[str] = DEFAULT_METRICS,
    ) -> dict[str, float | str]:
        scores: dict[str, float | str] = {}
        by_number = streams(references)
        for name, metric in make_metrics(metrics, tokenize).items():
            scores[name] = metric.corpus_score(predictions, by_number).score
            if isinstance(metric, sacrebleu.BLEU | sacrebleu.CHRF | sacrebleu.TER):
                scores[f"{name}_signature"] = str(metric.get_signature())
        return scores


def score_texts(
    predictions: list[str], references: References, bleu_tokenize: str, metrics: Sequence[str] = DEFAULT_METRICS
) -> dict:
    """The scores of translations against the true text, and sacrebleu's signatures."""
    return TranslationMetrics().compute(
        predictions=predictions, references=references, tokenize=bleu_tokenize, metrics=metrics
    )


def format_scores(scores: dict, confidence: dict | None = None) -> str:
    """
    The scores as lines to print.

    Args:
        confidence: the intervals of `confidence_intervals` (significance.py), if there are any.
    """
    intervals = confidence["intervals"] if confidence else {}
    lines = []
    for name, value in numbers(scores).items():
        interval = f" ± {intervals[name]['half_width']:.2f}" if name in intervals else ""
        lines.append(f"{name:>12} {value:6.2f}{interval}   {scores.get(f'{name}_signature', '')}".rstrip())
    return "\n".join(lines)


def numbers(scores: dict) -> dict[str, float]:
    """The scores without the signatures."""
    return {name: value for name, value in scores.items() if not isinstance(value, str)}

"""Scores of translations: BLEU, chrF, TER (sacrebleu, Post 2018) and exact match, as one `evaluate.Metric`.

It needs no download, unlike `evaluate.load("sacrebleu")`, which fetches a script from the Hub.
"""

from collections.abc import Sequence

import datasets
import evaluate
import sacrebleu


# The scores -> their titles in cards and pictures.
TITLES = {"bleu": "BLEU", "chrf": "chrF", "ter": "TER", "exact_match": "Exact match"}
DESCRIPTION = "Corpus-level BLEU, chrF and TER by sacrebleu, and the share of predictions equal to their reference."
CITATION = "Matt Post. A Call for Clarity in Reporting BLEU Scores. WMT 2018."
INPUTS = """
Args:
    predictions: translations, one string each.
    references: one reference string for each prediction.
    tokenize: sacrebleu's tokenizer for BLEU, "13a" by default, "none" for text that is already tokenised.

Returns:
    bleu, chrf, ter and exact_match, from 0 to 100, and the sacrebleu signatures of the first three. TER may exceed 100,
    and is the only one where lower is better.
"""


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
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str], tokenize: str = "13a") -> dict[str, float | str]:
        scores: dict[str, float | str] = {}
        metrics = {
            # `force` turns off the warning about tokenised text, which is intended here.
            "bleu": sacrebleu.BLEU(tokenize=tokenize, force=tokenize == "none"),
            "chrf": sacrebleu.CHRF(),
            "ter": sacrebleu.TER(),
        }
        for name, metric in metrics.items():
            scores[name] = metric.corpus_score(predictions, [references]).score
            scores[f"{name}_signature"] = str(metric.get_signature())
        equal = sum(prediction == reference for prediction, reference in zip(predictions, references, strict=True))
        scores["exact_match"] = 100 * equal / len(references)
        return scores


def score_texts(predictions: list[str], references: list[str], bleu_tokenize: str) -> dict:
    """BLEU, chrF, TER, exact match and signatures of translations, compared with the references."""
    return TranslationMetrics().compute(predictions=predictions, references=references, tokenize=bleu_tokenize)


def score_groups(
    predictions: list[str], references: list[str], groups: Sequence[str], bleu_tokenize: str
) -> dict[str, dict]:
    """
    The scores of each part of the text.

    Args:
        groups: the part to which each prediction belongs, e.g. its direction.

    Returns:
        For each part, in the order of their first rows, the number of `rows` and the `scores`, without signatures.
    """
    found = {}
    for group in dict.fromkeys(groups):
        rows = [row for row, its_group in enumerate(groups) if its_group == group]
        texts = [predictions[row] for row in rows], [references[row] for row in rows]
        found[group] = {"rows": len(rows), "scores": numbers(score_texts(*texts, bleu_tokenize))}
    return found


def format_groups(groups: dict[str, dict]) -> str:
    """The scores of each part as a table to print."""
    names = list(next(iter(groups.values()))["scores"])
    width = max(map(len, groups))
    lines = [f"{'':{width}}  {'rows':>7}" + "".join(f"  {TITLES[name]:>11}" for name in names)]
    for group, part in groups.items():
        scores = "".join(f"  {part['scores'][name]:11.2f}" for name in names)
        lines.append(f"{group:{width}}  {part['rows']:7,}{scores}")
    return "\n".join(lines)


def format_scores(scores: dict) -> str:
    """The scores as lines to print."""
    lines = [
        f"{name:>12} {value:6.2f}   {scores.get(f'{name}_signature', '')}" for name, value in numbers(scores).items()
    ]
    return "\n".join(line.rstrip() for line in lines)


def numbers(scores: dict) -> dict[str, float]:
    """The scores without the signatures."""
    return {name: value for name, value in scores.items() if not isinstance(value, str)}

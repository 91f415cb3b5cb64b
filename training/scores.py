"""The scores of a system on held-out rows: of all rows, with confidence intervals, and of each group of rows."""

from collections.abc import Collection, Sequence
from typing import Any

from datasets import Dataset

from .data.languages import direction_names
from .data.pairs import groups_of, references_of
from .metric_names import TITLES
from .metrics import References, numbers, score_texts
from .significance import confidence_intervals


def score_rows(
    predictions: list[str],
    pairs: Dataset,
    bleu_tokenize: str,
    metrics: Sequence[str],
    trained: Collection[tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """
    Scores translations of these rows.

    Args:
        predictions: one for each row.
        pairs: the rows, as `load_pairs` gives them.
        bleu_tokenize: sacrebleu's tokenizer for BLEU.
        metrics: names of metrics.
        trained: the directions that the model was trained on, as far as they are known. Others are called zero-shot.

    Returns:
        `scores`, with sacrebleu's signatures; their `confidence` (significance.py), unless there are too many rows;
        and, if the rows have groups (by `group_column`) or name their directions, the scores of each of the `groups`.
    """
    references, groups = references_of(pairs), groups_of(pairs) or direction_names(pairs, trained)
    results: dict[str, Any] = {"scores": score_texts(predictions, references, bleu_tokenize, metrics)}
    if confidence := confidence_intervals(predictions, references, bleu_tokenize, metrics):
        results["confidence"] = confidence
    if groups:
        results["groups"] = score_groups(predictions, references, groups, bleu_tokenize, metrics)
    return results


def score_groups(
    predictions: list[str], references: References, groups: Sequence[str], bleu_tokenize: str, metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """
    The scores of each group of rows.

    Args:
        groups: the group of each row, e.g. its corpus or its direction.

    Returns:
        For each group, in the order of their first rows, the number of `rows` and the `scores`, without signatures.
    """
    found = {}
    for group in dict.fromkeys(groups):
        rows = [row for row, its_group in enumerate(groups) if its_group == group]
        texts = [predictions[row] for row in rows], [references[row] for row in rows]
        found[group] = {"rows": len(rows), "scores": numbers(score_texts(*texts, bleu_tokenize, metrics))}
    return found


def format_groups(groups: dict[str, dict[str, Any]]) -> str:
    """The scores of each group as a table to print."""
    names = list(next(iter(groups.values()))["scores"])
    width = max(map(len, groups))
    lines = [f"{'':{width}}  {'rows':>7}" + "".join(f"  {TITLES[name]:>11}" for name in names)]
    for group, part in groups.items():
        scores = "".join(f"  {part['scores'][name]:11.2f}" for name in names)
        lines.append(f"{group:{width}}  {part['rows']:7,}{scores}")
    return "\n".join(lines)

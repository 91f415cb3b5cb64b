"""The metrics by name. This file imports no library, so that the rules of a recipe can read it quickly."""

from typing import NamedTuple


class MetricName(NamedTuple):
    """What cards and pictures call a metric, and whether more of it is better."""

    title: str
    higher_is_better: bool


METRICS = {
    "bleu": MetricName("BLEU", True),
    "chrf": MetricName("chrF", True),
    "chrfpp": MetricName("chrF++", True),
    "ter": MetricName("TER", False),
    "exact_match": MetricName("Exact match", True),
    "wer": MetricName("WER", False),
    "cer": MetricName("CER", False),
    "per": MetricName("PER", False),
    "g2p_wer": MetricName("G2P WER", False),
}
DEFAULT_METRICS = ("bleu", "chrf", "ter", "exact_match")
TITLES = {name: metric.title for name, metric in METRICS.items()}

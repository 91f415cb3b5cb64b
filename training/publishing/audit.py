"""Checks a model card before publishing: the Hub must be able to read it, and metrics.json must contain its figures."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..errors import UserError, message_of
from ..metric_names import TITLES
from ..metrics import numbers


# Sections whose figures were measured or counted. The figures about the network come from its configuration.
MEASURED = ("Data", "Results", "Training")
# Fields of metrics.json, besides the scores, that these sections quote.
COUNTED = ("num_beams", "data_name", "rows", "training", "corpora", "confidence", "groups")
# A number that is not part of a name, such as Multi30k.
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)


class CardError(UserError):
    """A model card that the Hub cannot read, or with a figure that is not in the run's metrics.json."""


def read_card(path: str | Path, metrics: dict[str, Any]) -> ModelCard:
    """
    Reads and checks a model card.

    Args:
        path: the card that a run has written. It may have been edited since.
        metrics: the run's metrics.json.

    Raises:
        CardError: the Hub cannot read the metadata; or the number of parameters, or a figure in the metadata or in
            the sections Data, Results and Training, is not in `metrics`.
    """
    try:
        # huggingface_hub's own parser. It raises ValueError for a broken model-index.
        card = ModelCard.load(path)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise CardError(f"the metadata of {path} cannot be read: {message_of(error)}") from error
    if not card.data.get("eval_results"):
        raise CardError(f"{path} has no model-index with the model's scores in its metadata")
    if claims := list(unfounded(card, metrics)):
        raise CardError(f"{path} has figures that are not in metrics.json: {', '.join(claims)}")
    return card


def unfounded(card: ModelCard, metrics: dict[str, Any]) -> Iterator[str]:
    """Yields a description of each figure in a card that is not in its metrics.json."""
    scores = metrics["scores"]
    known = _figures([numbers(scores), *(metrics.get(name) for name in COUNTED)])
    for result in card.data.get("eval_results"):
        name, value, signature = result.metric_type, result.metric_value, result.metric_config
        if name not in scores or value != round(scores[name], 2) or signature != scores.get(f"{name}_signature"):
            yield f"{name} {value} ({signature or 'no signature'}) in model-index"
    for section in MEASURED:
        text = _section(card.text, section)
        for cells in (re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")):
            for name, title in TITLES.items():
                if cells[1].strip() == title and cells[2:4] != _table_cells(name, scores):
                    yield f"{title} {' '.join(cell.strip() for cell in cells[2:4])} in the section {section}"
        for number in NUMBER.findall(CODE.sub(" ", text)):
            if number not in known:
                yield f"{number} in the section {section}"
    for number in re.findall(r"([\d,.]+) parameters", card.text):
        if number != f"{metrics.get('parameters', 0):,}":
            yield f"{number} parameters"


def _section(text: str, title: str) -> str:
    """The text under a second-level heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return found.group(1) if found else ""


def _table_cells(name: str, scores: dict[str, Any]) -> list[str]:
    """Score and signature, as the template writes them in the table of results."""
    if name not in scores:
        return []
    signature = scores.get(f"{name}_signature", "").replace("|", "\\|")
    return [f" {scores[name]:.2f} ", f" `{signature}` " if signature else "  "]


def _figures(value: Any) -> set[str]:
    """Every number in a part of metrics.json, in each of the template's formats."""
    if isinstance(value, dict | list):
        # Names too: a group may be called by a year.
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return set().union(*map(_figures, parts))
    if isinstance(value, int | float):
        return {f"{value:,}", f"{value:.1f}", f"{value:.2f}"}
    return set(NUMBER.findall(str(value)))

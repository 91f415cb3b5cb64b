"""Checks a model card before it is published: that the Hub can read it, and that the run measured what it claims."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..errors import UserError
from ..metrics import TITLES, numbers


# Sections of a card whose figures were measured or counted. Those of the network are its configuration.
MEASURED = ("Data", "Results", "Training")
# Fields of a metrics.json, besides its scores, that these sections quote.
COUNTED = ("num_beams", "data_name", "rows", "training")
# A number that is not part of a name, such as Multi30k.
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)


class CardError(UserError):
    """A model card that the Hub does not understand, or that claims what the run has not measured."""


def read_card(path: str | Path, metrics: dict[str, Any]) -> ModelCard:
    """
    Reads a model card, and checks it.

    Args:
        path: the card, as a run writes it or as somebody has edited it since.
        metrics: the run's metrics.json.

    Raises:
        CardError: its metadata is not what the Hub reads, or a figure of its metadata, of its number of parameters, or
            of its sections Data, Results and Training is not in `metrics`.
    """
    try:
        # huggingface_hub's own parser, which tells of a broken model-index by a ValueError.
        card = ModelCard.load(path)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise CardError(f"the metadata of {path} cannot be read: {' '.join(str(error).split())}") from error
    if not card.data.get("eval_results"):
        raise CardError(f"{path} has no model-index in its metadata, which says what the model scored")
    if claims := list(unfounded(card, metrics)):
        raise CardError(f"{path} claims what metrics.json does not hold: {', '.join(claims)}")
    return card


def unfounded(card: ModelCard, metrics: dict[str, Any]) -> Iterator[str]:
    """Yields each claim of a card that its metrics.json does not hold, in words."""
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
    """The text under a heading of the second level."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return found.group(1) if found else ""


def _table_cells(name: str, scores: dict[str, Any]) -> list[str]:
    """Score and signature as the template writes them into the table of results."""
    if name not in scores:
        return []
    signature = scores.get(f"{name}_signature", "").replace("|", "\\|")
    return [f" {scores[name]:.2f} ", f" `{signature}` " if signature else "  "]


def _figures(value: Any) -> set[str]:
    """Every number in a part of a metrics.json, written as the template writes numbers."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return set().union(*map(_figures, parts))
    if isinstance(value, int | float):
        return {f"{value:,}", f"{value:.1f}", f"{value:.2f}"}
    return set(NUMBER.findall(str(value)))

"""Draws PNG files: the loss curve of a run, and the alignment of a translation to its source."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import beside
from ..metric_names import TITLES


def draw_loss_curve(log_history: list[dict[str, Any]], metric: str, path: str | Path) -> None:
    """
    Draws training loss, validation loss, and the metric that chose the best checkpoint, over updates.

    Args:
        log_history: `trainer.state.log_history`.
        metric: name of the metric, e.g. "bleu".
        path: the PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses = figure.subplots()
    for key, label in (("loss", "training (smoothed)"), ("eval_loss", "validation")):
        entries = [entry for entry in log_history if key in entry]
        marker = "o" if key == "eval_loss" else None
        losses.plot([e["step"] for e in entries], [e[key] for e in entries], label=label, marker=marker, markersize=3)
    losses.set(xlabel="updates", ylabel="loss (nats per target token)", ylim=(0, None))
    losses.grid(alpha=0.3)
    scored = [entry for entry in log_history if f"eval_{metric}" in entry]
    if scored:
        scores = losses.twinx()
        name = TITLES.get(metric, metric)
        steps = [entry["step"] for entry in scored]
        scores.plot(steps, [entry[f"eval_{metric}"] for entry in scored], color="tab:green", label=f"validation {name}")
        scores.set(ylabel=name, ylim=(0, 100 if metric == "exact_match" else None))
    figure.legend(loc="outside upper center", ncols=3)
    _save(figure, path)


def draw_alignment(
    weights: torch.Tensor, source_tokens: Sequence[str], target_tokens: Sequence[str], path: str | Path
) -> None:
    """
    Draws the attention that aligns one translation to its source: darker cells have larger weights.

    Args:
        weights: one sentence's `align().weights`, without padding, `[T, S]`.
        source_tokens: S labels for the columns.
        target_tokens: T labels for the rows.
        path: the PNG file to write.

    Raises:
        ValueError: the numbers of labels differ from the shape of the weights.
    """
    if tuple(weights.shape) != (len(target_tokens), len(source_tokens)):
        raise ValueError(
            f"weights has shape {list(weights.shape)}, but there are {len(target_tokens)} target and "
            f"{len(source_tokens)} source tokens: remove the padding, and give one label for each remaining token"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = weights.shape
    figure = Figure(figsize=(3 + 0.4 * columns, 2 + 0.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(weights.float().cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
    # matplotlib would otherwise read a dollar sign in a token as the start of a formula.
    axes.set_xticks(
        range(columns), list(source_tokens), rotation=60, ha="left", rotation_mode="anchor", parse_math=False
    )
    axes.set_yticks(range(rows), list(target_tokens), parse_math=False)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set(xlabel="source", ylabel="target")
    figure.colorbar(image, label="attention", shrink=0.8)
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    with beside(path) as part:
        figure.savefig(part, format="png", dpi=120)

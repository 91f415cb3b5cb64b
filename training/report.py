"""What a run leaves for people: its scores, its loss curve, and its model card; and the picture of an alignment."""

import os
import platform
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import torch
from babel import Locale, UnknownLocaleError
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel


METRICS = {"bleu": "BLEU", "chrf": "chrF", "ter": "TER", "exact_match": "Exact match"}


def write_beside(path: str | Path, text: str) -> None:
    """Writes a file so that a crash, or a loss of power, leaves either the old one or the new one, whole."""
    beside = Path(f"{path}.part")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        to_disk(file)
    os.replace(beside, path)


def to_disk(file: IO) -> None:
    """Returns when what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def machine() -> str:
    """The hardware in words: the GPU's name, or the processor and its threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''} ({platform.machine()})"


def language_name(code: str) -> str:
    """The English name of a language, or its code where the CLDR has none."""
    try:
        return Locale.parse(code, sep="-" if "-" in code else "_").english_name or code
    except (ValueError, UnknownLocaleError):
        return code


def draw_loss_curve(log_history: list[dict[str, Any]], metric: str, path: str | Path) -> None:
    """
    Draws training and validation loss, and the metric that chose the best checkpoint, over updates, as a PNG.

    Args:
        log_history: `trainer.state.log_history`.
        metric: name of the metric, e.g. "bleu".
        path: the picture to write.
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
        name = METRICS.get(metric, metric)
        steps = [entry["step"] for entry in scored]
        scores.plot(steps, [entry[f"eval_{metric}"] for entry in scored], color="tab:green", label=f"validation {name}")
        scores.set(ylabel=name, ylim=(0, 100 if metric == "exact_match" else None))
    figure.legend(loc="outside upper center", ncols=3)
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    figure.savefig(f"{path}.part", format="png", dpi=120)
    os.replace(f"{path}.part", path)


def draw_alignment(
    weights: torch.Tensor, source_tokens: Sequence[str], target_tokens: Sequence[str], path: str | Path
) -> None:
    """
    Draws the attention that aligned one translation to its source, darker where it is larger, as a PNG.

    Args:
        weights: one sentence's `align().weights`, without padding, `[T, S]`.
        source_tokens: S labels for the columns.
        target_tokens: T labels for the rows.
        path: the picture to write.

    Raises:
        ValueError: the numbers of labels are not those of the weights.
    """
    if tuple(weights.shape) != (len(target_tokens), len(source_tokens)):
        raise ValueError(
            f"weights has shape {list(weights.shape)}, but there are {len(target_tokens)} target and "
            f"{len(source_tokens)} source tokens: cut the padding off, and give a label for each token that is left"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = weights.shape
    figure = Figure(figsize=(3 + 0.4 * columns, 2 + 0.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(weights.float().cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
    # A dollar in a token is a dollar, not the beginning of a formula.
    axes.set_xticks(
        range(columns), list(source_tokens), rotation=60, ha="left", rotation_mode="anchor", parse_math=False
    )
    axes.set_yticks(range(rows), list(target_tokens), parse_math=False)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set(xlabel="source", ylabel="target")
    figure.colorbar(image, label="attention", shrink=0.8)
    _save(figure, path)


def model_card(
    model: PreTrainedModel,
    languages: tuple[str | None, str | None],
    data_name: str,
    metrics: dict[str, Any],
    recipe: str,
    model_path: str,
) -> ModelCard:
    """
    Fills the template in model_cards/ from a run.

    Args:
        model: the trained model.
        languages: codes of source and target, if the run knows them.
        data_name: what it was trained on.
        metrics: the run's metrics.json; the card claims no figure that is not in it.
        recipe: the resolved recipe as YAML.
        model_path: what to pass to `from_pretrained`.
    """
    scores = metrics["scores"]
    results = [
        {"type": name, "name": title, "value": scores[name], "signature": scores.get(f"{name}_signature")}
        for name, title in METRICS.items()
        if name in scores
    ]
    name = Path(model_path).name
    card_data = ModelCardData(
        language=[language for language in languages if language] or None,
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="translation" if all(languages) else "text2text-generation",
        tags=["vanilla_transformer", "translation" if all(languages) else "text2text-generation"],
        datasets=[data_name] if "/" in data_name and not Path(data_name).exists() else None,
        metrics=[result["type"] for result in results],
        model_name=name,
        eval_results=[_eval_result(result, data_name, metrics["scored_split"]) for result in results],
    )
    return ModelCard.from_template(
        card_data,
        template_str=(files("vanilla_transformer.model_cards") / "template.md").read_text(encoding="utf-8"),
        title=name,
        config=model.config,
        parameters=model.num_parameters(),
        languages=[language_name(code) for code in languages if code] if all(languages) else None,
        data_name=data_name,
        results=results,
        recipe=recipe,
        model_path=model_path,
        num_beams=model.generation_config.num_beams,
        **metrics,
    )


def _eval_result(result: dict[str, Any], data_name: str, split: str) -> EvalResult:
    return EvalResult(
        task_type="translation",
        dataset_type=data_name,
        dataset_name=data_name,
        dataset_split=split,
        metric_type=result["type"],
        metric_name=result["name"],
        metric_value=round(result["value"], 2),
        metric_config=result["signature"],
    )

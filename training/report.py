"""What a run leaves for people (scores, loss curve, model card, pictures), and how programs write files and folders."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from babel import Locale, UnknownLocaleError
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .errors import UserError


METRICS = {"bleu": "BLEU", "chrf": "chrF", "ter": "TER", "exact_match": "Exact match"}

# Sections of a card whose figures were measured or counted; those of the network are its configuration.
MEASURED = ("Data", "Results", "Training")
# What of a metrics.json they tell, beside its scores.
COUNTED = ("num_beams", "data_name", "rows", "training")
# Not part of a name, such as Multi30k.
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)


class CardError(UserError):
    """A model card that the Hub does not understand, or that claims what the run has not measured."""


def write_beside(path: str | Path, text: str) -> None:
    """Writes a file so that a crash, or a loss of power, leaves either the old one or the new one, whole."""
    beside = Path(f"{path}.part")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        to_disk(file)
    os.replace(beside, path)


def make_sure_of_folder(option: str, path: str | Path) -> None:
    """
    Looks, before any work is done, whether there can be a folder to write into. Makes none.

    Raises:
        UserError: there cannot. The message names the option.
    """
    with refusing(option, path):
        str(path).encode()  # tokenizers would fail
        there = next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=there):
            pass


def make_sure_of_file(option: str, path: str | Path) -> None:
    """
    Looks, before any work is done, whether `write_beside` can write this file. What is there stays.

    Raises:
        UserError: it cannot. The message names the option.
    """
    path = Path(path)
    with refusing(option, path):
        if path.exists() and not path.is_file():
            raise UserError(f"{option}={path} is no file, and cannot be replaced by one")
        if not path.parent.is_dir():
            raise UserError(f"{option}={path}: there is no folder {path.parent}")
        with tempfile.NamedTemporaryFile(prefix=f"{path.name}.part", dir=path.parent):
            pass


@contextmanager
def new_folder(option: str, path: str | Path) -> Iterator[Path]:
    """
    Makes a folder to write into inside the `with`, which then gets the name `path`: that is whole or not there.

    Raises:
        UserError: `path` exists, or no folder can be made there. The message names the option.
    """
    beside = Path(f"{path}.part")
    with refusing(option, path):
        str(path).encode()  # tokenizers would fail
        if os.path.lexists(path):
            raise UserError(f"{option}={path} exists: choose another, or delete it first")
        shutil.rmtree(beside, ignore_errors=True)  # of a program that was killed
        beside.mkdir(parents=True)
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


@contextmanager
def refusing(option: str, path: str | Path, kind: type[UserError] = UserError) -> Iterator[None]:
    """
    Turns the file system's refusal to write into words.

    Raises:
        UserError: of that kind. The message names the option.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{option}={path} cannot be written into: {error.strerror}") from error
    except UnicodeEncodeError as error:
        raise kind(f"{option}={path} cannot be written into: its name is not UTF-8") from error


def to_disk(file: IO) -> None:
    """Returns when what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


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
    metrics: dict[str, Any],
    recipe: str,
    model_path: str,
    hub_model_id: str | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """
    Fills the template in model_cards/ from a run.

    Args:
        model: the trained model.
        languages: codes of source and target, if the run knows them.
        metrics: the run's metrics.json; the card claims no figure that is not in it.
        recipe: the resolved recipe as YAML.
        model_path: what to pass to `from_pretrained`.
        hub_model_id: the model's name on the Hub, as far as it is known. Pushing writes the true one.
        base_model: the folder or Hub name of the model that the run began with, if it did not begin from scratch.
    """
    scores, data_name = metrics["scores"], metrics["data_name"]
    results = [
        {"type": name, "name": title, "value": scores[name], "signature": scores.get(f"{name}_signature")}
        for name, title in METRICS.items()
        if name in scores
    ]
    name = Path(model_path).name
    codes = [code for code in languages if code]
    card_data = ModelCardData(
        # The Hub knows languages by their ISO 639 codes, and leaves regions and scripts to the other field.
        language=[re.split("[-_]", code)[0].lower() for code in codes] or None,
        language_bcp47=[code.replace("_", "-") for code in codes] if any(re.search("[-_]", c) for c in codes) else None,
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="translation" if all(languages) else "text2text-generation",
        tags=["vanilla_transformer", "translation" if all(languages) else "text2text-generation"],
        # A folder is named by its last part; a model of the Hub has its owner's name before it.
        base_model=base_model if base_model and "/" in base_model and not Path(base_model).exists() else None,
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
        languages=[language_name(code) for code in codes] if all(languages) else None,
        results=results,
        recipe=recipe,
        model_path=model_path,
        hub_model_id=hub_model_id or f"NAME/{name}",
        base_model=base_model,
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
    """What a card claims and its metrics.json does not hold, in words."""
    scores = metrics["scores"]
    measured = [value for value in scores.values() if not isinstance(value, str)]
    known = _figures([measured, *(metrics.get(name) for name in COUNTED)])
    for result in card.data.get("eval_results"):
        name, value, signature = result.metric_type, result.metric_value, result.metric_config
        if name not in scores or value != round(scores[name], 2) or signature != scores.get(f"{name}_signature"):
            yield f"{name} {value} ({signature or 'no signature'}) in model-index"
    for section in MEASURED:
        text = _section(card.text, section)
        for cells in (re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")):
            for name, title in METRICS.items():
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

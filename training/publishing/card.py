"""The model card of a run: the template in model_cards/, filled from its metrics.json, recipe and configuration."""

import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from babel import Locale, UnknownLocaleError
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..metric_names import TITLES


def language_name(code: str) -> str:
    """The English name of a language; its code if the CLDR has no name for it."""
    try:
        return Locale.parse(code, sep="-" if "-" in code else "_").english_name or code
    except (ValueError, UnknownLocaleError):
        return code


def model_card(
    model: PreTrainedModel,
    languages: tuple[str | None, str | None] | tuple[list[str], list[str]],
    metrics: dict[str, Any],
    recipe: str,
    model_path: str,
    hub_model_id: str | None = None,
    base_model: str | None = None,
    tokens: str = "subwords",
) -> ModelCard:
    """
    Fills the template in model_cards/ from a run.

    Args:
        model: the trained model.
        languages: codes of source and target; None where the recipe does not name one. For a model of several
            directions, the source languages and the target languages.
        metrics: the run's metrics.json, the source of all measured figures.
        recipe: the resolved recipe as YAML.
        model_path: what to pass to `from_pretrained`.
        hub_model_id: the model's name on the Hub, if it is known. A push writes the final name.
        base_model: the folder or Hub name of the model that the run trained further, if any.
        tokens: what the tokens of the vocabulary are.
    """
    scores, data_name = metrics["scores"], metrics["data_name"]
    results = [
        {"type": name, "name": title, "value": scores[name], "signature": scores.get(f"{name}_signature")}
        for name, title in TITLES.items()
        if name in scores
    ]
    name, task = Path(model_path).name, "translation" if all(languages) else "text2text-generation"
    sides = [side if isinstance(side, list) else [side] for side in languages if side]
    language, language_bcp47 = _codes(code for side in sides for code in side)
    card_data = ModelCardData(
        language=language,
        language_bcp47=language_bcp47,
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag=task,
        tags=["vanilla_transformer", task],
        base_model=base_model if _is_on_hub(base_model) else None,
        datasets=[data_name] if _is_on_hub(data_name) else None,
        metrics=[result["type"] for result in results],
        model_name=name,
        eval_results=[_eval_result(result, data_name, metrics["scored_split"]) for result in results],
    )
    return ModelCard.from_template(
        card_data,
        template_str=(files("vanilla_transformer.model_cards") / "template.md").read_text(encoding="utf-8"),
        title=name,
        config=model.config,
        languages=[", ".join(map(language_name, side)) for side in sides] if all(languages) else None,
        results=results,
        recipe=recipe,
        model_path=model_path,
        hub_model_id=hub_model_id or f"NAME/{name}",
        base_model=base_model,
        tokens=tokens,
        **metrics,
    )


def _is_on_hub(name: str | None) -> bool:
    """Whether a name is one of the Hub's, OWNER/NAME, and not a local folder."""
    return name is not None and "/" in name and not Path(name).exists()


def _codes(languages: Iterable[str]) -> tuple[list[str] | None, list[str] | None]:
    """The card's `language`, which takes ISO 639 codes, and its `language_bcp47`, which takes regions and scripts."""
    codes = list(dict.fromkeys(languages))
    whole = [code.replace("_", "-") for code in codes] if any(re.search("[-_]", code) for code in codes) else None
    return [re.split("[-_]", code)[0].lower() for code in codes] or None, whole


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

"""What a recipe says about its training corpora: `corpora`, `stages`, `transforms` and `mixing_temperature`.

A corpus is a set of fields of DataArguments. A field that it does not set has the value of the recipe's field of the
same name. So every function that reads or filters one corpus takes `Corpus.data` as it takes a recipe's own fields.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple, NoReturn

from ..errors import RecipeError, UserError
from .arguments import DataArguments, MixtureArguments, TrainingArguments
from .options import OptionParser
from .rules import check_data, check_stream


# Fields of DataArguments that a corpus may set for itself.
CORPUS_FIELDS = (
    *("train_file", "dataset", "dataset_config", "data_dir", "max_train_samples", "phrasebook_size"),
    *("source_lang", "target_lang", "source_lang_column", "target_lang_column", "source_column", "target_column"),
    *("max_source_length", "max_target_length", "max_length_ratio"),
    *("drop_duplicates", "drop_identical", "drop_bad_encoding", "identify_languages"),
)
# Fields that say where a corpus is. A run may be resumed with others: its data is compared by content.
PLACES = ("train_file", "dataset", "data_dir")
# Transforms whose only option is their rate, in the order in which they are applied.
NOISE = (
    *("lowercase", "uppercase", "titlecase", "strip_diacritics"),
    *("typos", "merge_words", "split_words", "drop_final_punctuation"),
)
# Transforms that put text before the source -> the option that says which.
PREFIXES = {"prefix": "column", "tag": "text"}
TRANSFORMS = (*NOISE, *PREFIXES)


class Transform(NamedTuple):
    """One transform of a corpus: the share of rows that it changes; for `prefix` the column, for `tag` the text."""

    name: str
    rate: float
    text: str | None = None


class Corpus(NamedTuple):
    """
    One training corpus.

    Args:
        name: its name in the recipe; "train" in a recipe without `corpora`.
        data: its own fields, and the recipe's for the rest.
        weight: its share of the rows, relative to the other corpora; None if the sizes decide.
        transforms: in the order in which they are applied.
    """

    name: str
    data: DataArguments
    weight: float | None = None
    transforms: tuple[Transform, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns, besides source and target, that its transforms need."""
        return tuple(dict.fromkeys(t.text for t in self.transforms if t.name == "prefix" and t.text))

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that its transforms put before the source."""
        return tuple(dict.fromkeys(t.text for t in self.transforms if t.name == "tag" and t.text))


def several_directions(corpora: Iterable[Corpus]) -> bool:
    """Whether the corpora have more than one direction of translation, as far as they name theirs."""
    named = {corpus.data.direction for corpus in corpora if corpus.data.direction[1]}
    return len(named) > 1 or any(corpus.data.names_languages for corpus in corpora)


@contextmanager
def naming(corpus: Corpus) -> Iterator[None]:
    """Puts the name of a corpus before the messages of its errors."""
    try:
        yield
    except UserError as error:
        # In a recipe without `corpora`, they begin with "train" as it is.
        raise type(error)(f"corpora: {corpus.name}: {error}" if corpus.name != "train" else str(error)) from error


class Stage(NamedTuple):
    """
    A part of the run with a mixture of its own.

    Args:
        weights: corpora by name, and their weights; None for the weights (or sizes) of `corpora`.
        until: "steps" (updates of the run), "epochs" (of the stage), "stalls" (evaluations without a better score), or
            None for the end of the run.
        number: how many of these.
    """

    weights: dict[str, float] | None = None
    until: str | None = None
    number: int = 0


UNTIL = ("steps", "epochs", "stalls")


def read_corpora(data: DataArguments, mixture: MixtureArguments) -> list[Corpus]:
    """
    The training corpora of a recipe; one, called "train", if it has no `corpora`.

    Raises:
        RecipeError: a corpus is described wrongly. The message begins with its name.
    """
    if mixture.corpora is None:
        if mixture.mixing_temperature != 1:
            raise RecipeError(f"mixing_temperature={mixture.mixing_temperature:g} is for corpora, but there are none")
        return [Corpus("train", data, None, _read_transforms("transforms", mixture.transforms or {}))]
    if not mixture.corpora:
        raise RecipeError("corpora: there is none: give at least one, as `name: {train_file: ...}`")
    if data.train_file:
        raise RecipeError("train_file and corpora are both given: make the file one of the corpora")
    parser = OptionParser((DataArguments,))
    corpora = [_read_corpus(name, fields, data, mixture, parser) for name, fields in mixture.corpora.items()]
    without = [corpus.name for corpus in corpora if corpus.weight is None]
    if 0 < len(without) < len(corpora):
        raise RecipeError(f"corpora: {without[0]} has no weight, but others have: give each a weight, or none of them")
    if mixture.mixing_temperature != 1 and not without:
        raise RecipeError(
            f"mixing_temperature={mixture.mixing_temperature:g} derives the weights from the corpora's sizes, but they "
            "have weights: leave out the one or the other"
        )
    for corpus in corpora if several_directions(corpora) else ():
        if not (corpus.data.names_languages or all(corpus.data.direction)):
            raise RecipeError(
                f"corpora: {corpus.name}: the corpora have several directions, but this one does not name its own: set "
                "source_lang and target_lang"
            )
    return corpora


def _read_corpus(
    name: str, fields: Any, data: DataArguments, mixture: MixtureArguments, parser: OptionParser
) -> Corpus:
    place = f"corpora: {name}"
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{place}: must hold lines of the form `field: value`, not {fields!r}")
    given = dict(fields)
    weight = _weight(f"{place}: weight", given.pop("weight")) if "weight" in given else None
    transforms = _read_transforms(f"{place}: transforms", given.pop("transforms", mixture.transforms) or {})
    for field in given:
        if field not in CORPUS_FIELDS:
            _unknown(f"{place} sets the unknown field {field!r}", field, [*CORPUS_FIELDS, "weight", "transforms"])
    if not (given.get("train_file") or given.get("dataset")):
        raise RecipeError(f"{place}: no data: give it a train_file or a dataset")
    others = dict.fromkeys(("train_file", "dataset", "dataset_config", "validation_file", "test_file"))
    # A language of its own stands for all rows, whatever the columns of the recipe's other files.
    others |= {f"{field}_column": None for field in ("source_lang", "target_lang") if field in given}
    try:
        own = {field: parser.typed(field, value) for field, value in given.items()}
        corpus = dataclasses.replace(data, **others | own)
        check_data(corpus)
    except UserError as error:
        raise RecipeError(f"{place}: {error}") from error
    return Corpus(name, corpus, weight, transforms)


def _read_transforms(place: str, found: Any) -> tuple[Transform, ...]:
    """The transforms of a corpus, in the order of TRANSFORMS."""
    if not isinstance(found, Mapping):
        raise RecipeError(f"{place}: must hold lines of the form `uppercase: 0.05` or `tag: <bt>`, not {found!r}")
    for name in found:
        if name not in TRANSFORMS:
            _unknown(f"{place}: {name!r} is unknown", name, TRANSFORMS)
    return tuple(_read_transform(f"{place}: {name}", name, found[name]) for name in TRANSFORMS if name in found)


def _read_transform(place: str, name: str, value: Any) -> Transform:
    option = PREFIXES.get(name)
    options = value if isinstance(value, Mapping) else {option or "rate": value}
    for found in options:
        if found not in (option, "rate"):
            _unknown(f"{place}: {found!r} is unknown", found, [name for name in (option, "rate") if name])
    if "rate" not in options and option is None:
        raise RecipeError(f"{place}: no rate: give the share of rows to change, for example 0.05")
    rate = _number(f"{place}: rate", options.get("rate", 1))
    if not 0 < rate <= 1:
        raise RecipeError(f"{place}: rate={rate:g} must be above 0, and at most 1: it is the share of rows to change")
    if option is None:
        return Transform(name, rate)
    text = options.get(option)
    if not str("" if text is None else text).strip():
        raise RecipeError(f"{place}: no {option}: write it as `{name}: {'domain' if name == 'prefix' else '<bt>'}`")
    return Transform(name, rate, str(text).strip())


def read_stages(mixture: MixtureArguments, corpora: list[Corpus], training: TrainingArguments) -> list[Stage]:
    """
    The stages of a run, in order; one without an end if the recipe has no `stages`.

    Raises:
        RecipeError: a stage is described wrongly, names an unknown corpus, or never begins.
    """
    streaming = corpora[0].data.streaming
    if mixture.stages is None:
        if streaming and len(corpora) > 1 and corpora[0].weight is None:
            raise RecipeError(
                f"corpora: {corpora[0].name} has no weight, and the sizes of streamed corpora are unknown: give each "
                "corpus a weight"
            )
        return [Stage()]
    if mixture.corpora is None:
        raise RecipeError("stages mix corpora, but this recipe has none: name them under corpora")
    if weighted := [corpus.name for corpus in corpora if corpus.weight is not None]:
        raise RecipeError(
            f"corpora: {weighted[0]} has a weight, but the stages have weights of their own: leave it out there"
        )
    if training.max_steps <= 0:
        raise RecipeError("stages need max_steps, the number of updates of the whole run: set it")
    stages = [_read_stage(number, stage, corpora) for number, stage in enumerate(mixture.stages, 1)]
    for name in (corpus.name for corpus in corpora):
        if not any(name in (stage.weights or ()) for stage in stages):
            raise RecipeError(f"corpora: {name} is in no stage: name it in one, or leave it out")
    _check_ends(stages, training)
    for number, stage in enumerate(stages, 1):
        if streaming and stage.until == "epochs":
            raise RecipeError(f"stages: stage {number}: a stream has no epochs: let it last until steps or stalls")
    return stages


def _check_score(number: int, training: TrainingArguments) -> None:
    """Refuses a stage that waits for a score that the run does not compute."""
    waits = f"stages: stage {number} never ends: it waits until the score stalls, but"
    if training.eval_strategy == "no":
        raise RecipeError(f"{waits} eval_strategy=no computes none: set it to steps or epoch")
    metric = training.deciding_metric
    if metric not in ("loss", "perplexity") and not training.predict_with_generate:
        raise RecipeError(
            f"{waits} metric_for_best_model={metric} needs translations: set predict_with_generate to true, or "
            "metric_for_best_model to loss"
        )


def check_corpora(corpora: list[Corpus], training: TrainingArguments) -> None:
    """
    Checks the fields of each corpus that is streamed.

    Raises:
        RecipeError: streaming excludes a field's value. The message begins with the corpus's name.
    """
    for corpus in corpora:
        with naming(corpus):
            if corpus.data.streaming:
                check_stream(corpus.data, training)


def _read_stage(number: int, found: Any, corpora: list[Corpus]) -> Stage:
    place = f"stages: stage {number}"
    if not isinstance(found, Mapping):
        raise RecipeError(f"{place}: must hold weights and until, not {found!r}")
    for field in found:
        if field not in ("weights", "until"):
            _unknown(f"{place} sets the unknown field {field!r}", field, ["weights", "until"])
    weights = found.get("weights")
    if not isinstance(weights, Mapping) or not weights:
        right = f"weights: {{{corpora[0].name}: 1}}"
        raise RecipeError(f"{place}: weights must name corpora, as `{right}`, not {weights!r}")
    names = [corpus.name for corpus in corpora]
    for name in weights:
        if name not in names:
            _unknown(f"{place}: there is no corpus {name!r}", name, names)
    numbers = {name: _weight(f"{place}: weight of {name}", weight) for name, weight in weights.items()}
    return Stage(numbers, *_read_until(place, found.get("until")))


def _read_until(place: str, until: Any) -> tuple[str | None, int]:
    if until is None:
        return None, 0
    if not isinstance(until, Mapping) or len(until) != 1 or next(iter(until)) not in UNTIL:
        listed = ", ".join(f"{{{kind}: {number}}}" for kind, number in zip(UNTIL, (5000, 2, 3), strict=True))
        raise RecipeError(f"{place}: until must be one of {listed}, not {until!r}")
    ((kind, value),) = until.items()
    number = _number(f"{place}: until {kind}", value)
    if number < 1 or number != int(number):
        raise RecipeError(f"{place}: until {kind}={value} must be a whole number from 1 on")
    return kind, int(number)


def _check_ends(stages: list[Stage], training: TrainingArguments) -> None:
    """Refuses a stage that can never begin, or can never end."""
    last = 0
    for number, stage in enumerate(stages, 1):
        if stage.until is None and number < len(stages):
            raise RecipeError(f"stages: stage {number + 1} never begins: stage {number} has no end (until)")
        if stage.until == "steps":
            if stage.number <= last:
                raise RecipeError(
                    f"stages: stage {number} never begins: it lasts until update {stage.number}, but an earlier one "
                    f"until {last} (updates are counted from the start of the run)"
                )
            last = stage.number
            if last >= training.max_steps and number < len(stages):
                raise RecipeError(
                    f"stages: stage {number + 1} never begins: stage {number} lasts until update {last}, and the run "
                    f"ends at max_steps={training.max_steps}"
                )
        if stage.until == "stalls":
            _check_score(number, training)


def places_apart(corpora: Any) -> Any:
    """The value of `corpora` without the fields that say where a corpus is."""
    if not isinstance(corpora, Mapping):
        return corpora
    return {
        name: {field: value for field, value in fields.items() if field not in PLACES}
        for name, fields in corpora.items()
    }


def _number(place: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RecipeError(f"{place} must be a number, not {value!r}") from None


def _weight(place: str, value: Any) -> float:
    weight = _number(place, value)
    if not 0 < weight < math.inf:
        raise RecipeError(f"{place}={value} must be above 0: leave the corpus out instead")
    return weight


def _unknown(said: str, name: Any, known: Iterable[str]) -> NoReturn:
    known = list(known)
    likely = get_close_matches(str(name), known, n=1)
    raise RecipeError(f"{said}: " + (f"did you mean {likely[0]}?" if likely else f"choose one of {', '.join(known)}"))

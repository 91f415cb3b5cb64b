"""Reads options by the types of their fields: those of a YAML file as those of the command line, by one parser."""

import json
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections.abc import Container, Mapping, Sequence
from copy import copy
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..errors import RecipeError


class TextLoader(yaml.SafeLoader):
    """
    YAML whose scalars stay text, all but null: YAML itself takes the language `no` for false, and `1e-3` for text. A
    key that is given twice is an error, as the YAML specification has it.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Looks for keys that are given twice, where the stock loader takes the last."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """
    The fields of a YAML file, each as text, None, or a list or dict of such.

    Raises:
        RecipeError: it is not YAML, or no mapping.
    """
    try:
        # A subclass of yaml.SafeLoader.
        found = yaml.load(path.read_text(encoding="utf-8"), TextLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise RecipeError(f"{path} must hold lines of the form `field: value`, not {type(found).__name__}")
    return {str(name): value for name, value in found.items()}


def as_yaml(fields: dict[str, Any]) -> str:
    """The lines of a YAML file that `read_yaml` reads."""
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def true_or_false(text: str | bool) -> bool:
    """What transformers' parser takes for a truth, and YAML's on and off."""
    return string_to_bool({"on": True, "off": False}.get(str(text).lower(), text))


def truth_or_text(text: str) -> bool | str:
    """A truth where the text is true or false, else the text."""
    return text.lower() == "true" if text.lower() in ("true", "false") else text


def plain(value: Any) -> Any:
    """An option's value as people write it: a whole number without a point, and a choice by its name."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return getattr(value, "value", value)


class OptionFormatter(ArgumentDefaultsHelpFormatter):
    """argparse's own, with room for the long names of fields."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36)


class OptionParser(HfArgumentParser):
    """
    transformers' parser for the fields of dataclasses, for values from YAML too: whatever the place, the field's type
    says what a value means.

    Its help has a group of options for each dataclass. The fields that a dataclass inherits come last.

    Args:
        groups: the dataclasses.
        hidden: fields that neither the help nor the shell's completion shows.
        defaults: what the help gives as defaults of fields whose own default is None.
        options: of argparse.ArgumentParser.
    """

    def __init__(
        self,
        groups: Sequence[type],
        hidden: Container[str] = (),
        defaults: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ):
        super().__init__(groups, formatter_class=OptionFormatter, **options)
        self.register("type", string_to_bool, true_or_false)
        # `run_program` reads it.
        self.add_argument("--verbose", action="store_true", help="show the traceback of an error", default=SUPPRESS)
        self.defaults_told = defaults
        for action in self._actions:
            if action.dest in hidden:
                action.help = SUPPRESS
        #: The type of each field.
        self.hints = {
            option.name: hints[option.name]
            for group, hints in zip(groups, map(get_type_hints, groups), strict=True)
            for option in fields(group)
        }

    def format_help(self) -> str:
        """What `--help` prints."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [action for action in self._actions if not action.option_strings], [])
        formatter.add_text(self.description)
        sections: dict[tuple[str, str | None], list[Action]] = {
            ("arguments", None): [action for action in self._actions if action.dest not in self.hints]
        }
        by_name = {action.dest: action for action in reversed(self._actions)}
        inherited: list[Action] = []
        for group in self.dataclass_types:
            names = [option.name for option in fields(group)]
            own = [by_name[name] for name in names if name in group.__annotations__]
            title = group.__name__.removesuffix("Arguments").lower()
            sections[title, " ".join((group.__doc__ or "").split("\n\n")[0].split())] = own
            inherited += [by_name[name] for name in names if name not in group.__annotations__]
        if inherited:
            sections["transformers", "Fields of transformers' own Seq2SeqTrainingArguments."] = inherited
        for (title, about), actions in sections.items():
            formatter.start_section(title)
            formatter.add_text(about)
            formatter.add_arguments(map(self._shown, actions))
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _shown(self, action: Action) -> Action:
        """An option as the help shows it: one spelling, the kind of its value, and its default."""
        if not action.option_strings or action.nargs == 0:
            return action
        shown = copy(action)
        shown.option_strings = action.option_strings[:1]
        kinds: dict[Any, str] = {string_to_bool: "TRUE|FALSE", int: "INT", float: "FLOAT"}
        name = kinds.get(action.type, "TEXT")
        shown.metavar = None if action.choices else name
        default = self.defaults_told.get(action.dest) if action.default is None else plain(action.default)
        shown.default = SUPPRESS if default is None else default
        return shown

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            RecipeError: always; argparse itself would end the process.
        """
        raise RecipeError(message)

    def typed(self, name: str, value: Any) -> Any:
        """
        The value that a YAML file gives a field, as if it stood on the command line.

        Args:
            name: of the field.
            value: as `read_yaml` gives it.

        Raises:
            RecipeError: the field's type has no such value.
        """
        hint = self.hints[name]
        kinds = (hint, *get_args(hint))
        if value is None:
            if NoneType not in kinds:
                raise RecipeError(f"argument --{name}: null is no value of it: leave it out, for its default")
            return None
        if isinstance(value, list):
            if not any(get_origin(kind) is list for kind in kinds):
                raise RecipeError(f"argument --{name}: expected one value, not the list {value}")
            items = [self._parse(name, item) for item in value]
            return [part for item in items for part in (item if isinstance(item, list) else [item])]
        return self._parse(name, value)

    def _parse(self, name: str, value: Any) -> Any:
        """One value, not a list."""
        text = value if isinstance(value, str) else json.dumps(_numbers(value), default=str)
        return vars(self.parse_args([f"--{name}={text}"]))[name]


def _numbers(value: Any) -> Any:
    """A dict as JSON has it, for options without types of their own: what looks like a number, a truth or null is."""
    if isinstance(value, dict):
        return {str(name): _numbers(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    try:
        return json.loads(value)
    except (TypeError, ValueError):
        return value

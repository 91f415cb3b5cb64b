"""One parser for the options of YAML files and of the command line. It reads each by the type of its field."""

import json
import re
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections.abc import Container, Mapping, Sequence
from copy import copy
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..errors import RecipeError, message_of


class TextLoader(yaml.SafeLoader):
    """
    YAML whose scalars stay text, except null: plain YAML reads the language `no` as false, and `1e-3` as text. A
    repeated key is an error, as the YAML specification says.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses repeated keys. The stock loader takes the last."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise RecipeError(f"line {key.start_mark.line + 1}: the key {key.value} is given twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """
    The fields of a YAML file. Values are text, None, or lists or dicts of these.

    Raises:
        RecipeError: the file is not YAML, or not a mapping.
    """
    try:
        # A subclass of yaml.SafeLoader.
        found = yaml.load(path.read_text(encoding="utf-8"), TextLoader)
    except RecipeError as error:  # a repeated key
        raise RecipeError(f"{path}, {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{line}: this is not YAML ({error.problem})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {message_of(error)}") from error
    if not isinstance(found, dict):
        kind = {type(None): "nothing", list: "a list"}.get(type(found), "text alone")
        raise RecipeError(f"{path} must hold lines of the form `field: value`, not {kind}")
    return {str(name): value for name, value in found.items()}


def as_yaml(fields: dict[str, Any]) -> str:
    """The lines of a YAML file that `read_yaml` reads."""
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def true_or_false(text: str | bool) -> bool:
    """A boolean, as transformers' parser reads it, or YAML's on and off."""
    return string_to_bool({"on": True, "off": False}.get(str(text).lower(), text))


def truth_or_text(text: str) -> bool | str:
    """A boolean if the text is true or false, else the text."""
    return text.lower() == "true" if text.lower() in ("true", "false") else text


def mapping(text: str) -> dict[str, Any]:
    """A mapping, written as JSON."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(text)
    return found


def plain(value: Any) -> Any:
    """An option's value as people write it: whole numbers without a decimal point, enum members by their value."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return getattr(value, "value", value)


class OptionFormatter(ArgumentDefaultsHelpFormatter):
    """argparse's formatter, with room for long field names."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36)


class OptionParser(HfArgumentParser):
    """
    transformers' parser for the fields of dataclasses. It reads values from YAML too, by the same types.

    Its help shows a group of options for each dataclass. Inherited fields come last.

    Args:
        groups: the dataclasses.
        hidden: fields that help and shell completion leave out.
        defaults: defaults that the help shows for fields whose own default is None.
        options: arguments of argparse.ArgumentParser.
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
        self.shown_defaults = defaults
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
        """An option as the help shows it: one spelling, the type of its value, and its default."""
        if not action.option_strings or action.nargs == 0:
            return action
        shown = copy(action)
        shown.option_strings = action.option_strings[:1]
        kinds: dict[Any, str] = {string_to_bool: "TRUE|FALSE", int: "INT", float: "FLOAT"}
        name = kinds.get(action.type, "TEXT")
        shown.metavar = None if action.choices else name
        default = self.shown_defaults.get(action.dest) if action.default is None else plain(action.default)
        shown.default = SUPPRESS if default is None else default
        return shown

    def parse_args_into_dataclasses(self, args=None, **options):
        """As transformers' own. An unknown option ends in `error()`, where transformers raises a ValueError."""
        *parsed, unknown = super().parse_args_into_dataclasses(args, return_remaining_strings=True, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return tuple(parsed)

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            RecipeError: always; argparse itself would end the process.
        """
        unknown = re.match(r"unrecognized arguments: --(\w+)", message)
        likely = self.likely(unknown[1]) if unknown else None
        raise RecipeError(f"{message}: did you mean --{likely}?" if likely else message)

    def likely(self, name: str) -> str | None:
        """The field that a misspelt name probably means; None if no field is close."""
        return next(iter(get_close_matches(name, self.hints, n=1)), None)

    def typed(self, name: str, value: Any) -> Any:
        """
        Converts a value of a YAML file as if it were given on the command line.

        Args:
            name: the field.
            value: its value, from `read_yaml`.

        Raises:
            RecipeError: the value does not have the field's type. The message begins with `field NAME: `.
        """
        hint = self.hints[name]
        kinds = (hint, *get_args(hint))
        if value is None:
            if NoneType not in kinds:
                raise RecipeError(f"field {name}: it cannot be null: leave it out to get the default")
            return None
        if isinstance(value, list):
            if not any(get_origin(kind) is list for kind in kinds):
                raise RecipeError(f"field {name}: expected one value, not the list {value}")
            items = [self._parse(name, item) for item in value]
            return [part for item in items for part in (item if isinstance(item, list) else [item])]
        return self._parse(name, value)

    def _parse(self, name: str, value: Any) -> Any:
        """One value, not a list."""
        text = value if isinstance(value, str) else json.dumps(_numbers(value), default=str)
        try:
            return vars(self.parse_args([f"--{name}={text}"]))[name]
        except RecipeError as error:
            # argparse begins with all spellings of the option.
            raise RecipeError(re.sub(r"^argument \S+:", f"field {name}:", str(error))) from error


def _numbers(value: Any) -> Any:
    """Converts text in untyped dicts and lists to the number, boolean or null that it looks like, as JSON does."""
    if isinstance(value, dict):
        return {str(name): _numbers(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    try:
        return json.loads(value)
    except (TypeError, ValueError):
        return value

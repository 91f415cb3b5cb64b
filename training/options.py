"""Reads options by the types of their fields: those of a YAML file as those of the command line, by one parser."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool


class UserError(ValueError):
    """What the user of a program got wrong. The message says what was found and what would be right."""


class RecipeError(UserError):
    """A recipe or a command line that cannot be followed."""


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


class OptionParser(HfArgumentParser):
    """
    transformers' parser for the fields of dataclasses, for values from YAML too: whatever the place, the field's type
    says what a value means.

    Args:
        groups: the dataclasses.
        options: of argparse.ArgumentParser.
    """

    def __init__(self, groups: Sequence[type], **options: Any):
        super().__init__(groups, **options)
        self.register("type", string_to_bool, true_or_false)
        #: The type of each field.
        self.hints = {
            option.name: hints[option.name]
            for group, hints in zip(groups, map(get_type_hints, groups), strict=True)
            for option in fields(group)
        }

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

"""tests/seams.py lists exactly what we override or use privately, and each entry still exists as written."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pkgutil import resolve_name
from types import FunctionType

import pytest
from seams import ASSIGNED, OVERRIDDEN, REPLACED, USED
from test_imports import SOURCES


# Libraries that may change in a new version, Python's own argparse included.
THEIRS = (
    "accelerate", "argparse", "datasets", "evaluate", "huggingface_hub", "peft", "sacrebleu", "torch", "transformers",
)  # fmt: skip
# Documented, though named with an underscore: members of named tuples and of ctypes' structures.
DOCUMENTED = {"_asdict", "_fields", "_fields_", "_make", "_replace"}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
# What a torch.nn.Module and a torch.autograd.Function are made of.
INTERFACES = {"forward", "backward"}
ADVICE = "see tests/seams.py"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_theirs(module: str) -> bool:
    return module.partition(".")[0] in THEIRS


def our_classes() -> Iterator[tuple[type, list[type]]]:
    """Each of our top-level classes that derives from a library's classes, with these bases."""
    for module in (importlib.import_module(name) for name in SOURCES if not name.endswith("__main__")):
        for ours in [value for value in vars(module).values() if isinstance(value, type)]:
            bases = [base for base in ours.__mro__[1:] if is_theirs(base.__module__)]
            if ours.__module__ == module.__name__ and bases:
                yield ours, bases


def overrides() -> Iterator[tuple[type, str]]:
    """Each method or private attribute of a library's class that our class overrides, with the library's class."""
    for ours, bases in our_classes():
        for name in [name for name in vars(ours) if name in OUR_NAMES - INTERFACES and hasattr(bases[0], name)]:
            is_method = isinstance(vars(ours)[name], FunctionType | property | classmethod | staticmethod)
            if is_private(name) or (is_method and not name.startswith("__")):
                yield bases[0], name


def source_of(theirs: type) -> str:
    """The source of a class; empty for a class written in C++."""
    try:
        return inspect.getsource(theirs)
    except OSError:
        return ""


def shared_attributes() -> Iterator[str]:
    """Each private attribute of `self` that both our class and its bases use, on purpose or by accident."""
    for ours, bases in our_classes():
        theirs = "".join(map(source_of, bases))
        for name in sorted(set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(ours)))):
            if re.search(rf"\bself\.{name}\b", theirs):
                yield name


def our_names() -> set[str]:
    """The names that we define: functions, classes, variables, attributes of `self`."""
    found = set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


OUR_NAMES = our_names()


def private_uses() -> Iterator[str]:
    """Each private name of a library that our code reads or imports."""
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in OUR_NAMES | DOCUMENTED:
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not node.level and is_theirs(node.module or ""):
            in_private_module = any(map(is_private, (node.module or "").split(".")))
            yield from (alias.name for alias in node.names if in_private_module or is_private(alias.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            match node.args[1]:
                case ast.Constant(value=str(name)) if is_private(name):
                    yield name


def replacements() -> Iterator[str]:
    """Each attribute of a library that our code assigns to, as written in our code."""
    for tree in TREES.values():
        imported = {
            alias.asname or alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and is_theirs(node.module or ""))
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                written = ast.unparse(node)
                if written.partition(".")[0] in imported:
                    yield written


def shown(theirs: object, name: str) -> str:
    """A library's name with its parameters and their defaults, in the format of the list."""
    if (schema := getattr(getattr(theirs, "default", None), "_schema", None)) is not None:
        return f"{name}({str(schema).partition('(')[2].rpartition(') ->')[0]})"
    try:
        signature = inspect.signature(theirs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return name  # no function, or one without a signature
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return f"{name}{inspect.Signature(bare)}"


def name_of(entry: str) -> str:
    """The last word of an entry, without its signature."""
    return entry.partition("(")[0].rpartition(".")[2]


def the_same(found: set, listed: set) -> None:
    """Fails with the entries that are missing from the list, and with those that are superfluous."""
    lacks, left_over = sorted(map(str, found - listed)), sorted(map(str, listed - found))
    assert not lacks, f"in our sources, but not in tests/seams.py: {', '.join(lacks)}"
    assert not left_over, f"in tests/seams.py, but not in our sources: {', '.join(left_over)}"


def test_every_override_is_listed_and_none_else():
    """A base may be listed under any of its names; the class is compared."""
    listed = {(resolve_name(base), name_of(entry)) for base, entries in OVERRIDDEN.items() for entry in entries}
    the_same(set(overrides()), listed)


def test_every_private_use_is_listed_and_none_else():
    listed = {name_of(entry) for entry in USED} | {name for names in ASSIGNED.values() for name in names}
    overridden = {name_of(entry) for entries in OVERRIDDEN.values() for entry in entries}
    the_same({*private_uses(), *shared_attributes()} - overridden, listed)


def test_every_replacement_is_listed_and_none_else():
    the_same({written.rpartition(".")[2] for written in replacements()}, {name_of(entry) for entry in REPLACED})


@pytest.mark.parametrize(
    ("base", "entry"), [(base, entry) for base, entries in OVERRIDDEN.items() for entry in entries]
)
def test_what_is_overridden_exists_as_listed(base, entry):
    name = name_of(entry)
    assert hasattr(resolve_name(base), name), f"{base} has no {name} any more: {ADVICE}"
    assert shown(getattr(resolve_name(base), name), name) == entry, ADVICE


@pytest.mark.parametrize("entry", [*USED, *REPLACED])
def test_what_is_used_exists_as_listed(entry):
    path = entry.partition("(")[0]
    try:
        theirs = resolve_name(path)
    except AttributeError as error:
        pytest.fail(f"{error}: {ADVICE}")
    assert shown(theirs, path) == entry, ADVICE


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in ASSIGNED.items() for name in names])
def test_what_is_assigned_there_still_is(place, name):
    source = inspect.getsource(resolve_name(place))
    assert re.search(rf"\b{name}\b", source), f"{place} assigns no {name} any more: {ADVICE}"


@pytest.mark.parametrize("reasons", [*OVERRIDDEN.values(), USED, REPLACED, *ASSIGNED.values()])
def test_each_has_its_reason(reasons):
    assert all(len(reason.split()) >= 3 for reason in reasons.values())

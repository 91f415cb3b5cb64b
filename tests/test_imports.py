"""Who may import whom, read from the sources alone: `make lint` runs this file without torch."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).parents[1]
NETWORK, TRAINING, COMMANDS = "vanilla_transformer", "vanilla_transformer.training", "vanilla_transformer_commands"
# vanilla_transformer/training is a link to training/, which rglob() does not follow.
FOLDERS = {
    NETWORK: ROOT / "vanilla_transformer",
    TRAINING: ROOT / "training",
    COMMANDS: ROOT / "scripts" / "vanilla_transformer_commands",
}


class Import(NamedTuple):
    """
    One import of a module of ours by another.

    Args:
        importer: the name of the module that has it.
        line: where it stands there.
        imported: the name of the module that it loads.
        when_loaded: whether it runs when `importer` is loaded, rather than in a function or for a type checker alone.
    """

    importer: str
    line: int
    imported: str
    when_loaded: bool

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}, imports {self.imported}"


def find_sources() -> dict[str, Path]:
    """The file of each module of ours, by the module's name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


SOURCES = find_sources()


def statements(tree: ast.AST, when_loaded: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import below a node, and whether it runs when the module is loaded."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, when_loaded
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from statements(node, when_loaded and not in_function and not for_types)


def origin(node: ast.ImportFrom, importer: str, path: Path) -> str:
    """The full name of the module that `from ... import` names."""
    if not node.level:
        return node.module or ""
    parts = importer.split(".")
    parts = parts[: len(parts) - node.level + (path.name == "__init__.py")]
    return ".".join([*parts, node.module] if node.module else parts)


def imports_of(importer: str, path: Path) -> Iterator[Import]:
    """What a module imports of ours."""
    for node, when_loaded in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            source = origin(node, importer, path)
            # `from package import name` loads package.name where that is a module.
            names = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if name in SOURCES else source for name in names]
        for name in dict.fromkeys(names):
            if is_in(name, NETWORK) or is_in(name, COMMANDS):
                yield Import(importer, node.lineno, name, when_loaded)


def is_in(module: str, package: str) -> bool:
    """Whether a module is this package or in it."""
    return f"{module}.".startswith(f"{package}.")


IMPORTS = [found for importer, path in SOURCES.items() for found in imports_of(importer, path)]


def forbidden(importers: str, but: str | None, imported: str) -> list[str]:
    """The imports from one package to another, in words."""
    return [
        str(found)
        for found in IMPORTS
        if is_in(found.importer, importers)
        and not (but and is_in(found.importer, but))
        and is_in(found.imported, imported)
    ]


def test_all_modules_are_found():
    assert {NETWORK, TRAINING, COMMANDS, f"{TRAINING}.train", f"{COMMANDS}.main"} <= set(SOURCES)
    assert any(found.importer == f"{TRAINING}.train" and not is_in(found.imported, TRAINING) for found in IMPORTS)


def test_every_import_of_ours_is_of_a_module_that_exists():
    assert [str(found) for found in IMPORTS if found.imported not in SOURCES] == []


def test_the_network_imports_neither_training_nor_commands():
    assert forbidden(NETWORK, but=TRAINING, imported=TRAINING) == []
    assert forbidden(NETWORK, but=TRAINING, imported=COMMANDS) == []


def test_training_does_not_import_commands():
    assert forbidden(TRAINING, but=None, imported=COMMANDS) == []


def test_a_folder_of_training_imports_only_those_before_it():
    folders = [f"{TRAINING}.{name}" for name in ("settings", "data", "publishing", "loop", "checks")]
    for number, folder in enumerate(folders):
        for later in (*folders[number + 1 :], f"{TRAINING}.results", f"{TRAINING}.train", f"{TRAINING}.evaluate"):
            assert forbidden(folder, but=None, imported=later) == []


def test_no_modules_import_each_other_in_a_circle_when_they_are_loaded():
    graph: dict[str, set[str]] = {name: set() for name in SOURCES}
    for found in IMPORTS:
        if found.when_loaded and found.imported != found.importer:
            graph[found.importer].add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


FLAT = sorted(path.name for path in FOLDERS[NETWORK].glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("name", FLAT)
def test_what_the_hub_copies_imports_its_siblings_by_from_dot_name_import(name):
    """transformers finds the files that it copies beside a model's weights by these words."""
    wrong = []
    for node, _ in statements(ast.parse((FOLDERS[NETWORK] / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            right = node.level == 1 and node.module and f"{node.module}.py" in FLAT
        else:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            right = not any(is_in(module, NETWORK) for module in modules)
        if not right:
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert wrong == []


def test_each_file_of_the_network_stands_on_those_before_it_in_the_map():
    """docs/architecture.md has them in an order in which each imports only those before it."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\|$", page.split("## Which file imports which")[1].split("\n## ")[0], re.MULTILINE)
    order = re.findall(r"`(\w+)`", "".join(rows[1:]))
    assert sorted(f"{name}.py" for name in order) == FLAT
    place = {f"{NETWORK}.{name}": number for number, name in enumerate(order)}
    siblings = [found for found in IMPORTS if found.importer in place and found.imported in place]
    assert [str(found) for found in siblings if place[found.imported] >= place[found.importer]] == []

"""Units of translators' files and of WMT's test sets: .tmx, .xlf and .xliff, .po, and .xml as WMT has it since 2021.

translate-toolkit reads all but the last, which it does not know. A file is read whole.
"""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import DataError
from .lines import open_binary, warn_once
from .tables import Row


# The inline elements of TMX and XLIFF whose contents are codes, in any namespace.
CODES = ("{*}bpt", "{*}ept", "{*}it", "{*}ph")
LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"


def tmx_rows(path: Path) -> Iterator[Row]:
    """The units of a translation memory: a column for each language of the file, empty where a unit lacks it."""
    units = [
        (unit.xmlelement.sourceline, {node.get(LANGUAGE): unit.getNodeText(node) for node in unit.getlanguageNodes()})
        for unit in _units(path, "tmx", "tmxfile")
    ]
    languages = dict.fromkeys((language for _, texts in units for language in texts), "")
    for number, texts in units:
        yield number, languages | {language: text or "" for language, text in texts.items()}


def xliff_rows(path: Path) -> Iterator[Row]:
    """The units of an XLIFF file without their inline tags: `source`, and `target`, empty if not translated."""
    for unit in _units(path, "xliff", "xlifffile"):
        yield unit.xmlelement.sourceline, {"source": str(unit.source or ""), "target": str(unit.target or "")}


def po_rows(path: Path) -> Iterator[Row]:
    """
    The messages of a PO file: `source` and `target`, of a plural the first form. The target is empty if the message is
    not translated, or if its translation is marked as fuzzy.
    """
    for number, unit in enumerate(_units(path, "po", "pofile"), 1):
        if not unit.isheader() and not unit.isobsolete():
            yield number, {"source": str(unit.source), "target": "" if unit.isfuzzy() else str(unit.target)}


def _units(path: Path, module: str, name: str) -> list[Any]:
    """
    The units of a file, by a class of translate-toolkit.

    Raises:
        DataError: the package is not installed, or the file is not of this format.
    """
    try:
        kind = getattr(_toolkit(module), name)
    except ImportError as error:
        raise DataError(f"{path}: to read it, install translate-toolkit (pip install translate-toolkit)") from error
    content = _content(path)
    try:
        store = kind.parsestring(_in_utf8(content, path) if module == "po" else content)
    # lxml raises a SyntaxError; the last two are what translate-toolkit has for another root element.
    except (SyntaxError, ValueError, AssertionError, StopIteration) as error:
        raise DataError(
            f"{path}: this is not a {module} file ({str(error) or 'it has another root element'})"
        ) from error
    if module != "po":
        from lxml import etree

        # Their contents are codes of another format. Those of other inline elements are text.
        etree.strip_elements(store.document, *CODES, with_tail=False)
    return store.units


def _toolkit(module: str) -> ModuleType:
    """A module of translate-toolkit. A script called translate.py, such as that of a clone, would hide its package."""
    path = sys.path[:]
    sys.path[:] = [entry for entry in path if not Path(entry, "translate.py").exists()]
    try:
        return import_module(f"translate.storage.{module}")
    finally:
        sys.path[:] = path


def _content(path: Path) -> bytes:
    with open_binary(path) as file:
        return file.read()


def _in_utf8(content: bytes, path: Path) -> bytes:
    """
    A PO file in UTF-8. (translate-toolkit 3.20 does not decode all of a file by the charset that its header names.)

    Raises:
        DataError: the file does not have its charset (names the line), or the charset is unknown.
    """
    found = re.search(rb"charset=\s*([\w.:-]+)", content)
    name = found[1].decode() if found and found[1] != b"CHARSET" else "UTF-8"
    try:
        text = content.decode(name)
    except LookupError as error:
        raise DataError(f"{path}: its header names the unknown charset {name}") from error
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise DataError(f"{path}, line {line}: byte 0x{byte:02x} is not {name} ({error.reason})") from error
    if name.lower() not in ("utf-8", "utf8", "us-ascii", "ascii"):
        warn_once(f"{path}: read as {name}, which its header names")
    return text.encode() if found is None else text.replace(found[0].decode(), "charset=UTF-8", 1).encode()


def wmt_rows(path: Path) -> Iterator[Row]:
    """
    The segments of a WMT test set: `source`; `target`, which is the first reference, empty if there is none; and
    `ref:A` and so on, the references by the names of their translators.
    """
    from lxml import etree

    try:
        root = etree.fromstring(_content(path), etree.XMLParser(resolve_entities=False, no_network=True))
    except SyntaxError as error:
        raise DataError(f"{path}: this is not XML ({error})") from error
    documents = [document for document in root.iter("doc") if "testsuite" not in document.attrib]
    if not documents:
        raise DataError(f"{path}: this XML is not a test set of WMT: it has no element <doc>")
    for document in documents:
        references = {f"ref:{side.get('translator', '')}": _segments(side) for side in document.iter("ref")}
        for identity, (number, source) in _segments(document.find("src")).items():
            texts = {name: segments.get(identity, (0, ""))[1] for name, segments in references.items()}
            yield number, {"source": source, "target": next(iter(texts.values()), "")} | texts


def _segments(side: Any) -> dict[str, tuple[int, str]]:
    """The line and text of each segment by its id."""
    return {
        segment.get("id"): (segment.sourceline, " ".join((segment.text or "").split()))
        for segment in (() if side is None else side.iter("seg"))
    }

"""Rows of .tsv, .csv, .jsonl and .json files. Every value stays as it is written: `datasets` would convert texts that
look like numbers or dates, reads "NA" as missing, and its errors name no line.
"""

import csv
import json
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...words import counted
from .lines import read_lines


# A row, and the number of its line.
Row = tuple[int, dict[str, Any]]


def tsv_rows(path: Path, has_header: bool) -> Iterator[Row]:
    """
    Lines of values between tabs, where a quotation mark is text (text/tab-separated-values, IANA). Empty lines are
    skipped.
    """
    values = ((number, line.split("\t")) for number, line in enumerate(read_lines(path), 1) if line)
    return _named(path, has_header, values)


def csv_rows(path: Path, has_header: bool) -> Iterator[Row]:
    """Values between commas. Within quotation marks there may be line ends."""
    reader = csv.reader((line + "\n" for line in read_lines(path)), strict=True)
    try:
        yield from _named(path, has_header, ((reader.line_num, row) for row in reader if row))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _named(path: Path, has_header: bool, rows: Iterable[tuple[int, list[str]]]) -> Iterator[Row]:
    """Rows by the names of their columns; without a header these are "1", "2" and so on."""
    rows = iter(rows)
    names = next(rows, (0, []))[1] if has_header else []
    for number, values in rows:
        names = names or [str(column) for column in range(1, len(values) + 1)]
        if len(values) != len(names):
            others = (
                f"under {counted(len(names), 'column name')}" if has_header else f"but the first line has {len(names)}"
            )
            raise DataError(f"{path}, line {number}: {counted(len(values), 'value')}, {others}")
        yield number, dict(zip(names, values, strict=True))


def is_json_list(path: Path) -> bool:
    """Whether a JSON file is one list, which may begin after blank lines, rather than a row on each line."""
    return next((line for line in read_lines(path) if line.strip()), "").lstrip().startswith("[")


def json_rows(path: Path) -> Iterator[Row]:
    """
    One object per line, or one list of objects (which is read whole, and its objects numbered). Objects in objects are
    columns with a dot: `translation.en`.
    """
    rows: Iterable[tuple[int, Any]]
    if is_json_list(path):
        unit, rows = "row", enumerate(_parse_json("\n".join(read_lines(path)), path), 1)
    else:
        lines = enumerate(read_lines(path), 1)
        unit, rows = "line", ((number, _parse_json(line, path, number)) for number, line in lines if line.strip())
    for number, row in rows:
        if not isinstance(row, dict):
            found = reprlib.repr(row)
            raise DataError(f"{path}, {unit} {number}: must be an object with a source and a target, not {found}")
        yield number, flat(row)


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row whose nested dicts are columns: `{"translation": {"en": "a"}}` is `{"translation.en": "a"}`."""
    if not prefix and not any(isinstance(value, dict) for value in row.values()):
        return row
    columns: dict[str, Any] = {}
    for name, value in row.items():
        columns |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return columns


def _parse_json(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {first_line + error.lineno - 1}: this is not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of lists in each other
        raise DataError(f"{path}, line {first_line}: this cannot be read ({error})") from error

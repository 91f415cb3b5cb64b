"""Which format a file has, by its suffix: rows of a data file, and the sources that `translate` reads."""

from collections.abc import Callable, Iterator
from pathlib import Path

from vanilla_transformer.loading import text_fault

from ...errors import DataError
from .documents import po_rows, tmx_rows, wmt_rows, xliff_rows
from .lines import COMPRESSED, read_lines
from .tables import Row, csv_rows, json_rows, tsv_rows


READERS: dict[str, Callable[..., Iterator[Row]]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".tmx": tmx_rows,
    ".xlf": xliff_rows,
    ".xliff": xliff_rows,
    ".po": po_rows,
    ".xml": wmt_rows,
}
# Those that may lack a header, and those that are not read as text.
TABLES, DOCUMENTS = (".csv", ".tsv"), (".tmx", ".xlf", ".xliff", ".po", ".xml")


def suffix_of(path: Path) -> str:
    """The suffix of a file's format, without that of its compression."""
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def read_rows(path: Path, has_header: bool = True) -> Iterator[Row]:
    """
    Yields the rows of a data file one by one, each with the number of its line.

    Args:
        path: the file, plain or compressed.
        has_header: whether the first line of .tsv and .csv names the columns. Otherwise they are named "1", "2" ...

    Raises:
        DataError: another kind of file, or a row that cannot be read (names the line).
    """
    suffix = suffix_of(path)
    if suffix not in READERS:
        raise DataError(
            f"{path}: the suffix of a data file must be {', '.join(READERS)} or .parquet "
            "(parallel text takes two files: source, then target)"
        )
    return READERS[suffix](path, has_header) if suffix in TABLES else READERS[suffix](path)


def read_sources(path: str, column: str | None) -> Iterator[str]:
    """
    Yields the texts to translate: the lines of a text, or the sources of a data file.

    Args:
        path: the file, or `-` for the standard input.
        column: the column of the source in a data file. Without it, every file but DOCUMENTS is text.

    Raises:
        DataError: the file or a row cannot be read, or has no such column (names the line).
    """
    if column is None and suffix_of(Path(path)) not in DOCUMENTS:
        yield from read_lines(path)
        return
    name = column or "source"
    for number, row in read_rows(Path(path), has_header=not name.isdecimal()):
        if name not in row:
            raise DataError(f"{path}, line {number}: there is no column {name!r}: name one of {', '.join(row)}")
        if fault := text_fault(row[name]):
            raise DataError(f"{path}, line {number}: the source {fault}")
        yield row[name]

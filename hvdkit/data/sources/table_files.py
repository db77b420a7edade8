"""Read columns of a table from a text file, CSV, TSV or JSON lines, as a whole; and what all tables have in common."""

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdkit.errors import UsageError

_DELIMITERS = ",\t;|"
MOST_NAMED = 10  # rows that are wrong
_SAVED = "state.json"  # in a folder of datasets.Dataset.save_to_disk

Pick = Callable[[Sequence[str], str], list[str]]
Column = list[Any] | np.ndarray
"""Values of a column: texts, empty where there is none, or lists of texts; or an array of numbers, NaN for none."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns of a table.

    Attributes:
        places: what a message calls each row, such as "line 3".
        columns: the values of each picked column.
    """

    places: list[str]
    columns: list[Column]


def read(path: Path, pick: Pick, encoding: str | None = None) -> Table:
    """Reads columns of a table.

    Args:
        path: a `.csv`, `.tsv`, `.jsonl` or `.ndjson` file.
        pick: function from the names of all columns, and the first line or the like for a message, to the names of
            those to read.
        encoding: Python's name of a text file's encoding; by default UTF-8, or UTF-16 with a byte order mark.

    Raises:
        UsageError: the file does not exist or cannot be read, there is no such encoding, or rows have another number of
            fields than the header.
    """
    if not path.is_file():
        raise UsageError(f"The data set {path} does not exist. Give the path of a file: {', '.join(SUFFIXES)}.")
    return _TEXT_READERS[path.suffix.lower()](path, _decode(path, encoding), pick)


def is_saved_dataset(path: Path) -> bool:
    """Returns whether a folder was written by `datasets.Dataset.save_to_disk`."""
    return (path / _SAVED).is_file()


def saved_files(path: Path) -> list[Path]:
    """Returns the Arrow files of such a folder, in order."""
    return [path / file["filename"] for file in json.loads((path / _SAVED).read_text())["_data_files"]]


def cells(column: Column) -> list[Any]:
    """Returns the values of a column as texts or lists of texts; empty where there is none."""
    if isinstance(column, np.ndarray):
        return ["" if value != value else str(value) for value in column.tolist()]
    return column


def texts(path: Path, name: str, column: Column, places: Sequence[str]) -> list[str]:
    """Returns the values of a column as texts.

    Args:
        path: the file, for messages.
        name: the column's name.
        column: its values.
        places: what a message calls each row.

    Raises:
        UsageError: a value is a list.
    """
    found = cells(column)
    for place, cell in zip(places, found, strict=True):
        if isinstance(cell, list):
            raise UsageError(f"{path}, {place}: {name} is a list, but must be a text or a number.")
    return found


def listed(items: Sequence[str]) -> str:
    """Returns the first items, and how many more there are."""
    more = f" and {len(items) - MOST_NAMED} more" if len(items) > MOST_NAMED else ""
    return ", ".join(items[:MOST_NAMED]) + more


def _decode(path: Path, encoding: str | None) -> str:
    """Returns the text of a file, without a byte order mark."""
    content = path.read_bytes()
    guessed = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding or guessed)
    except LookupError:
        raise UsageError(
            f"--encoding={encoding} is unknown. Give a name that Python knows, such as cp1252, latin-1 or shift_jis."
        ) from None
    except UnicodeDecodeError as error:
        name = encoding or guessed.removesuffix("-sig").upper()
        raise UsageError(
            f"{path} is not {name} text (at byte {error.start}). Name its encoding, such as --encoding=cp1252 if it is "
            f"from Windows in Western Europe, or save it as UTF-8."
        ) from None


# -------------------------------------------------------------------------------------------------------- CSV and TSV


def _read_csv(path: Path, content: str, pick: Pick) -> Table:
    first = content.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=first.count) if path.suffix.lower() != ".tsv" else "\t"
    header, *rows = [*_csv_rows(path, content, delimiter)] or [(1, [])]
    names = pick(header[1], first.strip())
    wrong = [f"line {line} has {len(row)}" for line, row in rows if len(row) != len(header[1])]
    if wrong:
        raise UsageError(
            f"{path}: {len(wrong)} row(s) have another number of fields than the header's {len(header[1])}: "
            f'{listed(wrong)}. Put texts that contain a delimiter into quotes ("...").'
        )
    places = [header[1].index(name) for name in names]
    return Table([f"line {line}" for line, _ in rows], [[row[place] for _, row in rows] for place in places])


def _csv_rows(path: Path, content: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows that are not empty, each with the number of its first line."""
    limit = csv.field_size_limit(sys.maxsize)  # csv's own is 128 KiB, and a text may be a book
    try:
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter)
        line = 1
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}. Repair the line, or remove it.") from None
    finally:
        csv.field_size_limit(limit)


# --------------------------------------------------------------------------------------------------------- JSON lines


def _read_json_lines(path: Path, content: str, pick: Pick) -> Table:
    numbered = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    rows = [(number, _json_object(path, number, line)) for number, line in numbered]
    keys = list(dict.fromkeys(key for _, row in rows for key in row))
    names = pick(keys, numbered[0][1][:200] if numbered else "")
    columns: list[Column] = [[cell_of(path, f"line {n}", name, row.get(name)) for n, row in rows] for name in names]
    return Table([f"line {number}" for number, _ in rows], columns)


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{path}, line {number} is not JSON ({error}). Repair the line, or remove it.") from None
    if not isinstance(row, dict):
        raise UsageError(f'{path}, line {number} is a {type(row).__name__}, but must be an object: {{"text": ...}}.')
    return row


def cell_of(path: Path, place: str, name: str, value: Any) -> str | list[str]:
    """Returns a value of JSON or Arrow as a text or a list of texts; empty if it is null.

    Raises:
        UsageError: it has a structure of its own.
    """
    if value is None:
        return ""
    if isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value):
        return [str(item) for item in value if item is not None]
    if isinstance(value, bytes):
        try:
            return value.decode()  # a text, where a writer of Parquet did not say so
        except UnicodeDecodeError:
            raise UsageError(
                f"{path}, {place}: {name} has bytes that are no text. Leave the column out, or write texts or numbers."
            ) from None
    if isinstance(value, (dict, list)):
        raise UsageError(f"{path}, {place}: {name} is a {type(value).__name__}, but must be a text or a number.")
    return str(value)


_TEXT_READERS: dict[str, Callable[[Path, str, Pick], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
}
SUFFIXES = (*_TEXT_READERS,)

"""Texts and labels from a CSV or TSV file."""

import csv
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hvdkit.data.sources.arrays import ArraySource, hold_out
from hvdkit.errors import UsageError

_TEXT_NAMES = ("text", "sentence", "review", "content", "input")
_LABEL_NAMES = ("label", "class", "category", "target", "sentiment")
_DELIMITERS = ",\t;|"
_MOST_NAMED = 10  # lines that are wrong
_MOST_CLASSES = 0.5  # of the rows, if there are many: with more different labels, they are no classes
_MANY_ROWS = 20


def load_table(path: Path) -> ArraySource:
    """Reads a file whose header names a text and a label column (`text,label`); labels may be names or numbers.

    Fields are divided by the delimiter that divides the header: a comma, a tab, a semicolon or a bar. The text is
    UTF-8, or UTF-16 with a byte order mark.

    Classes are numbered in the sorted order of their names. If `train.csv` has a `test.csv` beside it, that file is the
    test split. Otherwise a fifth of the rows is held out, the same rows in every run.

    Raises:
        UsageError: the file does not exist, lacks a column, has rows without text or label or with more or fewer fields
            than the header (the message gives the lines), or its labels are not classes.
    """
    texts, labels = _read(path)
    companion = path.with_stem("test")
    names = sorted(set(labels), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    _check_classes(path, names, len(labels))
    number = {name: i for i, name in enumerate(names)}
    train = (np.asarray(texts, object), np.asarray([number[label] for label in labels]))
    if path.stem != "train" or not companion.exists():
        return ArraySource(path.name, "text", names, hold_out(*train))
    test_texts, test_labels = _read(companion)
    unknown = sorted(set(test_labels) - set(names))
    if unknown:
        raise UsageError(f"{companion} has classes that {path.name} lacks: {', '.join(unknown)}.")
    test = (np.asarray(test_texts, object), np.asarray([number[label] for label in test_labels]))
    return ArraySource(path.name, "text", names, {"train": train, "test": test})


def _check_classes(path: Path, names: list[str], rows: int) -> None:
    if len(names) < 2:
        raise UsageError(f"{path} has one class only ({names[0]!r}); a classifier needs two or more.")
    measures = [name for name in names if re.fullmatch(r"[-+]?\d*[.,]\d+(e[-+]?\d+)?", name, re.IGNORECASE)]
    if measures and len(measures) == len([name for name in names if not name.isdigit()]):
        raise UsageError(
            f"The labels of {path} are measured values, such as {measures[0]}, and not classes. Give classes (names or "
            f"whole numbers); a model for values is trained by a script of your own."
        )
    if rows >= _MANY_ROWS and len(names) > _MOST_CLASSES * rows:
        raise UsageError(
            f"{path} has {len(names)} different labels in {rows} rows, such as {names[0]!r} and {names[1]!r}: these "
            f"are no classes. Are the columns named right?"
        )


def _read(path: Path) -> tuple[list[str], list[str]]:
    if not path.is_file():
        raise UsageError(f"The data set {path} does not exist. Give the path of a .csv or .tsv file.")
    content = _decode(path)
    header, rows = _rows(path, content)
    columns = {name.strip().lower(): place for place, name in enumerate(header)}
    text, label = (next((columns[n] for n in names if n in columns), None) for names in (_TEXT_NAMES, _LABEL_NAMES))
    if text is None or label is None:
        raise UsageError(
            f"{path} needs a header line with a text column ({', '.join(_TEXT_NAMES)}) and a label column "
            f"({', '.join(_LABEL_NAMES)}), but its first line is: {content.split(chr(10), 1)[0].strip() or 'empty'}."
        )
    texts, labels, lengths, empty = [], [], [], []
    for line, row in rows:
        if len(row) != len(header):
            lengths.append((line, len(row)))
        elif not row[text].strip() or not row[label].strip():
            empty.append(line)
        else:
            texts.append(row[text])
            labels.append(row[label].strip())
    if lengths:
        raise UsageError(
            f"{path}: {len(lengths)} row(s) have another number of fields than the header's {len(header)}: "
            f"{_listed([f'line {line} has {fields}' for line, fields in lengths])}. Put texts that contain a delimiter "
            f'into quotes ("...").'
        )
    if empty:
        raise UsageError(
            f"{path}, line {_listed(list(map(str, empty)))}: the text or the label is empty. Fill it in, or remove the "
            f"row."
        )
    if not texts:
        raise UsageError(f"{path} has a header line but no rows.")
    return texts, labels


def _rows(path: Path, content: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Returns the header's fields, and the other rows that are not empty, each with the number of its first line."""
    first = content.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=first.count) if path.suffix != ".tsv" else "\t"
    # The fields of a table may be as long as they are; csv's own limit is 128 KiB.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter)
        found, line = [], 1
        for row in reader:
            if row:
                found.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}. Repair the line, or remove it.") from None
    finally:
        csv.field_size_limit(limit)
    return (found[0][1] if found else []), iter(found[1:])


def _decode(path: Path) -> str:
    """Returns the text of a file, without a byte order mark."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not {encoding.removesuffix('-sig').upper()} text (at byte {error.start}). Save it as UTF-8, "
            f"for example with: iconv -f WINDOWS-1252 -t UTF-8 {path} > NEW.csv, if it is from Windows in Europe."
        ) from None


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _MOST_NAMED} more" if len(items) > _MOST_NAMED else ""
    return ", ".join(items[:_MOST_NAMED]) + more

"""Texts and labels from a table: CSV, TSV, JSON lines, Parquet, Arrow, or a folder of Hugging Face's `datasets`."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hvdkit.data.sources import table_files
from hvdkit.data.sources.arrays import ArraySource, hold_out
from hvdkit.errors import UsageError

_TEXT_NAMES = ("text", "sentence", "review", "content", "input")
_LABEL_NAMES = ("label", "class", "category", "target", "sentiment")
_MOST_CLASSES = 0.5  # of the rows, if there are many: with more different labels, they are no classes
_MANY_ROWS = 20


def load_table(path: Path) -> ArraySource:
    """Reads a table with a text and a label column (`text`, `label`); labels may be names or whole numbers.

    The fields of a CSV file are divided by the delimiter that divides its header: a comma, a tab, a semicolon or a bar.
    Its text is UTF-8, or UTF-16 with a byte order mark.

    Classes are numbered in the sorted order of their names. If `train.csv` has a `test.csv` beside it, that file is the
    test split; likewise for other suffixes, and for the folders `train` and `test` of a `datasets.DatasetDict`.
    Otherwise a fifth of the rows is held out, the same rows in every run.

    Raises:
        UsageError: the file does not exist or cannot be read, lacks a column, has rows without text or label or with
            more or fewer fields than the header (the message gives the lines), or its labels are not classes.
    """
    texts, labels = _read(path)
    companion = path.with_name(f"test{path.suffix}")
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
    """Returns the texts and the labels of a file."""
    table = table_files.read(path, lambda names, first: _pick(path, names, first))
    texts, labels = table.columns
    empty = [
        place
        for place, text, label in zip(table.places, texts, labels, strict=True)
        if not text.strip() or not label.strip()
    ]
    if empty:
        raise UsageError(
            f"{path}, {table_files.listed(empty)}: the text or the label is empty. Fill it in, or remove the row."
        )
    if not texts:
        raise UsageError(f"{path} has names of columns but no rows.")
    return texts, [label.strip() for label in labels]


def _pick(path: Path, names: Sequence[str], first: str) -> list[str]:
    """Returns the names of the text and the label column."""
    columns = {name.strip().lower(): name for name in reversed(names)}
    found = [next((columns[n] for n in wanted if n in columns), None) for wanted in (_TEXT_NAMES, _LABEL_NAMES)]
    if None in found:
        raise UsageError(
            f"{path} needs a text column ({', '.join(_TEXT_NAMES)}) and a label column ({', '.join(_LABEL_NAMES)}), "
            f"which its first line names, but it begins with: {first or 'nothing'}."
        )
    return [name for name in found if name is not None]

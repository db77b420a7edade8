"""From labels as data sets have them to what a model trains on: numbers of classes, measured values, or sets of labels.

Each kind is learned from the labels of the training split and encodes those of the other splits in the same way.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hvdkit.data.sources import table_files
from hvdkit.data.sources.columns import numbers
from hvdkit.data.sources.schema import CLASSIFICATION, MULTILABEL, REGRESSION
from hvdkit.data.sources.table_files import Column
from hvdkit.errors import UsageError

_MOST_CLASSES = 0.5  # of the rows, if there are many: with more different labels, they are no classes
_MANY_ROWS = 20
_SEPARATORS = (";", "|")  # of several labels in a text
_AS_VALUES = "train on measured values with --task=regression"


class Labels(Protocol):
    """How labels are encoded.

    Attributes:
        task: see `Schema`.
        names: a name for each class, each label of a set, or each measured value.
    """

    task: str
    names: list[str]

    def encode(self, path: Path, column: Column, places: Sequence[str]) -> np.ndarray:
        """Returns the encoded labels.

        Args:
            path: the file, for messages.
            column: the labels of each example.
            places: what a message calls each example.

        Raises:
            UsageError: a label is missing, unknown, or of another kind.
        """


def learn(task: str, path: Path, name: str, column: Column, places: Sequence[str], rows: int | None = None) -> Labels:
    """Returns the encoding of the labels of a training split.

    Args:
        task: see `Schema`.
        path: the file, for messages.
        name: name of the column of labels.
        column: the labels of each example, or the different ones among them.
        places: what a message calls each example.
        rows: number of examples; that of the labels unless given.

    Raises:
        UsageError: the labels do not fit the task.
    """
    if task == "auto":
        task = MULTILABEL if any(isinstance(label, list) for label in column) else CLASSIFICATION
    if task == REGRESSION:
        return Values([name])
    if task == MULTILABEL:
        return LabelSets.of(path, column, places)
    return Classes.of(path, column, places, rows)


class Classes:
    """One class for each example, encoded as its number, int64 [examples]."""

    task = CLASSIFICATION

    def __init__(self, names: list[str], origin: str) -> None:
        self.names = names
        self._origin = origin
        self._numbers = {name: number for number, name in enumerate(names)}

    @classmethod
    def of(cls, path: Path, column: Column, places: Sequence[str], rows: int | None = None) -> "Classes":
        """Numbers classes in the sorted order of their names; whole numbers in the order of numbers. See `learn`.

        Raises:
            UsageError: there is one class only, or there are so many that they are no classes.
        """
        labels = _texts(path, column, places)
        names = sorted(set(labels), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
        _check_classes(path, names, rows or len(labels))
        return cls(names, path.name)

    def encode(self, path: Path, column: Column, places: Sequence[str]) -> np.ndarray:
        """Returns the number of each example's class."""
        labels = _texts(path, column, places)
        _refuse_unknown(path, "classes", set(labels), self.names, self._origin)
        return np.array([self._numbers[label] for label in labels], np.int64)


def _check_classes(path: Path, names: list[str], rows: int) -> None:
    if len(names) < 2:
        raise UsageError(f"{path} has one class only ({names[0]!r}); a classifier needs two or more.")
    measures = [name for name in names if re.fullmatch(r"[-+]?\d*[.,]\d+(e[-+]?\d+)?", name, re.IGNORECASE)]
    if measures and len(measures) == len([name for name in names if not name.isdigit()]):
        raise UsageError(
            f"The labels of {path} are measured values, such as {measures[0]}, and not classes. Give classes (names or "
            f"whole numbers), or {_AS_VALUES}."
        )
    if rows >= _MANY_ROWS and len(names) > _MOST_CLASSES * rows:
        several = any(separator in name for name in names for separator in _SEPARATORS)
        remedy = "train on several labels with --task=multilabel" if several else _AS_VALUES
        raise UsageError(
            f"{path} has {len(names)} different labels in {rows} rows, such as {names[0]!r} and {names[1]!r}: these "
            f"are no classes. Name the right column with --label-column=NAME, or {remedy}."
        )


class Values:
    """A measured value for each example, float32 [examples, 1]."""

    task = REGRESSION

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def encode(self, path: Path, column: Column, places: Sequence[str]) -> np.ndarray:
        """Returns the values."""
        values = numbers(column)
        if values is None:
            wrong = next(i for i, value in enumerate(column) if numbers([value]) is None)
            raise UsageError(
                f"{path}, {places[wrong]}: the label {_shown(column[wrong])} is no number, as --task=regression needs. "
                f"Correct it, name the right column with --label-column=NAME, or leave out --task=regression."
            )
        missing = [place for place, value in zip(places, values, strict=True) if not np.isfinite(value)]
        if missing:
            raise UsageError(
                f"{path}, {table_files.listed(missing)}: there is no value to train on. Fill it in, or remove the row."
            )
        return values.astype(np.float32)[:, np.newaxis]


class LabelSets:
    """Any number of labels for each example, float32 [examples, labels]: 1 for each label that it has, otherwise 0."""

    task = MULTILABEL

    def __init__(self, names: list[str], separator: str, origin: str) -> None:
        self.names = names
        self._origin = origin
        self._separator = separator
        self._numbers = {name: number for number, name in enumerate(names)}

    @classmethod
    def of(cls, path: Path, column: Column, places: Sequence[str]) -> "LabelSets":
        """Finds what separates labels, and numbers them in the sorted order of their names.

        Raises:
            UsageError: no example has a label.
        """
        texts = [cell for cell in table_files.cells(column) if isinstance(cell, str) and not cell.startswith("[")]
        separator = max(_SEPARATORS, key=lambda mark: sum(mark in text for text in texts))
        names = {label for labels in _sets(path, column, places, separator) for label in labels}
        if not names:
            raise UsageError(f"No row of {path} has a label. Name the column of labels with --label-column=NAME.")
        return cls(sorted(names), separator, path.name)

    def encode(self, path: Path, column: Column, places: Sequence[str]) -> np.ndarray:
        """Returns which labels each example has."""
        sets = _sets(path, column, places, self._separator)
        _refuse_unknown(path, "labels", {label for labels in sets for label in labels}, self.names, self._origin)
        encoded = np.zeros([len(sets), len(self.names)], np.float32)
        for row, labels in zip(encoded, sets, strict=True):
            row[[self._numbers[label] for label in labels]] = 1
        return encoded


def _sets(path: Path, column: Column, places: Sequence[str], separator: str) -> list[list[str]]:
    """Returns the labels of each example, from a list, a list in JSON, or a text with separators."""
    found = []
    for cell, place in zip(table_files.cells(column), places, strict=True):
        if isinstance(cell, str) and cell.startswith("["):
            try:
                cell = [str(label) for label in json.loads(cell)]
            except ValueError as error:
                raise UsageError(f"{path}, {place}: {_shown(cell)} is no list in JSON ({error}). Correct it.") from None
        labels = cell.split(separator) if isinstance(cell, str) else cell
        found.append([label.strip() for label in labels if label.strip()])
    return found


def _texts(path: Path, column: Column, places: Sequence[str]) -> list[str]:
    """Returns each example's label as a text."""
    found = table_files.cells(column)
    for cell, place in zip(found, places, strict=True):
        if isinstance(cell, list):
            raise UsageError(
                f"{path}, {place}: the label is a list, but --task=classification needs one class. Leave the flag out "
                f"to train on several labels, or give one."
            )
    return [cell.strip() for cell in found]


def _refuse_unknown(path: Path, what: str, found: set[str], known: list[str], origin: str) -> None:
    unknown = sorted(found - set(known))
    if unknown:
        raise UsageError(f"{path} has {what} that {origin} lacks: {table_files.listed(unknown)}.")


def _shown(cell: Any) -> str:
    return repr(str(cell)[:50])

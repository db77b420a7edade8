"""Columns of a table as features: numbers as they are, booleans as 0 and 1, and categories one-hot."""

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hvdkit.data.sources import table_files
from hvdkit.data.sources.table_files import Column
from hvdkit.errors import UsageError

_MISSING = ("", "-", "?", "na", "n/a", "nan", "none", "null")  # how people write that there is no value
_BOOLEANS = {"true": 1.0, "false": 0.0}
_MOST_CATEGORIES = 100
_MOST_CATEGORY_SHARE = 0.5  # of the rows, if there are many: with more different texts, they are no categories
_MANY_ROWS = 20
_MOST_MISTYPED = 0.1  # of the rows: a column with few texts among numbers has errors, and is no category
_LEAST_KEPT = 0.5  # share of different numbers that must still differ in 32 bits
_log = logging.getLogger(__name__)


def numbers(column: Column) -> np.ndarray | None:
    """Returns a column as numbers, float64 [rows], with NaN where a value is missing; None if it has other texts."""
    if isinstance(column, np.ndarray):
        return column.astype(np.float64)
    try:
        values = np.asarray(column, np.float64)
        return values if values.ndim == 1 else None  # of lists, it has two dimensions
    except (TypeError, ValueError):
        found = list(itertools.takewhile(lambda number: number is not None, map(_number, column)))
        return np.asarray(found, np.float64) if len(found) == len(column) else None


def _number(cell: object) -> float | None:
    text = str(cell).strip().lower()
    if text in _MISSING:
        return np.nan
    try:
        return _BOOLEANS[text] if text in _BOOLEANS else float(text)
    except ValueError:
        return None


@dataclasses.dataclass(frozen=True)
class Features:
    """How the columns of a table become one vector for each row.

    Attributes:
        categories: for each column, its categories in sorted order; None for a column of numbers.
    """

    categories: Mapping[str, list[str] | None]

    @classmethod
    def of(cls, path: Path, columns: Mapping[str, Column], places: Sequence[str], train: np.ndarray) -> "Features":
        """Decides which columns are numbers, and learns the categories of the others.

        Args:
            path: the file, for messages.
            columns: the columns, by name.
            places: what a message calls each row.
            train: indices of the rows to learn categories from.

        Raises:
            UsageError: a column is neither numbers nor categories.
        """
        categories: dict[str, list[str] | None] = {}
        for name, column in columns.items():
            if numbers(column) is not None:
                categories[name] = None
                continue
            texts = _texts(path, name, column, places)
            _check_categories(path, name, texts, places)
            categories[name] = sorted({texts[place] for place in train})
        return cls(categories)

    @property
    def names(self) -> list[str]:
        """A name for each number of a vector: that of its column, or COLUMN=CATEGORY."""
        found: list[str] = []
        for name, known in self.categories.items():
            found += [name] if known is None else [f"{name}={category}" for category in known]
        return found

    def encode(self, path: Path, columns: Mapping[str, Column], places: Sequence[str]) -> np.ndarray:
        """Returns the vectors of rows, float32 [rows, features]. A category that is not known gives zeros.

        Args:
            path: the file, for messages.
            columns: the columns, by name.
            places: what a message calls each row.

        Raises:
            UsageError: a value is missing or infinite, or a column of numbers has texts.
        """
        parts = []
        for name, known in self.categories.items():
            if known is None:
                parts.append(_finite(path, name, columns[name], places)[:, np.newaxis])
            else:
                parts.append(_one_hot(path, name, _texts(path, name, columns[name], places), known))
        return np.concatenate(parts, axis=1)


def _finite(path: Path, name: str, column: Column, places: Sequence[str]) -> np.ndarray:
    """Returns a column of numbers, float32 [rows]."""
    values = numbers(column)
    if values is None:
        wrong = next(i for i, cell in enumerate(column) if _number(cell) is None)
        raise UsageError(
            f"{path}, {places[wrong]}: {column[wrong]!r} in column {name!r} is no number, as the training split's are. "
            f"Correct it."
        )
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if len(np.unique(narrow)) < _LEAST_KEPT * len(np.unique(values)):
        _log.warning("%s: numbers in column %s are equal in 32 bits; subtract what they have in common", path, name)
    missing = [places[i] for i in np.flatnonzero(np.isnan(narrow)).tolist()]
    if missing:
        raise UsageError(
            f"{path}, {table_files.listed(missing)}: the number in column {name!r} is missing. Fill it in, remove the "
            f"row, or leave the column out with --feature-columns=NAME,NAME."
        )
    infinite = [places[i] for i in np.flatnonzero(np.isinf(narrow)).tolist()]
    if infinite:
        raise UsageError(
            f"{path}, {table_files.listed(infinite)}: the number in column {name!r} is infinite, or too large for 32 "
            f"bits. Correct it, remove the row, or leave the column out with --feature-columns=NAME,NAME."
        )
    return narrow


def _texts(path: Path, name: str, column: Column, places: Sequence[str]) -> list[str]:
    """Returns the categories of all rows."""
    found = table_files.texts(path, name, column, places)
    empty = [place for place, text in zip(places, found, strict=True) if text.strip().lower() in _MISSING]
    if empty:
        raise UsageError(
            f"{path}, {table_files.listed(empty)}: the category in column {name!r} is missing. Fill it in, remove the "
            f"row, or leave the column out with --feature-columns=NAME,NAME."
        )
    return [text.strip() for text in found]


def _check_categories(path: Path, name: str, texts: list[str], places: Sequence[str]) -> None:
    wrong = [(place, text) for place, text in zip(places, texts, strict=True) if _number(text) is None]
    if len(wrong) <= _MOST_MISTYPED * len(texts):
        raise UsageError(
            f"{path}, {table_files.listed([f'{place} ({text[:30]!r})' for place, text in wrong])}: no number, as the "
            f"others in column {name!r} are. Correct it, or leave the column out with --feature-columns=NAME,NAME."
        )
    if all("," in text and _number(text.replace(",", ".", 1)) is not None for _, text in wrong):
        raise UsageError(
            f"{path}: column {name!r} has numbers with a decimal comma, such as {wrong[0][1]}. Write them with a point."
        )
    different = len(set(texts))
    if different > _MOST_CATEGORIES or (len(texts) >= _MANY_ROWS and different > _MOST_CATEGORY_SHARE * len(texts)):
        raise UsageError(
            f"{path}: column {name!r} has {different} different texts in {len(texts)} rows, such as {texts[0][:30]!r}: "
            f"these are no categories. If it is the text to learn from, give --text-column={name}; otherwise name the "
            f"columns to use with --feature-columns=NAME,NAME."
        )


def _one_hot(path: Path, name: str, texts: list[str], known: list[str]) -> np.ndarray:
    place = {category: number for number, category in enumerate(known)}
    rows = np.array([place.get(text, -1) for text in texts])
    if (rows < 0).any():
        unknown = sorted({text for text, row in zip(texts, rows, strict=True) if row < 0})
        _log.warning("%s: column %s has categories that no training row has: %s", path, name, ", ".join(unknown[:10]))
    return (rows[:, np.newaxis] == np.arange(len(known))).astype(np.float32)

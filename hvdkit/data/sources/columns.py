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
_MOST_TEXTS = 1000  # that are remembered of a column
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


@dataclasses.dataclass
class TextFacts:
    """What is known of a column of texts, or of those of its rows that were read; see `Features`.

    Attributes:
        rows: number of its rows.
        texts: its different texts, and whether a row to learn from has it.
        mistyped: how many rows have a text that is no number.
        examples: some of these rows: the place and the text.
        decimal_commas: whether all of these texts are numbers with a decimal comma.
        missing: places of some rows without a value.
    """

    rows: int = 0
    texts: dict[str, bool] = dataclasses.field(default_factory=dict)
    mistyped: int = 0
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    decimal_commas: bool = True
    missing: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(
        cls, path: Path, name: str, column: Column, places: Sequence[str], learned_from: np.ndarray
    ) -> "TextFacts | None":
        """Returns what is known of some rows; None if Arrow says that the column has numbers.

        Args:
            path: the file, for messages.
            name: the column's name.
            column: its values in these rows.
            places: what a message calls each row.
            learned_from: whether to learn categories from a row, bool [rows].

        Raises:
            UsageError: a value is a list.
        """
        if isinstance(column, np.ndarray):
            return None
        found = [text.strip() for text in table_files.texts(path, name, column, places)]
        wrong = {text for text in set(found) if _number(text) is None}
        facts = cls(len(found))
        facts.decimal_commas = all("," in t and _number(t.replace(",", ".", 1)) is not None for t in wrong)
        for place, text in enumerate(found):
            if len(facts.texts) < _MOST_TEXTS or text in facts.texts:
                facts.texts[text] = facts.texts.get(text, False) or bool(learned_from[place])
            if text in wrong:
                facts.mistyped += 1
                if len(facts.examples) < table_files.MOST_NAMED:
                    facts.examples.append((places[place], text))
            elif text.lower() in _MISSING and len(facts.missing) <= table_files.MOST_NAMED:
                facts.missing.append(places[place])
        return facts

    def __add__(self, other: "TextFacts") -> "TextFacts":
        texts = {text: self.texts.get(text, False) or learned for text, learned in other.texts.items()}
        texts = dict(itertools.islice((self.texts | texts).items(), _MOST_TEXTS))
        return TextFacts(
            self.rows + other.rows,
            texts,
            self.mistyped + other.mistyped,
            [*self.examples, *other.examples][: table_files.MOST_NAMED],
            self.decimal_commas and other.decimal_commas,
            [*self.missing, *other.missing][: table_files.MOST_NAMED + 1],
        )

    def categories(self, path: Path, name: str) -> list[str] | None:
        """Returns the column's categories in sorted order; None for numbers.

        Raises:
            UsageError: it is neither numbers nor categories.
        """
        if not self.mistyped:
            return None
        if self.missing:
            raise UsageError(_without_category(path, name, self.missing))
        if self.mistyped <= _MOST_MISTYPED * self.rows:
            shown = ", ".join(f"{place} ({text[:30]!r})" for place, text in self.examples)
            more = f" and {self.mistyped - len(self.examples)} more" if self.mistyped > len(self.examples) else ""
            raise UsageError(
                f"{path}, {shown}{more}: no number, as the others in column {name!r} are. Correct it, or leave the "
                f"column out with --feature-columns=NAME,NAME."
            )
        example = self.examples[0][1]
        if self.decimal_commas:
            raise UsageError(
                f"{path}: column {name!r} has numbers with a decimal comma, such as {example}. Write them with a point."
            )
        different = len(self.texts)
        if different > _MOST_CATEGORIES or (self.rows >= _MANY_ROWS and different > _MOST_CATEGORY_SHARE * self.rows):
            raise UsageError(
                f"{path}: column {name!r} has {different}{' or more' if different == _MOST_TEXTS else ''} different "
                f"texts in {self.rows} rows, such as {example[:30]!r}: these are no categories. If it is the text to "
                f"learn from, give --text-column={name}; otherwise name the columns to use with "
                f"--feature-columns=NAME,NAME."
            )
        return sorted(text for text, is_learned in self.texts.items() if is_learned)


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
        learned_from = np.zeros(len(places), bool)
        learned_from[train] = True
        facts = {
            name: TextFacts.of(path, name, column, places, learned_from) if numbers(column) is None else None
            for name, column in columns.items()
        }
        return cls.learned(path, facts)

    @classmethod
    def learned(cls, path: Path, facts: Mapping[str, TextFacts | None]) -> "Features":
        """Decides the same from what is known of each column: None for a column of numbers.

        Raises:
            UsageError: a column is neither numbers nor categories.
        """
        return cls({name: known.categories(path, name) if known else None for name, known in facts.items()})

    def check(self, path: Path, name: str, facts: TextFacts | None) -> None:
        """Checks what is known of a column in one of the splits, and warns of categories that are not known.

        Raises:
            UsageError: it has texts, and the column is one of numbers; or a category is missing.
        """
        known = self.categories[name]
        if facts is None:
            return
        if known is None and facts.mistyped:
            raise UsageError(_no_number(path, name, *facts.examples[0]))
        if known is not None:
            if facts.missing:
                raise UsageError(_without_category(path, name, facts.missing))
            _warn_of_unknown(path, name, set(facts.texts) - set(known))

    @property
    def names(self) -> list[str]:
        """A name for each number of a vector: that of its column, or COLUMN=CATEGORY."""
        found: list[str] = []
        for name, known in self.categories.items():
            found += [name] if known is None else [f"{name}={category}" for category in known]
        return found

    def encode(
        self, path: Path, columns: Mapping[str, Column], places: Sequence[str], *, warn: bool = True
    ) -> np.ndarray:
        """Returns the vectors of rows, float32 [rows, features]. A category that is not known gives zeros.

        Args:
            path: the file, for messages.
            columns: the columns, by name.
            places: what a message calls each row.
            warn: whether to warn of numbers that are equal in 32 bits and of unknown categories.

        Raises:
            UsageError: a value is missing or infinite, or a column of numbers has texts.
        """
        parts = []
        for name, known in self.categories.items():
            if known is None:
                parts.append(_finite(path, name, columns[name], places, warn=warn)[:, np.newaxis])
            else:
                parts.append(_one_hot(path, name, _texts(path, name, columns[name], places), known, warn=warn))
        return np.concatenate(parts, axis=1)


def _finite(path: Path, name: str, column: Column, places: Sequence[str], *, warn: bool) -> np.ndarray:
    """Returns a column of numbers, float32 [rows]."""
    values = numbers(column)
    if values is None:
        wrong = next(i for i, cell in enumerate(column) if _number(cell) is None)
        raise UsageError(_no_number(path, name, places[wrong], column[wrong]))
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if warn and len(np.unique(narrow)) < _LEAST_KEPT * len(np.unique(values)):
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
    missing = [place for place, text in zip(places, found, strict=True) if text.strip().lower() in _MISSING]
    if missing:
        raise UsageError(_without_category(path, name, missing))
    return [text.strip() for text in found]


def _without_category(path: Path, name: str, places: Sequence[str]) -> str:
    return (
        f"{path}, {table_files.listed(places)}: the category in column {name!r} is missing. Fill it in, remove the "
        f"row, or leave the column out with --feature-columns=NAME,NAME."
    )


def _one_hot(path: Path, name: str, texts: list[str], known: list[str], *, warn: bool) -> np.ndarray:
    place = {category: number for number, category in enumerate(known)}
    rows = np.array([place.get(text, -1) for text in texts])
    if warn:
        _warn_of_unknown(path, name, {text for text, row in zip(texts, rows, strict=True) if row < 0})
    return (rows[:, np.newaxis] == np.arange(len(known))).astype(np.float32)


def _no_number(path: Path, name: str, place: str, text: str) -> str:
    return f"{path}, {place}: {text!r} in column {name!r} is no number, as the training split's are. Correct it."


def _warn_of_unknown(path: Path, name: str, unknown: set[str]) -> None:
    if unknown:
        shown = ", ".join(sorted(unknown)[:10])
        _log.warning("%s: column %s has categories that no training row has: %s", path, name, shown)

"""Texts or features, with labels, from a table that is read as a whole, CSV or JSON lines; and what tables are like.

`parted_table` reads the other formats, in parts.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hvdkit.data.sources import labels as label_kinds
from hvdkit.data.sources import table_files
from hvdkit.data.sources.arrays import ArraySource, hold_out
from hvdkit.data.sources.columns import Features, numbers
from hvdkit.data.sources.schema import MULTILABEL, Schema
from hvdkit.data.sources.table_files import Column
from hvdkit.errors import UsageError

TEXT_NAMES = ("text", "sentence", "review", "content", "input")
LABEL_NAMES = ("label", "class", "category", "target", "sentiment", "labels", "tags", "y")
_INDEX_NAMES = ("", "unnamed: 0", "__index_level_0__")  # what pandas calls its index
_COMPANIONS = {"test": ("test",), "validation": ("validation", "valid", "val", "dev")}
_log = logging.getLogger(__name__)


def load_table(path: Path, schema: Schema | None = None) -> ArraySource:
    """Reads a table with a column of labels, and a column of texts or else columns of numbers and categories.

    The columns are found by their names (`text`, `label`), or as the schema says. Without a column of texts, all others
    are features: numbers and booleans as they are, columns with other texts as categories, one-hot.

    The fields of a CSV file are divided by the delimiter that divides its header: a comma, a tab, a semicolon or a bar.
    Its text is UTF-8, or UTF-16 with a byte order mark.

    Classes are numbered in the sorted order of their names. Several labels are a list, or a text with `;` or `|`
    between them. If `train.csv` has a `test.csv` beside it, that file is the test split; likewise for
    `validation.csv`, for other suffixes, and for the folders of a `datasets.DatasetDict`. Otherwise a fifth of the rows
    is held out, the same rows in every run.

    Raises:
        UsageError: the file does not exist or cannot be read, lacks a column, has rows without a value or with more or
            fewer fields than the header (the message gives the lines), or its labels do not fit the task.
    """
    schema = schema or Schema()
    rows = _read(path, schema)
    labels = label_kinds.learn(schema.task, path, rows.label, rows.labels, rows.places)
    parts = {"train": rows}
    others = companions(path)
    again = Schema(labels.task, rows.label, rows.text, () if rows.text else tuple(rows.inputs), schema.encoding)
    parts |= {split: _read(other, again) for split, other in others.items()}
    targets = {split: labels.encode(part.path, part.labels, part.places) for split, part in parts.items()}
    splits = {split: (np.arange(len(target)), target) for split, target in targets.items()}
    if not others:
        parts = dict.fromkeys(("train", "test"), rows)
        splits = hold_out(*splits["train"])
    if rows.text:
        texts = {part.path: _texts(part) for part in parts.values()}
        kind, names, inputs = "text", [], texts
    else:
        features = Features.of(path, rows.inputs, rows.places, splits["train"][0])
        kind, names = "features", features.names
        inputs = {part.path: features.encode(part.path, part.inputs, part.places) for part in parts.values()}
        _log.info("%s: %d features: %s", path.name, len(names), table_files.listed(names))
    chosen = {split: (inputs[parts[split].path][places], target) for split, (places, target) in splits.items()}
    return ArraySource(path.name, kind, labels.names, chosen, task=labels.task, feature_names=names)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a table, with the columns to learn from.

    Attributes:
        path: the file.
        places: what a message calls each row.
        label: name of the column of labels.
        labels: its values.
        text: name of the column of texts; None if there are features instead.
        inputs: the columns of texts or features, by name.
    """

    path: Path
    places: Sequence[str]
    label: str
    labels: Column
    text: str | None
    inputs: dict[str, Column]


def _read(path: Path, schema: Schema) -> Rows:
    chosen: list[tuple[str, str | None, list[str]]] = []

    def pick(names: Sequence[str], first: str) -> list[str]:
        chosen.append(choose_columns(path, names, first, schema))
        return [chosen[0][0], *chosen[0][2]]

    table = table_files.read(path, pick, schema.encoding)
    label, text, names = chosen[0]
    if not table.places:
        raise UsageError(f"{path} has names of columns but no rows.")
    rows = Rows(path, table.places, label, table.columns[0], text, dict(zip(names, table.columns[1:], strict=True)))
    refuse_empty(rows, is_set=schema.task == MULTILABEL)
    return rows


def refuse_empty(rows: Rows, *, is_set: bool) -> None:
    """Raises a `UsageError` for rows without text, or without a label unless there may be any number of them."""
    labels = table_files.cells(rows.labels)
    inputs = cells_of_texts(rows) if rows.text else ["features"] * len(labels)
    empty = [
        place
        for place, text, label in zip(rows.places, inputs, labels, strict=True)
        if not text.strip() or not (is_set or isinstance(label, list) or label.strip())
    ]
    if empty:
        what = "the text or the label" if rows.text else f"the label in column {rows.label!r}"
        raise UsageError(f"{rows.path}, {table_files.listed(empty)}: {what} is empty. Fill it in, or remove the row.")


def cells_of_texts(rows: Rows) -> list[str]:
    """Returns the texts of rows.

    Raises:
        UsageError: one is a list.
    """
    ((name, column),) = rows.inputs.items()
    return table_files.texts(rows.path, name, column, rows.places)


def _texts(rows: Rows) -> np.ndarray:
    found = cells_of_texts(rows)
    if numbers(found) is not None:
        raise UsageError(no_texts(rows.path, str(rows.text)))
    return np.asarray(found, object)


def no_texts(path: Path, name: str) -> str:
    """Returns the message for a column of texts that has nothing but numbers."""
    return (
        f"{path}: the column of texts, {name!r}, has nothing but numbers. To learn from them, give "
        f"--feature-columns={name}; otherwise name the texts with --text-column=NAME."
    )


def choose_columns(path: Path, names: Sequence[str], first: str, schema: Schema) -> tuple[str, str | None, list[str]]:
    """Chooses the columns to learn from, by the schema or by their names.

    Args:
        path: the file, for messages.
        names: the names of its columns.
        first: its first line or the like, for messages.
        schema: what the user says about it.

    Returns:
        The names of the label column, of the text column if there is one, and of all columns to learn from.

    Raises:
        UsageError: there is no such column, or no label, or the label is among the others.
    """
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise UsageError(f"{path} has two columns named {twice!r}. Rename one of them.")
    label = _named(path, names, schema.label_column, "label") or _first_of(names, LABEL_NAMES)
    if schema.feature_columns:
        text, inputs = None, [str(_named(path, names, name, "feature")) for name in schema.feature_columns]
    else:
        others = [name for name in names if name != label]
        text = _named(path, names, schema.text_column, "text") or _first_of(others, TEXT_NAMES)
        inputs = [text] if text else [name for name in others if name.strip().lower() not in _INDEX_NAMES]
    if label is None or not inputs:
        raise UsageError(
            f"{path} needs a text column ({', '.join(TEXT_NAMES)}) or columns of features, and a label column "
            f"({', '.join(LABEL_NAMES)}), which its first line names, but it begins with: {first or 'nothing'}. Name "
            f"another one with --label-column=NAME or --text-column=NAME."
        )
    if label in inputs:
        raise UsageError(f"{path}: column {label!r} cannot be both the label and what to learn it from. Name another.")
    return label, text, inputs


def _named(path: Path, names: Sequence[str], wanted: str | None, what: str) -> str | None:
    """Returns the column that the user named, in any case of letters."""
    if wanted is None or wanted in names:
        return wanted
    found = _first_of(names, [wanted.strip().lower()])
    if found is None:
        raise UsageError(
            f"{path} has no column {wanted!r}, which --{what}-column{'s' if what == 'feature' else ''} names; its "
            f"columns are: {table_files.listed(names)}."
        )
    return found


def _first_of(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    columns = {name.strip().lower(): name for name in reversed(names)}
    return next((columns[name] for name in wanted if name in columns), None)


def companions(path: Path) -> dict[str, Path]:
    """Returns the test and the validation file beside a train file; the latter is the test file if it is alone."""
    if path.stem != "train":
        return {}
    found = {}
    for split, names in _COMPANIONS.items():
        beside = [path.with_name(f"{name}{path.suffix}") for name in names]
        there = [file for file in beside if file.exists()]
        if there:
            found[split] = there[0]
    return {"test": found["validation"]} if [*found] == ["validation"] else found

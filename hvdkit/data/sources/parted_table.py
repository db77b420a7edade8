"""Texts or features, with labels, from tables that are read in parts: Parquet, Arrow, and folders of `datasets`.

Such a table may be larger than memory. Nothing but the parts' numbers of rows is known when it is opened. A survey then
reads each part once, checks its values, and learns classes and categories from it. Ranks can divide this work: each
surveys some parts, and what they found is added up. In training, a rank reads the parts that have its examples.
"""

import bisect
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.shard import even_share
from hvdkit.data.sources import arrow_files, table_files
from hvdkit.data.sources import labels as label_kinds
from hvdkit.data.sources.arrow_files import PartedTable, parted_table
from hvdkit.data.sources.base import Source
from hvdkit.data.sources.columns import Features, TextFacts, numbers
from hvdkit.data.sources.labels import Labels, Values
from hvdkit.data.sources.schema import CLASSIFICATION, MULTILABEL, REGRESSION, Schema
from hvdkit.data.sources.selection import Selection, spread
from hvdkit.data.sources.split_files import by_split, files_in
from hvdkit.data.sources.table import Rows, cells_of_texts, choose_columns, companions, no_texts, refuse_empty
from hvdkit.errors import UsageError

_HELD_OUT = 0.2  # fraction of the rows to use as the test split if there is none
_log = logging.getLogger(__name__)


def is_parted_table(path: Path) -> bool:
    """Returns whether a path is a table that is read in parts: a file, or a folder of files or of `datasets`."""
    if not path.is_dir():
        return _is_file(path)
    if table_files.is_saved_dataset(path) or (path / "dataset_dict.json").is_file():
        return True
    return not (path / "dataset_info.json").is_file() and (bool(files_in(path, _is_file)) or bool(_by_value(path)))


def _by_value(path: Path) -> str:
    """Returns the name of a folder with tables that stands for a value, such as `city=Rome`; empty without any."""
    folders = [folder for folder in path.glob("*=*") if folder.is_dir() and any(map(_is_file, folder.iterdir()))]
    return folders[0].name if folders else ""


def _is_file(path: Path) -> bool:
    return path.suffix.lower() in arrow_files.SUFFIXES and not path.name.startswith(".")


def load_parted(path: Path, schema: Schema, surveys: Sequence["Survey"] | None = None) -> Source:
    """Opens a table that is read in parts, as `load_table` opens others.

    Splits are a file `train.parquet` and `test.parquet` beside it; the files of a folder, or of its folders, that are
    named `train...`, `test...` and `validation...`; or those of a `datasets.DatasetDict`. Without a test split, a fifth
    of the rows is held out, spread evenly over the table, the same rows in every run.

    Args:
        path: the file or folder.
        schema: the task and the columns, if their names do not tell.
        surveys: what all ranks have found in their parts, in order; None to survey the whole table here.

    Raises:
        UsageError: see `load_table`.
    """
    opened = _open(path, schema)
    found = surveys or [_survey(opened, 0, 1)]
    known = found[0]
    for other in found[1:]:
        known += other
    source = TableSource(opened, known)
    if opened.held_out is None:
        return source
    rest = np.setdiff1d(np.arange(source.size("train")), opened.held_out, assume_unique=True)
    return Selection(source, {"train": ("train", rest), "test": ("train", opened.held_out)})


def survey(path: Path, schema: Schema, share: int, shares: int) -> "Survey":
    """Surveys one of `shares` even numbers of a table's parts.

    Raises:
        UsageError: the table cannot be opened, or a value is missing or of the wrong kind.
    """
    return _survey(_open(path, schema), share, shares)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A table before any row is read.

    Attributes:
        path: the path that the user gave.
        schema: what the user said about it.
        splits: the table of each split.
        label: name of the column of labels.
        text: name of the column of texts; None if there are features instead.
        inputs: names of the columns of texts or features.
        held_out: the rows of `train` that are the test split, ascending; None if there is a test split.
    """

    path: Path
    schema: Schema
    splits: Mapping[str, PartedTable]
    label: str
    text: str | None
    inputs: list[str]
    held_out: np.ndarray | None

    def rows(self, split: str, part: int) -> Iterator[tuple[int, Rows]]:
        """Yields the rows of a part, some thousand at a time, each time with the number of the first one."""
        table = self.splits[split]
        for first, (labels, *inputs) in table.read(part, [self.label, *self.inputs]):
            places = table.places(first, len(labels))
            columns = dict(zip(self.inputs, inputs, strict=True))
            yield first, Rows(table.path, places, self.label, labels, self.text, columns)


def _open(path: Path, schema: Schema) -> _Opened:
    splits = {split: parted_table(where, files) for split, (where, files) in _splits(path).items()}
    train = splits["train"]
    label, text, inputs = choose_columns(train.path, train.columns, ", ".join(train.columns), schema)
    features = () if text else tuple(inputs)
    chosen = dataclasses.replace(schema, label_column=label, text_column=text, feature_columns=features)
    for table in splits.values():
        choose_columns(table.path, table.columns, ", ".join(table.columns), chosen)
    held_out = None
    if "test" not in splits:
        size = len(train)
        if size < 2:
            raise UsageError(f"{size} example(s) cannot be split into a train and a test part. Give more.")
        held_out = spread(size, max(1, round(size * _HELD_OUT)))
    return _Opened(path, schema, splits, label, text, inputs, held_out)


def _splits(path: Path) -> dict[str, tuple[Path, Sequence[Path]]]:
    """Returns where the table of each split is, and its files if these are several."""
    if (path / "dataset_dict.json").is_file():
        path = path / "train"
    if path.is_dir() and not table_files.is_saved_dataset(path):
        if _by_value(path) and not files_in(path, _is_file):
            raise UsageError(
                f"{path} is divided by the values of a column ({_by_value(path)}), which the files in it lack; hvdkit "
                f"does not read this. Write the table as one folder of files, without partitions."
            )
        return {split: (path, files) for split, files in by_split(path, files_in(path, _is_file)).items()}
    return {"train": (path, ()), **{split: (other, ()) for split, other in companions(path).items()}}


# ------------------------------------------------------------------------------------------------------------- Surveys


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is known of the parts of a table that were read; can be sent to other ranks and added to their surveys.

    Attributes:
        labels: for each split, the different labels, texts or tuples of texts, each with the place of its first row;
            empty for measured values.
        columns: for each split, what is known of each column of texts; None for one of numbers.
    """

    labels: Mapping[str, Mapping[Any, str]]
    columns: Mapping[str, Mapping[str, TextFacts | None]]

    def __add__(self, other: "Survey") -> "Survey":
        labels = {split: {**other.labels[split], **found} for split, found in self.labels.items()}
        columns = {
            split: {name: _add(known, other.columns[split].get(name)) for name, known in found.items()}
            | {name: known for name, known in other.columns[split].items() if name not in found}
            for split, found in self.columns.items()
        }
        return Survey(labels, columns)


def _add(one: TextFacts | None, other: TextFacts | None) -> TextFacts | None:
    return one + other if one and other else one or other


def _survey(opened: _Opened, share: int, shares: int) -> Survey:
    labels: dict[str, dict[Any, str]] = {}
    columns: dict[str, dict[str, TextFacts | None]] = {}
    for split, table in opened.splits.items():
        labels[split], columns[split] = {}, {}
        for part in range(*even_share(len(table.edges) - 1, share, shares)):
            for first, rows in opened.rows(split, part):
                refuse_empty(rows, is_set=opened.schema.task == MULTILABEL)
                _note_labels(labels[split], opened, rows)
                _note_columns(columns[split], opened, rows, _learned_from(opened, split, first, len(rows.places)))
    return Survey(labels, columns)


def _learned_from(opened: _Opened, split: str, first: int, rows: int) -> np.ndarray:
    """Returns which of some rows are in the training split, bool [rows]."""
    learned = np.full(rows, split == "train")
    if opened.held_out is not None:
        begin, end = np.searchsorted(opened.held_out, [first, first + rows])
        learned[opened.held_out[begin:end] - first] = False
    return learned


def _note_labels(found: dict[Any, str], opened: _Opened, rows: Rows) -> None:
    if opened.schema.task == REGRESSION:
        Values([rows.label]).encode(rows.path, rows.labels, rows.places)  # for its checks
        return
    column: table_files.Column = rows.labels
    at = np.arange(len(rows.places))
    if isinstance(column, np.ndarray):
        column, at = np.unique(column, return_index=True)
    for cell, place in zip(table_files.cells(column), at.tolist(), strict=True):
        key = tuple(cell) if isinstance(cell, list) else cell
        if key not in found:
            found[key] = rows.places[place]


def _note_columns(found: dict[str, TextFacts | None], opened: _Opened, rows: Rows, learned_from: np.ndarray) -> None:
    if opened.text:
        (texts,) = rows.inputs.values()
        seen = found.setdefault(opened.text, TextFacts())
        if seen is not None and not seen.mistyped:  # all have been numbers so far
            seen.mistyped = int(numbers(texts) is None)
        return
    for name, column in rows.inputs.items():
        facts = TextFacts.of(rows.path, name, column, rows.places, learned_from)
        if facts is None or not facts.mistyped:
            Features({name: None}).encode(rows.path, {name: column}, rows.places)  # for its checks
        found[name] = _add(found.get(name), facts)


def _learn_labels(opened: _Opened, known: Survey) -> Labels:
    """Learns the labels of the training split, and checks those of the other splits.

    Raises:
        UsageError: they do not fit the task, or other splits have labels that the training split lacks.
    """
    columns = {split: _cells(found) for split, found in known.labels.items()}
    places = {split: list(found.values()) for split, found in known.labels.items()}
    train = opened.splits["train"]
    task = opened.schema.task
    labels = label_kinds.learn(task, train.path, opened.label, columns["train"], places["train"], len(train))
    for split, table in opened.splits.items():
        if labels.task != REGRESSION:
            labels.encode(table.path, columns[split], places[split])
    return labels


def _cells(labels: Iterable[Any]) -> list[Any]:
    return [list(label) if isinstance(label, tuple) else label for label in labels]


def _learn_features(opened: _Opened, known: Survey) -> Features | None:
    """Learns how columns become features; None for texts. Checks the columns of the other splits.

    Raises:
        UsageError: a column is neither numbers nor categories, or of another kind in another split.
    """
    train = opened.splits["train"]
    if opened.text:
        facts = known.columns["train"][opened.text]
        if facts is None or not facts.mistyped:
            raise UsageError(no_texts(train.path, opened.text))
        return None
    features = Features.learned(train.path, {name: known.columns["train"][name] for name in opened.inputs})
    for split in known.columns:
        for name, facts in known.columns[split].items():
            features.check(opened.splits[split].path, name, facts)
    _log.info("%s: %d features: %s", opened.path.name, len(features.names), table_files.listed(features.names))
    return features


# ------------------------------------------------------------------------------------------------------------ Examples


class TableSource:
    """The rows of a table as examples, read in parts; see `Source` for the attributes, and `load_parted`."""

    def __init__(self, opened: _Opened, known: Survey) -> None:
        self._opened = opened
        self._labels = _learn_labels(opened, known)
        self._features = _learn_features(opened, known)
        self.name = opened.path.name
        self.kind = "text" if self._features is None else "features"
        self.task, self.label_names = self._labels.task, self._labels.names
        self.feature_names = [] if self._features is None else self._features.names
        self.splits = tuple(opened.splits)
        self.shape: tuple[int, ...] | None = None if self._features is None else (len(self.feature_names),)

    def size(self, split: str) -> int:
        """Number of examples in a split."""
        return len(self._opened.splits[split])

    def edges(self, split: str) -> np.ndarray:
        """Index of the first example of each part of a split, and the number of examples, int64."""
        return np.asarray(self._opened.splits[split].edges, np.int64)

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split, from the parts that have them."""

        def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            edges = self._opened.splits[split].edges
            for part in range(bisect.bisect_right(edges, start) - 1, bisect.bisect_left(edges, stop)):
                for first, (inputs, labels) in self._chunks(split, part):
                    mine = slice(max(0, start - first), max(0, stop - first))
                    if len(labels[mine]):
                        yield inputs[mine], labels[mine]

        examples = tf.data.Dataset.from_generator(chunks, output_signature=self._signature()).unbatch()
        return examples.apply(tf.data.experimental.assert_cardinality(stop - start))

    def read_part(self, split: str, part: tf.Tensor) -> tf.data.Dataset:
        """The examples of a part of a split; see `Parted`."""

        def chunks(number: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            yield from (chunk for _, chunk in self._chunks(split, int(number)))

        return tf.data.Dataset.from_generator(chunks, output_signature=self._signature(), args=[part]).unbatch()

    def _signature(self) -> tuple[tf.TensorSpec, tf.TensorSpec]:
        is_class = self.task == CLASSIFICATION
        labels = tf.TensorSpec([None], tf.int64) if is_class else tf.TensorSpec([None, len(self.label_names)])
        inputs = (
            tf.TensorSpec([None], tf.string)
            if self._features is None
            else tf.TensorSpec([None, len(self.feature_names)])
        )
        return inputs, labels

    def _chunks(self, split: str, part: int) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """Yields the examples of a part, some thousand at a time, each time with the index of the first one."""
        for first, rows in self._opened.rows(split, part):
            labels = self._labels.encode(rows.path, rows.labels, rows.places)
            if self._features is None:
                inputs = np.array([text.encode() for text in cells_of_texts(rows)], object)
            else:
                inputs = self._features.encode(rows.path, rows.inputs, rows.places, warn=False)
            yield first, (inputs, labels)

    def locate(self, split: str, index: int) -> str:
        """What a message calls a row."""
        table = self._opened.splits[split]
        return f"{table.path}, {table.place(index)}"

    def decode(self, encoded: Any) -> tf.Tensor:
        """Returns its input: nothing is encoded."""
        return encoded

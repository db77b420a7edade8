"""Serialized `tf.train.Example` messages in TFRecord or ArrayRecord files."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import tensorflow as tf

from hvdkit.data.sources import images, table_files
from hvdkit.data.sources import labels as label_kinds
from hvdkit.data.sources.base import Source
from hvdkit.data.sources.record_features import Feature, features_of, input_of, label_of
from hvdkit.data.sources.record_files import RecordFiles, is_record_file
from hvdkit.data.sources.schema import CLASSIFICATION, Schema
from hvdkit.data.sources.selection import Selection, spread
from hvdkit.data.sources.split_files import by_split, split_of
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)
_HELD_OUT = 0.2  # fraction of the records to use as the test split if there is none
_READ_AT_ONCE = 1000  # records, for their labels


def is_record_path(path: Path) -> bool:
    """Returns whether a path is that of a file of records, or of a folder with some."""
    return is_record_file(path) or (path.is_dir() and any(map(is_record_file, path.iterdir())))


def load_records(path: Path, schema: Schema, image_size: int | None) -> Source:
    """Opens the records of a file or of a folder.

    Files with `train` in their names are the training split, those with `test` or `validation` the others, such as
    `train-00000-of-00010.tfrecord`; if no name says so, all are the training split. Without a test split, a fifth of
    the records is held out, the same ones in every run. All records are read once for their labels.

    Args:
        path: a `.tfrecord` or `.array_record` file, or a folder with such files.
        schema: the task, and which features of the messages are the label and the input, if their names do not tell.
        image_size: height and width to resize images to; required if they differ in size.

    Raises:
        UsageError: a file cannot be read, the records are no `tf.train.Example`, or have no label or input.
    """
    splits = {split: RecordFiles.of(files) for split, files in _files(path).items()}
    source = RecordSource(path, splits, schema, image_size)
    if "test" in splits:
        return source
    size = source.size("train")
    held_out = spread(size, max(1, round(size * _HELD_OUT)))
    rest = np.setdiff1d(np.arange(size), held_out, assume_unique=True)
    if not len(rest):
        raise UsageError(f"{path} has {size} record(s), too few for a train and a test part. Give more.")
    return Selection(source, {"train": ("train", rest), "test": ("train", held_out)})


class RecordSource:
    """Records as examples; see `Source` for the attributes, and `load_records`."""

    def __init__(self, path: Path, splits: Mapping[str, RecordFiles], schema: Schema, image_size: int | None) -> None:
        self.name = path.name
        self.splits = tuple(splits)
        self._files = splits
        features = features_of(path, splits["train"])
        label = label_of(path, features, schema)
        self._input = input_of(path, features, label, schema, image_size, splits["train"])
        self.kind, self.shape, self.feature_names = self._input.kind, self._input.shape, list(self._input.names)
        columns = {split: _labels(files, label, features[label]) for split, files in splits.items()}
        places = {split: _Places(files) for split, files in splits.items()}
        found = label_kinds.learn(schema.task, path, label, columns["train"], places["train"])
        self.task, self.label_names = found.task, found.names
        self._labels = {split: found.encode(path, column, places[split]) for split, column in columns.items()}

    def size(self, split: str) -> int:
        """Number of examples in a split."""
        return len(self._files[split])

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split."""
        dtype = np.int64 if self.task == CLASSIFICATION else np.float32
        labels = tf.data.Dataset.from_tensor_slices(self._labels[split][start:stop].astype(dtype))
        inputs = self._files[split].read(start, stop).map(self._input.parse, num_parallel_calls=tf.data.AUTOTUNE)
        return tf.data.Dataset.zip(inputs, labels)

    def locate(self, split: str, index: int) -> str:
        """The file of an example, and the record's number in it."""
        return self._files[split].locate(index)

    def decode(self, encoded: Any) -> tf.Tensor:
        """Decodes an image into uint8; texts and features are not encoded."""
        return self._input.decode(encoded)


# -------------------------------------------------------------------------------------------------------------- Files


def _files(path: Path) -> dict[str, list[Path]]:
    """Returns the files of each split, `train` first; if there is one other split, it is the test split."""
    if not path.exists():
        raise UsageError(f"The data set {path} does not exist. Give the path of a file or folder of records.")
    if not path.is_dir() and not split_of(path):
        return {"train": [path]}
    folder = path if path.is_dir() else path.parent
    return by_split(path, filter(is_record_file, sorted(folder.iterdir())))


class _Places(Sequence[str]):
    """What messages call the records of files, made when it is needed."""

    def __init__(self, files: RecordFiles) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._files.locate(place) for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._files.locate(index)


# ------------------------------------------------------------------------------------------------------------- Labels


def _labels(files: RecordFiles, name: str, feature: Feature) -> table_files.Column:
    """Returns the label of each record: numbers, texts, or lists of texts if one has several."""
    began = time.monotonic()
    dtype = {"bytes": tf.string, "float": tf.float32, "int64": tf.int64}[feature.kind]
    wanted = {name: tf.io.RaggedFeature(dtype)}
    found: list[list[Any]] = []

    def parsed(start: int, at_once: int) -> tf.data.Dataset:
        records = files.read(start, len(files)).batch(at_once)
        return records.map(lambda records: tf.io.parse_example(records, wanted)[name])

    try:
        for batch in parsed(0, _READ_AT_ONCE):
            found += batch.to_list()
    except tf.errors.OpError as error:
        raise _unreadable(files, name, error, len(found), parsed) from None
    _log.info("%d labels read in %.1f s", len(found), time.monotonic() - began)
    if any(len(values) != 1 for values in found):
        return [[_as_text(value) for value in values] for values in found]
    if feature.kind == "bytes":
        return [_as_text(values[0]) for values in found]
    return np.array([values[0] for values in found])


def _unreadable(
    files: RecordFiles,
    name: str,
    error: tf.errors.OpError,
    start: int,
    parsed: Callable[[int, int], tf.data.Dataset],
) -> UsageError:
    """Returns the error for the first record from `start` on that cannot be read."""
    index = start
    try:
        for _ in parsed(start, 1):
            index += 1
    except tf.errors.OpError as alone:
        error = alone
    return UsageError(
        f"{files.locate(min(index, len(files) - 1))} cannot be read ({images.first_line(error)}): it is damaged, or "
        f"its feature {name!r} is of another kind than the first record's. Write the file again."
    )


def _as_text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

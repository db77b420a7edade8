"""Read ranges of records from TFRecord and ArrayRecord files."""

import bisect
import dataclasses
import itertools
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from hvdkit.errors import UsageError

SUFFIXES = (".tfrecord", ".array_record")
_NAME = re.compile(r"\.(tfrecords?|array_?record)(-\d+-of-\d+)?$", re.IGNORECASE)
_HEAD, _TAIL = struct.Struct("<QI"), 4  # of a record in a TFRecord file: its length, and checksums of both
_READ_AT_ONCE = 64  # records of an ArrayRecord file


def is_record_file(path: Path) -> bool:
    """Returns whether a file is named like one of records, such as `train-00000-of-00010.tfrecord`."""
    return bool(_NAME.search(path.name)) and not path.name.startswith(".")


@dataclasses.dataclass(frozen=True)
class RecordFiles:
    """The records of some files, one after the other.

    Attributes:
        files: the files, all in one format.
        ends: for each file, how many records it and the files before it have.
    """

    files: Sequence[Path]
    ends: Sequence[int]

    @classmethod
    def of(cls, files: Iterable[Path]) -> "RecordFiles":
        """Counts the records of files.

        Raises:
            UsageError: a file cannot be read, or is not complete.
        """
        files = sorted(files)
        return cls(files, list(itertools.accumulate(map(_count, files))))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, stop: int) -> tf.data.Dataset:
        """Returns records `start` to `stop`, in order, as strings; opens only the files that have them."""
        parts = []
        for number, (file, end) in enumerate(zip(self.files, self.ends, strict=True)):
            begin = self.ends[number - 1] if number else 0
            first, last = max(start, begin) - begin, min(stop, end) - begin
            if first < last:
                parts.append(_array_records(file, first, last) if _is_array(file) else _tf_records(file, first, last))
        if not parts:
            return tf.data.Dataset.from_tensor_slices(tf.constant([], tf.string))
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.concatenate(part)
        return whole

    def locate(self, index: int) -> str:
        """Returns the file and the number of a record in it, from 0."""
        number = bisect.bisect_right(self.ends, index)
        return f"{self.files[number]}, record {index - (self.ends[number - 1] if number else 0)}"


def _is_array(file: Path) -> bool:
    return "array" in _NAME.search(file.name).group(1).lower()  # type: ignore[union-attr]


def _count(file: Path) -> int:
    if _is_array(file):
        return len(_opened(file))
    found, place, size = 0, 0, file.stat().st_size
    with file.open("rb") as opened:
        while place < size:
            head = opened.read(_HEAD.size)
            length = _HEAD.unpack(head)[0] if len(head) == _HEAD.size else size
            place += _HEAD.size + length + _TAIL
            if place > size:
                raise UsageError(
                    f"{file} is damaged, or no TFRecord file: record {found} is not complete. Write it again; if it is "
                    f"compressed, decompress it."
                )
            opened.seek(place)
            found += 1
    return found


def _tf_records(file: Path, first: int, last: int) -> tf.data.Dataset:
    return tf.data.TFRecordDataset(str(file)).skip(first).take(last - first)


def _array_records(file: Path, first: int, last: int) -> tf.data.Dataset:
    def records() -> Iterable[bytes]:
        source = _opened(file)
        for begin in range(first, last, _READ_AT_ONCE):
            yield from source.__getitems__(list(range(begin, min(last, begin + _READ_AT_ONCE))))

    return tf.data.Dataset.from_generator(records, output_signature=tf.TensorSpec([], tf.string)).apply(
        tf.data.experimental.assert_cardinality(last - first)
    )


def _opened(file: Path) -> Any:
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    except ImportError:
        raise UsageError(f"{file} needs the package array-record: pip install array-record.") from None
    try:
        return ArrayRecordDataSource([str(file)])
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UsageError(f"{file} cannot be read as ArrayRecord ({reason}). Is it complete? Write it again.") from None

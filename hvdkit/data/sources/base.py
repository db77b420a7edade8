"""The interface of every source of examples.

To add a source:

1. Write `sources/NAME.py` with a class that has the attributes and methods of `Source`.
2. Open it in `open_source` (`sources/__init__.py`), and name its form in that docstring and in the error message there.
3. Name its form in the help of `--dataset` (`hvdkit/train/flags.py`).
4. If it has columns, take a `Schema`; otherwise `open_source` refuses what a schema asks of it.
5. Test it in `tests/unit/data`: sizes of both splits, a range of examples, and a wrong file.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow as tf


class Source(Protocol):
    """Encoded examples with labels, in a train and a test split, and perhaps a validation split.

    Attributes:
        name: the name that the user gave.
        kind: `image`, `text`, `features`: vectors of numbers; `tokens`: windows of text in which each token's label is
            the next token; `boxes`: images with boxes around objects, see `boxes.py`; `arrays` and `stream`: examples
            of any structure, see `FunctionSource`.
        task: `classification`, `regression` or `multilabel`, see `Schema`; or `compiled`: what the model is compiled
            for.
        label_names: a name for each class, in the order of the integer labels; or for each label of a set; or for each
            measured value. Empty for `tokens` and examples of any structure.
        feature_names: a name for each number of a vector of features; otherwise empty.
        splits: `train`, `test`, and `validation` if there is one.
        shape: shape of a decoded image, (height, width, channels), or of a vector, (features,); None for others.
    """

    name: str
    kind: str
    task: str
    label_names: list[str]
    feature_names: list[str]
    splits: tuple[str, ...]
    shape: tuple[int, ...] | None

    def size(self, split: str) -> int:
        """Number of examples in a split."""

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split, in a fixed order, as (encoded input, label).

        A label is an int64 scalar, the number of a class; for regression and several labels it is float32
        [len(label_names)]; the label of a token window is int32 [sequence_length]. Of examples of
        any structure, see `FunctionSource`.
        """

    def locate(self, split: str, index: int) -> str:
        """What a message calls an example: the file that it is read from, or its index."""

    def decode(self, encoded: Any) -> tf.Tensor:
        """Graph function from an encoded input to an image of `shape`, uint8 or float32 from 0 to 255; the text (a
        string); float32 features of `shape`; or int32 tokens.
        """


@runtime_checkable
class Parted(Protocol):
    """A source whose examples lie in parts that are read as a whole, such as the row groups of a file.

    Each epoch of a streamed shard takes its parts in another order, because neighbours in a table may be alike.
    """

    def edges(self, split: str) -> np.ndarray | None:
        """Index of the first example of each part of a split, and the number of examples, int64, ascending; None if
        the split has no parts.
        """

    def read_part(self, split: str, part: tf.Tensor) -> tf.data.Dataset:
        """The examples of a part, in the order of `read`. The part's number is a scalar tensor, as in `flat_map`."""


def edges_of(source: Source, split: str) -> np.ndarray | None:
    """Returns the edges of the parts of a split; None if it has none."""
    return source.edges(split) if isinstance(source, Parted) else None

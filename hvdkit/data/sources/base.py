"""The interface of every source of examples.

To add a source:

1. Write `sources/NAME.py` with a class that has the attributes and methods of `Source`.
2. Open it in `open_source` (`sources/__init__.py`), and name its form in that docstring and in the error message there.
3. Name its form in the help of `--dataset` (`hvdkit/train/flags.py`).
4. Test it in `tests/unit/data`: sizes of both splits, a range of examples, and a wrong file.
"""

from typing import Any, Protocol

import tensorflow as tf


class Source(Protocol):
    """Encoded examples with labels, in a train and a test split, and perhaps a validation split.

    Attributes:
        name: the name that the user gave.
        kind: `image`, `text`, or `tokens`: windows of text in which each token's label is the next token.
        label_names: a name for each class, in the order of the integer labels. Empty for `tokens`.
        splits: `train`, `test`, and `validation` if there is one.
        shape: shape of a decoded image, (height, width, channels); None for text and tokens.
    """

    name: str
    kind: str
    label_names: list[str]
    splits: tuple[str, ...]
    shape: tuple[int, int, int] | None

    def size(self, split: str) -> int:
        """Number of examples in a split."""

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split, in a fixed order, as (encoded input, label).

        A label is an int64 scalar; the label of a token window is int32 [sequence_length].
        """

    def locate(self, split: str, index: int) -> str:
        """What a message calls an example: the file that it is read from, or its index."""

    def decode(self, encoded: Any) -> tf.Tensor:
        """Graph function from an encoded input to a uint8 image of `shape`, the text (a string), or int32 tokens."""

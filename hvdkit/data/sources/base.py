"""What every source of examples offers."""

from typing import Any, Protocol

import tensorflow as tf


class Source(Protocol):
    """Examples with labels in a train and a test split, still encoded.

    Attributes:
        name: what the user calls it.
        kind: `image`, `text`, or `tokens`: windows of text in which each token's label is the next token.
        label_names: a name for each class; labels are integers below their number. Empty for `tokens`.
        shape: shape of a decoded image, (height, width, channels); None for text and tokens.
    """

    name: str
    kind: str
    label_names: list[str]
    shape: tuple[int, int, int] | None

    def size(self, split: str) -> int:
        """Number of examples in split `train` or `test`."""

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split, in a fixed order, as (encoded input, label).

        A label is an int64 scalar; that of a window of tokens is int32 [sequence_length].
        """

    def decode(self, encoded: Any) -> tf.Tensor:
        """Graph function from an encoded input to a uint8 image of `shape`, the text (a string), or int32 tokens."""

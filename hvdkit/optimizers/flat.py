"""Variables concatenated into one vector, which is cut into equal parts, one per rank.

A cut may go through a variable, so parts are equal whatever the sizes of the variables. The position of a variable does
not depend on the number of ranks; only the zero padding at the end does.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

# Align variables and parts to 64 bytes: TensorFlow can then slice the vector without a copy.
_ALIGNMENT = 16


class Span(NamedTuple):
    """Elements `start` to `stop` of the variable at index `place`, or of its gradient or slot.

    `place` is None for the zero padding between variables and at the end.
    """

    place: int | None
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.stop - self.start


class Flat:
    """The layout of variables of one dtype in the vector.

    Args:
        variables: the variables, in the order of the vector.
        places: their indices among all variables of the optimizer.
        ranks: the number of parts.
        rank: the index of this process's part.
    """

    def __init__(self, variables: Sequence[Any], places: Sequence[int], ranks: int, rank: int) -> None:
        self.places = list(places)
        self.shapes = [tuple(v.shape) for v in variables]
        self.sizes = [int(np.prod(shape)) for shape in self.shapes]
        ends = [int(end) for end in np.cumsum([_aligned(size) for size in self.sizes])]
        self.starts = [0, *ends[:-1]]
        self.part = _aligned(-(-ends[-1] // ranks))
        self.dtype = tf.as_dtype(variables[0].dtype)
        self.ranks = ranks
        self.rank = rank
        self.mine = self.spans(rank)

    def spans(self, rank: int) -> list[Span]:
        """Returns the spans of a rank's part, in order and without gaps."""
        begin, end = rank * self.part, (rank + 1) * self.part
        found, at = [], begin
        for place, start, size in zip(self.places, self.starts, self.sizes, strict=True):
            span = Span(place, max(begin - start, 0), min(end - start, size))
            if span.start >= span.stop:
                continue
            if start + span.start > at:
                found.append(Span(None, 0, start + span.start - at))
            found.append(span)
            at = start + span.stop
        return [*found, Span(None, 0, end - at)] if at < end else found

    def take(self, tensors: Sequence[Any], spans: Sequence[Span]) -> list[tf.Tensor]:
        """Returns the spans as vectors, ready to concatenate.

        Args:
            tensors: one per variable of the optimizer, of the variable's shape; None counts as zeros.
            spans: the elements to take.
        """
        return [self._cut(None if span.place is None else tensors[span.place], span) for span in spans]

    def divide(self, vector: tf.Tensor) -> list[tf.Tensor]:
        """Splits the concatenated parts, [ranks * part], into tensors of the variables' shapes."""
        pieces = [vector[start : start + size] for start, size in zip(self.starts, self.sizes, strict=True)]
        return [tf.reshape(piece, shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Does the inverse of `divide`: concatenates one array per variable to [ranks * part]."""
        joined = np.zeros([self.ranks * self.part], self.dtype.as_numpy_dtype)
        for start, size, array in zip(self.starts, self.sizes, arrays, strict=True):
            joined[start : start + size] = np.ravel(array)
        return joined

    def _cut(self, tensor: Any, span: Span) -> tf.Tensor:
        if tensor is None:
            return tf.zeros([span.size], self.dtype)
        vector = tf.reshape(tf.cast(tensor, self.dtype), [-1])
        return vector if span.size == vector.shape[0] else vector[span.start : span.stop]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT

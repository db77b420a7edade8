"""Variables laid end to end as one vector, and cut into equal parts, one a rank.

A cut goes through variables where it must, so that parts are equal whatever the variables' sizes. Where variables lie
does not depend on the number of ranks; only the zeros at the end do.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

# Variables and parts begin at multiples of 64 bytes: then TensorFlow gives out its slice of the vector without a copy.
_ALIGNMENT = 16


class Span(NamedTuple):
    """Elements `start` to `stop` of the variable at `place`, or of what belongs to it: its gradient, or a slot.

    Between variables and at the end there are zeros; their place is None.
    """

    place: int | None
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many elements."""
        return self.stop - self.start


class Flat:
    """How some variables of one dtype are divided.

    Args:
        variables: their order is that of the vector.
        places: their places among all variables of the optimizer.
        ranks: how many parts there are.
        rank: which of them is this process's.
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
        """What the part of a rank is made of, in order, without a gap."""
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
        """The spans as vectors, to be put end to end.

        Args:
            tensors: one for each of the optimizer's variables, of its shape; None is taken for zeros.
            spans: which elements of them.
        """
        return [self._cut(None if span.place is None else tensors[span.place], span) for span in spans]

    def divide(self, vector: tf.Tensor) -> list[tf.Tensor]:
        """All parts, [ranks * part], as tensors of the variables' shapes."""
        pieces = [vector[start : start + size] for start, size in zip(self.starts, self.sizes, strict=True)]
        return [tf.reshape(piece, shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Undoes `divide`, with an array for each of these variables: [ranks * part]."""
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

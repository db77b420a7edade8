"""The number of bytes that a collective sends."""

from collections.abc import Sequence

import numpy as np


def elements(shapes: Sequence[tuple[int, ...]]) -> int:
    """Returns the number of elements in tensors of these shapes."""
    return int(sum(np.prod(shape) for shape in shapes))


def ring_bytes(size: float, ranks: int) -> float:
    """Returns the bytes that a rank sends in a ring allreduce of `size` bytes: 2 (N - 1) / N times `size`."""
    return 2 * (ranks - 1) / ranks * size

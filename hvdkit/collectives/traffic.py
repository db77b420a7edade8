"""How many bytes an exchange sends."""

from collections.abc import Sequence

import numpy as np


def elements(shapes: Sequence[tuple[int, ...]]) -> int:
    """How many numbers there are in tensors of these shapes."""
    return int(sum(np.prod(shape) for shape in shapes))


def ring_bytes(size: float, ranks: int) -> float:
    """Bytes that a rank sends when `size` bytes are reduced by a ring: 2 (N - 1) / N times."""
    return 2 * (ranks - 1) / ranks * size

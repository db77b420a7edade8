"""Generators and other iterators: batches that come one after another, and only once."""

from collections.abc import Iterator
from typing import Any

from hvdkit.data.rounds import whole_rounds


def divide(stream: Iterator[Any], rank: int, size: int, uneven: str) -> Iterator[Any]:
    """Returns a generator of this rank's elements. It needs no length: `whole_rounds` ends on all ranks alike."""
    return whole_rounds(stream, rank, size, uneven)

"""Rounds: in a round each rank takes one element, so all ranks take as many. The last round may lack some."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

_SMALLER = {  # what makes more of them
    "batches": "Make smaller batches. ",
    "strings": "If these name files, divide the records that are read from them. ",
}
_log = logging.getLogger(__name__)


def steps_of(length: int, size: int, uneven: str, unit: str = "elements") -> int:
    """Returns how many of `length` elements each of `size` ranks gets, and logs how many are dropped or repeated.

    Args:
        length: number of elements.
        size: number of ranks.
        uneven: `"drop"` or `"pad"`.
        unit: what the user calls the elements: examples, batches or strings.

    Raises:
        ValueError: there are fewer elements than ranks (`"drop"`), or none.
    """
    if length < (1 if uneven == "pad" else size):
        raise ValueError(
            f"A data set of {counted(length, unit)} cannot be divided over {size} ranks: each needs one. "
            f"{_SMALLER.get(unit, '')}Use fewer ranks."
        )
    steps = rounds_in(length, size, uneven)
    if steps * size < length:
        message = "%d of %s are left out, so that all %d ranks take %d steps."
        _log.warning(message, length - steps * size, counted(length, unit), size, steps)
    elif steps * size > length:
        message = "%d of %s are taken twice, and count twice, so that all %d ranks take %d steps."
        _log.warning(message, steps * size - length, counted(length, unit), size, steps)
    return steps


def counted(number: int, unit: str) -> str:
    """Returns a number of examples, batches or elements as a text."""
    return f"{number} {unit if number != 1 else unit.removesuffix('es' if unit == 'batches' else 's')}"


def rounds_in(length: int, size: int, uneven: str) -> int:
    """Returns the number of rounds that `length` elements make: one more with `"pad"` if the last one lacks some."""
    return -(-length // size) if uneven == "pad" else length // size


def whole_rounds(elements: Iterable[Any], rank: int, size: int, uneven: str) -> Iterator[Any]:
    """Yields this rank's element of each round of a stream, whose length need not be known.

    A rank reads a round to its end before it yields its own element, so ranks that read equal streams yield equally
    many. With `"drop"`, an incomplete last round is left out; with `"pad"`, elements from the beginning fill it.
    """
    count, mine, head = 0, None, []
    for count, element in enumerate(elements, 1):
        if uneven == "pad" and count < size:
            head.append(element)
        if (count - 1) % size == rank:
            mine = element
        if count % size == 0:
            yield mine
    rest = count % size
    if not rest:
        return
    if uneven == "pad":
        yield mine if rank < rest else head[(rank - rest) % len(head)]
    else:
        message = "%d of %d batches of a stream were left out, so that all %d ranks take %d steps."
        _log.warning(message, rest, count, size, count // size)

"""Which gradients are sent together: all of them, the groups that the user asks for, or buckets.

The backward pass computes the gradients of the last layers first. Where an allreduce takes long, those are sent while
the others are computed, in buckets of some megabytes (S. Li et al., "PyTorch distributed: experiences on accelerating
data parallel training", 2020, https://arxiv.org/abs/2006.15704, section 3.2.3).
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdkit.compat.keras3 import native_variable
from hvdkit.errors import UsageError

Groups = int | Sequence[Sequence[Any]] | None


def check(groups: Any) -> None:
    """Raises a `UsageError` if an argument `groups` is invalid."""
    if isinstance(groups, bool) or not (groups is None or isinstance(groups, (int, list, tuple))):
        raise UsageError(f"groups must be a number of groups or a list of lists of variables, but is {groups!r}.")
    if isinstance(groups, int) and groups < 1:
        raise UsageError(f"groups must be 1 or more, but is {groups}; leave it out for one group.")


def divide(places: list[int], number: int) -> list[list[int]]:
    """Divides indices in layer order into groups of about equal length; the last layers come first."""
    number = min(number, len(places)) or 1
    groups = [places[len(places) * i // number : len(places) * (i + 1) // number] for i in range(number)]
    return groups[::-1]


def by_variable(places: list[int], variables: Sequence[Any], groups: Sequence[Sequence[Any]]) -> list[list[int]]:
    """Divides indices by lists of variables. A variable in no list is a group of its own."""
    group_of = {id(native_variable(v)): number for number, group in enumerate(groups) for v in group}
    found: dict[Any, list[int]] = {}
    for place in places:
        found.setdefault(group_of.get(id(native_variable(variables[place])), ("alone", place)), []).append(place)
    return list(found.values())


def buckets(places: list[int], gradients: Sequence[tf.Tensor], smallest: int) -> list[list[int]]:
    """Divides indices into buckets of at least `smallest` bytes each; the last layers come first.

    Args:
        places: indices of the gradients to send, in layer order.
        gradients: all gradients. One of unknown shape counts as empty.
        smallest: bytes that are worth an allreduce of their own.
    """
    found: list[list[int]] = [[]]
    filled = 0
    for place in reversed(places):
        if filled >= smallest:
            found.append([])
            filled = 0
        found[-1].insert(0, place)
        filled += (gradients[place].shape.num_elements() or 0) * gradients[place].dtype.size
    if filled < smallest and len(found) > 1:
        found[-2:] = [[*found[-1], *found[-2]]]
    return found

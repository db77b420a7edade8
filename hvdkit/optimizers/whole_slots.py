"""Sharded optimizer slots: gathers them into whole slots and scatters them again.

The stored form is that of a single process: one array per variable, of its shape. So a checkpoint does not depend on
the number of ranks that wrote it, or on whether they sharded their state.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from hvdkit import world
from hvdkit.collectives import from_wire, to_wire, wire
from hvdkit.optimizers.flat import Flat


@dataclasses.dataclass(frozen=True, eq=False)
class WholeSlot:
    """A variable's slot, as it is in one process.

    Attributes:
        path: its Keras path.
        shape: the shape of the variable.
        dtype: the dtype of the variable.
        held: this rank's part of the slots of all variables in `flat`.
        flat: the layout of these variables.
        place: the index of the variable among those of the optimizer.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    held: keras.Variable
    flat: Flat
    place: int


def gather(slots: Sequence[WholeSlot]) -> list[np.ndarray]:
    """Returns the slots' values on rank 0, and an empty list on other ranks; a collective call of all ranks.

    Uses an alltoall in which only rank 0 receives, so other ranks need no memory for the result.
    """
    vectors: dict[int, list[np.ndarray]] = {}
    for slot in slots:
        if id(slot.held) in vectors:
            continue
        splits = [slot.flat.part if rank == 0 else 0 for rank in range(slot.flat.ranks)]
        vector = _exchange(tf.convert_to_tensor(slot.held.value), splits, f"gather.{len(vectors)}")
        vectors[id(slot.held)] = [t.numpy() for t in slot.flat.divide(vector)] if world.rank() == 0 else []
    if world.rank():
        return []
    return [vectors[id(slot.held)][slot.flat.places.index(slot.place)] for slot in slots]


def scatter(slots: Sequence[WholeSlot], values: Sequence[np.ndarray]) -> None:
    """Gives each rank its part of the slots; a collective call of all ranks.

    Args:
        slots: all slots of each flat that has one here.
        values: their values on rank 0; an empty list on other ranks.
    """
    if world.rank() == 0:
        whole = {id(held): vector for held, _, vector in joined(list(zip(slots, values, strict=True)))}
    held = {id(slot.held): slot for slot in slots}
    for number, (key, slot) in enumerate(held.items()):
        if world.rank() == 0:
            content, splits = tf.convert_to_tensor(whole.pop(key)), [slot.flat.part] * slot.flat.ranks
        else:
            content, splits = tf.zeros([0], slot.flat.dtype), [0] * slot.flat.ranks
        slot.held.assign(_exchange(content, splits, f"scatter.{number}"))


def joined(
    slots: Sequence[tuple[WholeSlot, np.ndarray]],
) -> Iterator[tuple[keras.Variable, Flat, np.ndarray]]:
    """Yields the parts of all ranks, concatenated, for each variable that holds this rank's part."""
    groups: dict[int, dict[int, np.ndarray]] = {}
    for slot, value in slots:
        groups.setdefault(id(slot.held), {})[slot.place] = value
    for slot in {id(slot.held): slot for slot, _ in slots}.values():
        values = groups.pop(id(slot.held))
        yield slot.held, slot.flat, slot.flat.join([values[place] for place in slot.flat.places])


def _exchange(tensor: tf.Tensor, splits: list[int], name: str) -> tf.Tensor:
    wired = to_wire(tensor)
    received, _ = wire.run("alltoall", [wired, tf.constant(splits, tf.int32)], f"hvdkit.sharded.{name}")
    return from_wire(received, tensor.dtype)

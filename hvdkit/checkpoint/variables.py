"""Saves and restores the variables of a model, its optimizers and its metrics on all ranks.

Most variables are the same on all ranks; the value of rank 0 is saved. Some differ between ranks during an epoch:
random seeds, metric states, BatchNormalization's moving statistics, accumulated gradients that are not yet averaged,
variables that a `DistributedOptimizer` was told to keep local, and those that Keras does not track, such as the states
of stateful RNNs. Of these every rank's value is saved, and under `tf.distribute` every replica's. Slots that a
`ShardedOptimizer` has sharded are saved like those of one process.

A checkpoint may be restored on another number of ranks. Then each rank takes its saved seed, and additional ranks get
a seed derived from the first. Sums of metrics go to rank 0 alone, which keeps their total. Untracked variables and
integers are those of a saved rank. Of other values all ranks take the mean.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.optimizers import whole_slots
from hvdkit.optimizers.state import COMMON, METRIC, OWN, SEED, UNTRACKED, Kept
from hvdkit.optimizers.whole_slots import WholeSlot


class Snapshot:
    """The values of variables at one moment, in memory.

    On a CPU a snapshot costs almost nothing: TensorFlow copies a held value only when the variable is next assigned.
    Values on a GPU are copied to the host at once, to save GPU memory. Sharded slots are gathered on rank 0 at once;
    with these, making a snapshot is a collective call.

    Args:
        kept: the variables.
    """

    def __init__(self, kept: Sequence[Kept]) -> None:
        self.signatures = [k.signature for k in kept]
        self.divided = any(k.columns for k in kept)
        self.own = [(number, [part.numpy() for part in k.parts()]) for number, k in enumerate(kept) if k.kind != COMMON]
        self._common = {
            f"variable/{number}": _hold(k.parts()[0])
            for number, k in enumerate(kept)
            if k.kind == COMMON and world.rank() == 0 and not isinstance(k.variable, WholeSlot)
        }
        divided = _divided(kept)
        self._common |= dict(
            zip((f"variable/{n}" for n, _ in divided), whole_slots.gather([s for _, s in divided]), strict=False)
        )

    def arrays(self, everyone: Sequence[list[tuple[int, list[np.ndarray]]]]) -> dict[str, np.ndarray]:
        """All arrays to store, given all ranks' `own`. The number in a name counts ranks, and replicas within each."""
        arrays = {name: np.asarray(value) for name, value in self._common.items()}
        by_number = [dict(own) for own in everyone]
        for number in sorted({n for own in by_number for n in own}):
            # Pipeline stages have different numbers of variables: a stage without this one gets an empty array.
            values = [part for own in by_number for part in own.get(number, [np.zeros(0, bool)])]
            arrays |= {f"own/{number}/{place}": value for place, value in enumerate(values)}
        return arrays


# Variables that may differ from the stored ones: they are then left as they are.
_OPTIONAL = (UNTRACKED, METRIC)


def difference(kept: Sequence[Kept], signatures: Sequence[Sequence[Any]]) -> str | None:
    """Says how a stored model differs from this one; None if it does not. Only what is optional may differ."""
    ours = [k.signature for k in kept if k.kind not in _OPTIONAL]
    theirs = [list(s) for s in signatures if s[3] not in _OPTIONAL]
    for here, there in zip(ours, theirs, strict=False):
        if here[1:] != there[1:]:
            return f"{there[0]} is {tuple(there[1])} {there[2]} there, and {here[0]} is {tuple(here[1])} {here[2]} here"
    if len(ours) != len(theirs):
        return f"it has {len(theirs)} variables, and this one has {len(ours)}"
    for here, there in zip(ours, theirs, strict=True):
        if not _are_one(here[0], there[0]):
            return f"the place of {there[0]} there is that of {here[0]} here"
    return None


def _are_one(path: str, other: str) -> bool:
    """Returns whether two paths are those of one variable, in two processes.

    They begin with the names of what was built around it, and have numbers that Keras adds within a process. What
    stays is the layer or optimizer, and the variable: all of a weight's name, and the last word of a slot's.
    """
    ours, theirs = (re.sub(r"_\d+(?=_|/|$)", "", p).split("/")[-2:] for p in (path, other))
    if len(ours) == len(theirs) == 2 and ours[0] != theirs[0]:
        return False
    names = ours[-1], theirs[-1]
    are_slots = all("_" in name for name in names)
    return names[0] == names[1] or (are_slots and len({name.rpartition("_")[2] for name in names}) == 1)


def missing(kept: Sequence[Kept], signatures: Sequence[Sequence[Any]]) -> list[Kept]:
    """Returns the metrics and untracked variables that cannot be restored, because the stored ones are others."""
    left: list[Kept] = []
    for kind in _OPTIONAL:
        ours = [k for k in kept if k.kind == kind]
        if [k.signature[1:] for k in ours] != [list(s[1:]) for s in signatures if s[3] == kind]:
            left += ours
    return left


def restore(kept: Sequence[Kept], signatures: Sequence[Sequence[Any]], arrays: dict[str, np.ndarray]) -> None:
    """Restores the values on all ranks, except those that are `missing`. A collective call.

    Args:
        kept: the variables.
        signatures: the stored signatures, for which `difference` has returned None.
        arrays: the stored arrays on rank 0; ignored on other ranks.
    """
    divided = _divided(kept)
    whole_slots.scatter(
        [slot for _, slot in divided], [arrays[f"variable/{n}"] for n, _ in divided if world.rank() == 0]
    )
    common = [part for k in kept if k.kind == COMMON for part in k.parts()]
    if world.rank() == 0:
        for number, k in enumerate(kept):
            if k.kind == COMMON:
                for part in k.parts():
                    part.assign(arrays[f"variable/{number}"])
    collectives.broadcast_variables(common)
    left_out = {id(k) for k in missing(kept, signatures)}
    wanted = [
        (number, _Wanted.of(_stored_number(kept, signatures, number), k))
        for number, k in enumerate(kept)
        if k.kind != COMMON and id(k) not in left_out
    ]
    # Pipeline stages have different variables.
    everyone = collectives.gather_object([one for _, one in wanted], "checkpoint.wanted")
    given = [[one.values(arrays, rank) for one in theirs] for rank, theirs in enumerate(everyone)]
    for (number, _), values in zip(wanted, collectives.scatter_object(given, "checkpoint.own"), strict=True):
        for part, value in zip(kept[number].parts(), values, strict=True):
            part.assign(value)


def _stored_number(kept: Sequence[Kept], signatures: Sequence[Sequence[Any]], number: int) -> int:
    """Returns the index of a variable among the stored ones: those before it may be fewer, or more."""
    kind = kept[number].kind
    if kind not in _OPTIONAL:
        return number
    place = sum(k.kind == kind for k in kept[:number])
    return [index for index, s in enumerate(signatures) if s[3] == kind][place]


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A variable whose values differ between ranks, to be restored on one rank.

    Attributes:
        number: its index among all stored variables.
        kind: see `Kept`.
        columns: see `Kept`.
        parts: how many values the rank has: one for each replica.
        adds_up: whether the replicas' values are terms of a sum.
    """

    number: int
    kind: str
    columns: int
    parts: int
    adds_up: bool

    @classmethod
    def of(cls, number: int, kept: Kept) -> "_Wanted":
        """Describes the variable with index `number` of this rank."""
        adds_up = kept.kind == METRIC and getattr(kept.variable, "aggregation", "sum") == "sum"
        return cls(number, kept.kind, kept.columns, len(kept.parts()), adds_up)

    def values(self, arrays: dict[str, np.ndarray], rank: int) -> list[np.ndarray]:
        """The values for a rank's replicas, from the stored ones."""
        stored = list(_in_order(arrays, f"own/{self.number}/"))
        replicas = world.size() * self.parts
        return [self._value(stored, rank * self.parts + part, replicas) for part in range(self.parts)]

    def _value(self, values: list[np.ndarray], replica: int, replicas: int) -> np.ndarray:
        """The value for one replica, from the stored replicas' values."""
        if len(values) == replicas:
            return values[replica]
        if self.columns:  # saved with another number of copies of the model
            values = values[replica % self.columns :: self.columns]
            replica //= self.columns
            if self.kind == OWN:
                return values[0]
        if self.kind == SEED:  # [seed, counter]: seed of rank 0, plus the replica's number
            if replica < len(values):
                return values[replica]
            return values[0] + np.array([replica, 0], values[0].dtype)
        if self.adds_up:
            total = np.sum(np.asarray(values, np.float64), axis=0).astype(values[0].dtype)
            return total if replica == 0 else np.zeros_like(total)
        if self.kind == UNTRACKED or "int" in values[0].dtype.name or values[0].dtype == bool:
            return values[replica % len(values)]
        return np.mean(np.asarray(values, np.float64), axis=0).astype(values[0].dtype)


def _divided(kept: Sequence[Kept]) -> list[tuple[int, WholeSlot]]:
    return [(number, k.variable) for number, k in enumerate(kept) if isinstance(k.variable, WholeSlot)]


def _in_order(arrays: dict[str, np.ndarray], prefix: str) -> Iterable[np.ndarray]:
    place = 0
    while f"{prefix}{place}" in arrays:
        yield arrays[f"{prefix}{place}"]
        place += 1


def _hold(variable: tf.Variable) -> Any:
    if "GPU" in variable.device:
        return variable.numpy()
    return variable.read_value()

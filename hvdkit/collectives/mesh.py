"""`Mesh`: the ranks of a job, laid out in two directions, data and model; and which rank holds which shard.

Ranks of one row hold one model between them; ranks of one column hold the same part of it and read different data:

                model 0   model 1
    data 0      rank 0    rank 1        rank = data index * model + model index,
    data 1      rank 2    rank 3        so that a row is on one host where that can be

What a rank holds a part of carries a mark (`mark`). From it gradients, checkpoints, guards and broadcasts know that
the variable is not the same on all ranks (see `hvdkit.parallel` for what sets it).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from hvdkit import collectives, world
from hvdkit.compat.keras3 import native_variable
from hvdkit.errors import UsageError


class Alone:
    """Stands for a process set of this rank alone, with whom nothing is exchanged; Horovod does not know it."""

    process_set_id = -1

    def __init__(self, rank: int) -> None:
        self.ranks = [rank]

    def size(self) -> int:
        """One."""
        return 1

    def rank(self) -> int:
        """The first."""
        return 0

    def included(self) -> bool:
        """It is this rank's."""
        return True

    def __repr__(self) -> str:
        return f"Alone({self.ranks[0]})"


class Mesh:
    """The ranks of a job as a table of `data` rows and `model` columns.

    Make it before `hvdkit.init`, and hand it over: `hvdkit.init(mesh=hvdkit.Mesh(model=2))`.

    Args:
        data: how many copies of the model there are, each with its own part of the data; by default as many as there
            are rows of `model` ranks.
        model: over how many ranks a model is divided.

    Raises:
        UsageError: a number is not 1 or more.
    """

    def __init__(self, data: int | None = None, model: int = 1) -> None:
        for name, number in (("data", data), ("model", model)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise UsageError(f"Mesh({name}={number!r}): give a number of ranks, 1 or more.")
        self._data, self.model = data, model
        self._sets: dict[tuple[int, ...], Any] = {}

    @property
    def data(self) -> int:
        """Number of rows: copies of the model."""
        return self._data or max(1, world.current().size // self.model)

    @property
    def data_index(self) -> int:
        """This rank's row: which copy of the model it is part of, and which share of the data it reads."""
        return world.rank() // self.model

    @property
    def model_index(self) -> int:
        """This rank's column: which part of the model it holds."""
        return world.rank() % self.model

    @property
    def model_set(self) -> Any:
        """The ranks that hold this copy of the model between them, as a process set."""
        return self.process_set(range(self.data_index * self.model, (self.data_index + 1) * self.model))

    @property
    def data_set(self) -> Any:
        """The ranks that hold the same part of the model as this one, as a process set."""
        return self.process_set(range(self.model_index, self.data * self.model, self.model))

    def neighbours(self, stage: int) -> Any:
        """The ranks of this row in columns `stage` and `stage + 1`, as a process set: between them a pipeline flows."""
        first = self.data_index * self.model + stage
        return self.process_set([first, first + 1])

    def process_set(self, ranks: Iterable[int]) -> Any:
        """The process set of some ranks: Horovod's own, all ranks', or `Alone`.

        Raises:
            RuntimeError: it is not one of the mesh's, or the mesh was not given to `hvdkit.init`.
        """
        wanted = tuple(ranks)
        if len(wanted) == 1:
            return Alone(wanted[0])
        if len(wanted) == world.size():
            return world.horovod().global_process_set
        if wanted not in self._sets:
            raise RuntimeError(f"{self} has no process set of ranks {list(wanted)}: call hvdkit.init(mesh=mesh).")
        return self._sets[wanted]

    def process_sets(self, size: int) -> list[Any]:
        """All process sets of a mesh of `size` ranks, for `horovod.init`: rows, columns, and pairs of neighbours.

        Raises:
            UsageError: so many ranks do not fill the table.
        """
        if size % self.model or (self._data and self._data * self.model != size):
            wanted = f"{self._data} × {self.model} = {self._data * self.model}" if self._data else str(self.model)
            raise UsageError(
                f"{self} needs {wanted if self._data else f'a multiple of {wanted}'} ranks, but {size} were started. "
                f"Start as many, or choose a mesh whose data × model is {size}."
            )
        rows = [range(first, first + self.model) for first in range(0, size, self.model)]
        columns = [range(first, size, self.model) for first in range(self.model)]
        pairs = [row[place : place + 2] for row in rows for place in range(self.model - 1)]
        wanted_sets = {tuple(ranks): None for ranks in [*rows, *columns, *pairs] if 1 < len(ranks) < size}
        self._sets = {ranks: world.horovod().ProcessSet(list(ranks)) for ranks in wanted_sets}
        return list(self._sets.values())

    def __repr__(self) -> str:
        return f"Mesh(data={self._data if self._data else 'any'}, model={self.model})"

    def describe(self) -> str:
        """The table of ranks, for people."""
        rows = [
            f"data {row}: " + "  ".join(f"rank {row * self.model + column}" for column in range(self.model))
            for row in range(self.data)
        ]
        return "\n".join([f"mesh of {self.data} × {self.model} ranks (data × model)", *rows])


@dataclasses.dataclass(frozen=True)
class Shard:
    """What this rank holds of a variable of the whole model.

    Attributes:
        mesh: among whose columns the variable is divided.
        axis: along which, in even parts; None if this rank has it whole, and the other columns have it not.
    """

    mesh: Mesh
    axis: int | None


def mark(variable: Any, shard: Shard) -> None:
    """Says that a Keras variable is a shard."""
    variable._hvdkit_shard = shard
    native_variable(variable)._hvdkit_shard = shard  # gradients may be asked for by either


def shard_of(variable: Any) -> Shard | None:
    """What `mark` said of a Keras or TensorFlow variable; None if it is the same on all ranks."""
    return getattr(variable, "_hvdkit_shard", None)


def mesh_of(variables: Iterable[Any]) -> Mesh | None:
    """The mesh over which a model with these variables is divided; None if every rank has all of it."""
    return next((shard.mesh for shard in map(shard_of, variables) if shard is not None), None)


def copies_of(model: keras.Model) -> Any:
    """The ranks that hold the same as this one of a model, as a process set: all, if the model is not divided."""
    mesh = mesh_of(model.weights)
    if mesh is None:
        return Alone(world.rank()) if world.size() == 1 else world.horovod().global_process_set
    return mesh.data_set


def copy_index(model: keras.Model) -> int:
    """Which copy of a model this rank is part of: what tells random seeds apart."""
    mesh = mesh_of(model.weights)
    return world.rank() if mesh is None else mesh.data_index


def share(variables: Sequence[Any]) -> None:
    """Gives the ranks that hold the same shards the values of the first of them. A collective call."""
    shards = [v for v in variables if shard_of(v) is not None]
    mesh = mesh_of(shards)
    if mesh is not None and mesh.data > 1:
        collectives.broadcast_variables(shards, mesh.model_index, process_set=mesh.data_set)

"""`Mesh`: the ranks of a job in two dimensions, data and model, and the shard that each rank holds.

Ranks of one row hold one model together. Ranks of one column hold the same shards and read different data:

                model 0   model 1
    data 0      rank 0    rank 1        rank = data index * model + model index,
    data 1      rank 2    rank 3        so that a row is on one host if possible

`mark` marks each sharded variable. The mark tells gradients, checkpoints, guards and broadcasts that the variable is
not the same on all ranks (see `hvdkit.parallel` for what sets it).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from hvdkit import collectives, world
from hvdkit.compat.keras3 import native_variable
from hvdkit.errors import UsageError


class Alone:
    """A process set of this rank alone, which Horovod does not know; its collectives send nothing."""

    process_set_id = -1

    def __init__(self, rank: int) -> None:
        self.ranks = [rank]

    def size(self) -> int:
        """Returns 1."""
        return 1

    def rank(self) -> int:
        """Returns 0."""
        return 0

    def included(self) -> bool:
        """Returns True."""
        return True

    def __repr__(self) -> str:
        return f"Alone({self.ranks[0]})"


class Mesh:
    """The ranks of a job as a table of `data` rows and `model` columns.

    Create it before `hvdkit.init` and pass it there: `hvdkit.init(mesh=hvdkit.Mesh(model=2))`.

    Args:
        data: the number of model replicas, each with its own data shard; by default the number of ranks divided by
            `model`.
        model: the number of ranks over which a model is sharded.

    Raises:
        UsageError: a number is less than 1 or not an integer.
    """

    def __init__(self, data: int | None = None, model: int = 1) -> None:
        for name, number in (("data", data), ("model", model)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise UsageError(f"Mesh({name}={number!r}): give a number of ranks, 1 or more.")
        self._data, self.model = data, model
        self._sets: dict[tuple[int, ...], Any] = {}

    @property
    def data(self) -> int:
        """The number of rows: model replicas."""
        return self._data or max(1, world.current().size // self.model)

    @property
    def data_index(self) -> int:
        """This rank's row: the model replica that it is part of, and the data shard that it reads."""
        return world.rank() // self.model

    @property
    def model_index(self) -> int:
        """This rank's column: the part of the model that it holds."""
        return world.rank() % self.model

    @property
    def model_set(self) -> Any:
        """The ranks that hold this model replica together, as a process set."""
        return self.process_set(range(self.data_index * self.model, (self.data_index + 1) * self.model))

    @property
    def data_set(self) -> Any:
        """The ranks that hold the same part of the model as this one, as a process set."""
        return self.process_set(range(self.model_index, self.data * self.model, self.model))

    def neighbours(self, stage: int) -> Any:
        """Returns the process set of adjacent pipeline stages: this row's ranks in columns `stage` and `stage + 1`."""
        first = self.data_index * self.model + stage
        return self.process_set([first, first + 1])

    def process_set(self, ranks: Iterable[int]) -> Any:
        """Returns the process set of some ranks: a registered Horovod process set, the global one, or `Alone`.

        Raises:
            RuntimeError: the process set is not one of the mesh's, or the mesh was not passed to `hvdkit.init`.
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
        """Returns all process sets of a mesh of `size` ranks, for `horovod.init`: rows, columns, and adjacent pairs.

        Raises:
            UsageError: `size` ranks do not fill the table.
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
        """Returns the table of ranks as readable text."""
        rows = [
            f"data {row}: " + "  ".join(f"rank {row * self.model + column}" for column in range(self.model))
            for row in range(self.data)
        ]
        return "\n".join([f"mesh of {self.data} × {self.model} ranks (data × model)", *rows])


@dataclasses.dataclass(frozen=True)
class Shard:
    """This rank's shard of a variable of the whole model.

    Attributes:
        mesh: the mesh over whose columns the variable is sharded.
        axis: the axis that is split into equal parts; None if this rank holds the whole variable and the other columns
            do not have it.
    """

    mesh: Mesh
    axis: int | None


def mark(variable: Any, shard: Shard) -> None:
    """Marks a Keras variable as a shard."""
    variable._hvdkit_shard = shard
    native_variable(variable)._hvdkit_shard = shard  # callers may look up either variable


def shard_of(variable: Any) -> Shard | None:
    """Returns the `Shard` that `mark` set on a Keras or TensorFlow variable; None if it is the same on all ranks."""
    return getattr(variable, "_hvdkit_shard", None)


def mesh_of(variables: Iterable[Any]) -> Mesh | None:
    """Returns the mesh over which a model with these variables is sharded; None if every rank has all of it."""
    return next((shard.mesh for shard in map(shard_of, variables) if shard is not None), None)


def copies_of(model: keras.Model) -> Any:
    """Returns the process set of the ranks with the same part of a model as this one: all, if it is not sharded."""
    mesh = mesh_of(model.weights)
    if mesh is None:
        return Alone(world.rank()) if world.size() == 1 else world.horovod().global_process_set
    return mesh.data_set


def copy_index(model: keras.Model) -> int:
    """Returns the index of the model replica that this rank is part of; random seeds differ by it."""
    mesh = mesh_of(model.weights)
    return world.rank() if mesh is None else mesh.data_index


def share(variables: Sequence[Any]) -> None:
    """Broadcasts shards from the first of the ranks that hold the same ones. A collective call."""
    shards = [v for v in variables if shard_of(v) is not None]
    mesh = mesh_of(shards)
    if mesh is not None and mesh.data > 1:
        collectives.broadcast_variables(shards, mesh.model_index, process_set=mesh.data_set)

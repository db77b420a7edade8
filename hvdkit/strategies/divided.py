"""`tensor`, `branches` and `pipeline`: model parallelism, optionally with several copies that read different data."""

import dataclasses
from typing import Any

import keras

from hvdkit import parallel, runtime, world
from hvdkit.collectives.mesh import Mesh
from hvdkit.compression import ErrorFeedback
from hvdkit.errors import UsageError
from hvdkit.strategies.horovod import HorovodStrategy

NAMES = ("tensor", "branches", "pipeline")


@dataclasses.dataclass(frozen=True)
class Division:
    """How a model is divided.

    Attributes:
        ranks: number of ranks per copy of the model; None for all ranks.
        micro_batches: number of micro-batches of a pipeline.
        schedule: schedule of a pipeline, "1f1b" or "gpipe".
        branches: one pattern of layer names per branch; None to find the branches automatically.
    """

    ranks: int | None = None
    micro_batches: int = 4
    schedule: str = "1f1b"
    branches: tuple[str, ...] | None = None


class DividedStrategy(HorovodStrategy):
    """Model parallelism, alone or with data parallelism; see `Strategy` for the attributes.

    Args:
        name: one of `NAMES`.
        division: how the model is divided.
        replicas: if given, the required number of copies of the model.
    """

    def __init__(self, name: str, division: Division, replicas: int | None = None) -> None:
        self.name = name
        self._division = division
        self._mesh = Mesh(replicas, division.ranks or max(1, world.launched_size() // (replicas or 1)))
        self.world = runtime.init(mesh=self._mesh)
        if self._mesh.data * self._mesh.model != self.world.size:
            raise UsageError(f"{self._mesh} does not fit the {self.world.size} rank(s) that were started.")
        self.size = self._mesh.data
        self.shares = [self._mesh.data_index]

    def distribute(self, optimizer: keras.optimizers.Optimizer, **options: Any) -> keras.optimizers.Optimizer:
        """Returns a `DistributedOptimizer`, which knows which weights are shards."""
        flags = {"local_steps": "--local-steps", "shard": "--shard-optimizer"}
        unfit = [flag for name, flag in flags.items() if options.get(name)]
        if isinstance(options.get("compression"), ErrorFeedback):
            unfit.append("--compression (fp16 and bf16 work)")
        if unfit:
            raise UsageError(f"--strategy={self.name} already divides the model: remove {', '.join(unfit)}.")
        return super().distribute(optimizer, **options)

    def divide(self, model: keras.Model) -> keras.Model:
        """Returns this rank's part of the model."""
        division = self._division
        if self.name == "tensor":
            return parallel.split_tensors(model, self._mesh)
        if self.name == "branches":
            return parallel.split_branches(model, self._mesh, division.branches)
        return parallel.pipeline(model, self._mesh, micro_batches=division.micro_batches, schedule=division.schedule)

    def whole(self, model: keras.Model) -> keras.Model | None:
        """Returns the whole model on rank 0."""
        return parallel.gather(model)

    def evaluation_share(self) -> tuple[int, int]:
        """Returns one shard for each copy of the model."""
        return self._mesh.data_index, self._mesh.data

    def evaluation_batch(self, examples: int, global_batch: int) -> int:
        """Returns the batch size of one copy of the model."""
        return max(1, global_batch // self.size)

"""The protocol of a strategy: all that the training code needs to know about the replicas."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import keras
import tensorflow as tf

from hvdkit.errors import UsageError
from hvdkit.world.ranks import World, launched_size


class Strategy(Protocol):
    """How the gradients of several replicas become one update.

    Attributes:
        name: value of the flag `--strategy`.
        world: this process among the processes of the job.
        size: number of replicas; divides the global batch.
        shares: indices of the training data shards that this process feeds, out of `size` even shards.
    """

    name: str
    world: World
    size: int
    shares: Sequence[int]

    def scope(self) -> AbstractContextManager[Any]:
        """Returns the context in which to build and compile the model."""

    def distribute(self, optimizer: keras.optimizers.Optimizer, **options: Any) -> keras.optimizers.Optimizer:
        """Returns an optimizer that reduces gradients over the replicas; options as for `DistributedOptimizer`."""

    def evaluation_share(self) -> tuple[int, int]:
        """Returns the index of this process's shard of the test split, and the number of shards."""
        return self.world.rank, self.world.size

    def divide(self, model: keras.Model) -> keras.Model:
        """Returns this process's part of a model; the model itself if every process has the whole model."""
        return model

    def whole(self, model: keras.Model) -> keras.Model | None:
        """Returns on rank 0 the whole model, gathered from its parts if it is divided. A collective call."""
        return model

    def callbacks(self) -> list[keras.callbacks.Callback]:
        """Returns the callbacks that `fit` needs under this strategy; put them before all others."""

    def evaluate(self, model: keras.Model, batches: tf.data.Dataset) -> dict[str, float]:
        """Returns exact loss and metrics over the test batches of all processes."""

    def evaluation_batch(self, examples: int, global_batch: int) -> int:
        """Returns the batch size for the evaluation of `examples` test examples in this process."""


def refuse_options(strategy: str, options: dict[str, Any]) -> None:
    """Raises a `UsageError` if options for Horovod's allreduce are given: the strategy trains in one process."""
    if options:
        raise UsageError(
            f"--strategy={strategy} has no {', '.join(options)}: it trains in one process. Remove the option."
        )


def refuse_many_processes(strategy: str) -> None:
    """Raises a `UsageError` if a launcher started several processes, but the strategy trains in one."""
    processes = launched_size()
    if processes > 1:
        raise UsageError(
            f"--strategy={strategy} trains in one process, but {processes} were started. Start one (-np 1), or use "
            f"--strategy=horovod."
        )

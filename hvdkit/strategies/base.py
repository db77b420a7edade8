"""The protocol of a strategy: all that the training code needs to know of how many replicas there are."""

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
        name: as the flag `--strategy` has it.
        world: this process among the processes of the job.
        size: number of replicas; a global batch is divided by it.
        shares: which of the `size` even shares of the training data this process feeds.
    """

    name: str
    world: World
    size: int
    shares: Sequence[int]

    def scope(self) -> AbstractContextManager[Any]:
        """The context in which the model is built and compiled."""

    def distribute(self, optimizer: keras.optimizers.Optimizer, **options: Any) -> keras.optimizers.Optimizer:
        """The optimizer that exchanges gradients as this strategy does; options as for `DistributedOptimizer`."""

    def evaluation_share(self) -> tuple[int, int]:
        """Which part of the test split this process evaluates, and how many there are."""
        return self.world.rank, self.world.size

    def divide(self, model: keras.Model) -> keras.Model:
        """This process's part of a model; the model itself, if every process has all of it."""
        return model

    def whole(self, model: keras.Model) -> keras.Model | None:
        """On rank 0 the model that can be saved: put together again, if it is divided. A collective call."""
        return model

    def callbacks(self) -> list[keras.callbacks.Callback]:
        """Callbacks that make `fit` right; they come before all others."""

    def evaluate(self, model: keras.Model, batches: tf.data.Dataset) -> dict[str, float]:
        """Exact loss and metrics over the processes' test batches together."""

    def evaluation_batch(self, examples: int, global_batch: int) -> int:
        """Batch size in which a process with `examples` test examples evaluates."""


def refuse_options(strategy: str, options: dict[str, Any]) -> None:
    """Raises a `UsageError` if options of Horovod's exchange are given to a strategy that has none."""
    if options:
        raise UsageError(
            f"--strategy={strategy} has no {', '.join(options)}: nothing leaves the process. Leave it out."
        )


def refuse_many_processes(strategy: str) -> None:
    """Raises a `UsageError` if a launcher started several processes, where the strategy trains with one."""
    processes = launched_size()
    if processes > 1:
        raise UsageError(
            f"--strategy={strategy} trains in one process, but {processes} were started. Start one (-np 1), or use "
            f"--strategy=horovod."
        )

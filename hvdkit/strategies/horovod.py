"""`horovod`: one process per replica, on any number of GPUs and hosts, started by `horovodrun` or `mpirun`."""

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdkit import callbacks, runtime
from hvdkit.errors import UsageError
from hvdkit.model.evaluation import evaluate_part
from hvdkit.optimizers.distributed import DistributedOptimizer
from hvdkit.optimizers.local_sgd import LocalSGD
from hvdkit.optimizers.sharded import ShardedOptimizer
from hvdkit.strategies.base import Strategy


class HorovodStrategy(Strategy):
    """Data parallelism with Horovod; see `Strategy` for the attributes.

    Args:
        replicas: if given, the required number of ranks.
    """

    name = "horovod"

    def __init__(self, replicas: int | None = None) -> None:
        self.world = runtime.init()
        self.size = self.world.size
        self.shares: Sequence[int] = [self.world.rank]
        if replicas not in (None, self.size):
            raise UsageError(
                f"--replicas={replicas}, but {self.size} rank(s) were started. With --strategy={self.name} the "
                f"launcher decides: remove --replicas, or start {replicas} ranks (-np {replicas})."
            )

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a null context: each process has its own model."""
        return contextlib.nullcontext()

    def distribute(self, optimizer: keras.optimizers.Optimizer, **options: Any) -> keras.optimizers.Optimizer:
        """Returns a `DistributedOptimizer`, or another optimizer if an option asks for it.

        With the option `shard`, a `ShardedOptimizer`, which takes no other option; with `local_steps`, a `LocalSGD`,
        which takes the other options, too, and `fragments`.
        """
        if options.pop("shard", False):
            return ShardedOptimizer(optimizer, **options)
        steps = options.pop("local_steps", None)
        return LocalSGD(optimizer, steps, **options) if steps else DistributedOptimizer(optimizer, **options)

    def callbacks(self) -> list[keras.callbacks.Callback]:
        """Returns callbacks for broadcast, exact metrics and synchronized state, with output on rank 0 only."""
        return callbacks.standard()

    def evaluate(self, model: keras.Model, batches: tf.data.Dataset) -> dict[str, float]:
        """Evaluates the batches of each rank, which may differ in number, then sums the states of the metrics."""
        return evaluate_part(model, batches)

    def evaluation_batch(self, examples: int, global_batch: int) -> int:
        """Returns the local batch size."""
        return max(1, global_batch // self.size)

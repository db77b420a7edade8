"""`single`: one process, one replica. The yardstick for the others."""

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdkit import world
from hvdkit.optimizers.fused_update import fuse_updates
from hvdkit.strategies.base import Strategy, refuse_many_processes, refuse_options


class SingleStrategy(Strategy):
    """Plain Keras; see `Strategy` for the attributes.

    Args:
        replicas: ranks to imitate in the order of the data, so that the numbers can be compared with theirs: a global
            batch is then put together from as many shares. Default 1.
    """

    name = "single"

    def __init__(self, replicas: int | None = None) -> None:
        refuse_many_processes(self.name)
        self.world = world.enter(world.World.single())
        self.size = replicas or 1
        self.shares: Sequence[int] = range(self.size)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """No context is needed."""
        return contextlib.nullcontext()

    def distribute(self, optimizer: keras.optimizers.Optimizer, **options: Any) -> keras.optimizers.Optimizer:
        """The optimizer itself: there is nobody to exchange gradients with, and nothing to compress."""
        refuse_options(self.name, options)
        fuse_updates(optimizer)
        return optimizer

    def callbacks(self) -> list[keras.callbacks.Callback]:
        """None are needed."""
        return []

    def evaluate(self, model: keras.Model, batches: tf.data.Dataset) -> dict[str, float]:
        """`Model.evaluate`."""
        return model.evaluate(batches, verbose=0, return_dict=True)

    def evaluation_batch(self, examples: int, global_batch: int) -> int:
        """The global batch."""
        return global_batch

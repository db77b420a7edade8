"""`single`: one process, one replica; the baseline for the other strategies."""

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
        replicas: number of ranks whose data order to emulate: a global batch then takes its examples from this many
            shards, and the result is comparable with that of the ranks. Default 1.
    """

    name = "single"

    def __init__(self, replicas: int | None = None) -> None:
        refuse_many_processes(self.name)
        self.world = world.enter(world.World.single())
        self.size = replicas or 1
        self.shares: Sequence[int] = range(self.size)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a null context."""
        return contextlib.nullcontext()

    def distribute(self, optimizer: keras.optimizers.Optimizer, **options: Any) -> keras.optimizers.Optimizer:
        """Returns the optimizer itself: a single replica has nothing to reduce or compress."""
        refuse_options(self.name, options)
        fuse_updates(optimizer)
        return optimizer

    def callbacks(self) -> list[keras.callbacks.Callback]:
        """Returns no callbacks."""
        return []

    def evaluate(self, model: keras.Model, batches: tf.data.Dataset) -> dict[str, float]:
        """Calls `Model.evaluate`."""
        return model.evaluate(batches, verbose=0, return_dict=True)

    def evaluation_batch(self, examples: int, global_batch: int) -> int:
        """Returns the global batch size."""
        return global_batch

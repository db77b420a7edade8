"""`mirrored`: one process, one replica a device of this host, by `tf.distribute.MirroredStrategy`."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from hvdkit import world
from hvdkit.errors import UsageError
from hvdkit.optimizers.exchanging import ExchangingOptimizer
from hvdkit.optimizers.loss_scale import with_loss_scale
from hvdkit.optimizers.parts import parts_of
from hvdkit.strategies.base import Strategy, refuse_many_processes, refuse_options
from hvdkit.strategies.replicas import sum_over_replicas

_LOGICAL_CPUS = 2  # replicas where there is no GPU and the user named no number


class MirroredStrategy(Strategy):
    """Data parallelism inside one process; see `Strategy` for the attributes.

    Args:
        replicas: how many of this host's GPUs; without a GPU, how many logical CPUs to divide the CPU into.
    """

    name = "mirrored"

    def __init__(self, replicas: int | None = None) -> None:
        refuse_many_processes(self.name)
        self.world = world.enter(world.World.single())
        devices = _devices(replicas)
        self.size = len(devices)
        self.shares: Sequence[int] = range(self.size)
        # One way to reduce for any device: what the others copy to it is added up there, in a fixed order.
        self._strategy = tf.distribute.MirroredStrategy(
            devices, cross_device_ops=None if "GPU" in devices[0] else tf.distribute.ReductionToOneDevice()
        )

    def scope(self) -> AbstractContextManager[Any]:
        """The strategy's scope: variables made in it are mirrored."""
        return self._strategy.scope()

    def distribute(self, optimizer: keras.optimizers.Optimizer, **options: Any) -> keras.optimizers.Optimizer:
        """The optimizer, with the sum over the replicas taken before anything else.

        Keras takes it after clipping, so that each replica clips its own part of the gradient, and after the decision
        of `LossScaleOptimizer`: another model than one process trains, and another than Horovod's.

        Raises:
            UsageError: options were given that only Horovod's exchange has, or the optimizer does something that
                `tf.distribute` cannot: Keras exchanges inside a condition, and `merge_call` is not allowed there.
        """
        refuse_options(self.name, options)
        for name in ("gradient_accumulation_steps", "ema_overwrite_frequency"):
            if getattr(optimizer, name, None):
                raise UsageError(
                    f"The optimizer's {name} does not work under tf.distribute.MirroredStrategy (Keras exchanges "
                    f"inside a condition). Leave it out, or use --strategy=horovod."
                )
        optimizer = with_loss_scale(optimizer)
        for part in parts_of(optimizer):
            part._all_reduce_sum_gradients = list  # it has been done, when Keras comes to it
        # Keras has divided the loss by the number of replicas already: their sum is the average.
        return ExchangingOptimizer(optimizer, sum_over_replicas)

    def callbacks(self) -> list[keras.callbacks.Callback]:
        """None are needed: variables are mirrored and metrics are summed by `tf.distribute`."""
        return []

    def evaluate(self, model: keras.Model, batches: tf.data.Dataset) -> dict[str, float]:
        """`Model.evaluate`, which divides each batch over the devices."""
        return model.evaluate(batches, verbose=0, return_dict=True)

    def evaluation_batch(self, examples: int, global_batch: int) -> int:
        """The largest batch up to the global one of which every piece gives each device an example.

        `tf.distribute` divides a last, smaller batch by rounding up; a device that gets none of it would compute the
        mean of nothing, and NaN would be the result of all.
        """
        for batch in range(global_batch, self.size - 1, -1):
            rest = examples % batch
            if batch % self.size == 0 and (rest == 0 or -(-rest // self.size) * (self.size - 1) < rest):
                return batch
        raise UsageError(
            f"{examples} test examples cannot be divided over {self.size} devices so that each gets one of every "
            f"batch. Use fewer replicas."
        )


def _devices(replicas: int | None) -> list[str]:
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        replicas = replicas or _LOGICAL_CPUS
        world.share_cores(tf, 1)
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
        return [f"CPU:{n}" for n in range(replicas)]
    replicas = replicas or len(gpus)
    if replicas > len(gpus):
        raise UsageError(f"--replicas={replicas}, but this host has {len(gpus)} GPU(s). Use at most {len(gpus)}.")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    return [f"GPU:{n}" for n in range(replicas)]

"""`mirrored`: one process, one replica per device of this host, with `tf.distribute.MirroredStrategy`."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from hvdkit import world
from hvdkit.compat.keras3 import leave_out_reduction
from hvdkit.errors import UsageError
from hvdkit.model import fit
from hvdkit.optimizers.exchanging import ExchangingOptimizer
from hvdkit.optimizers.loss_scale import with_loss_scale
from hvdkit.optimizers.parts import parts_of
from hvdkit.strategies.base import Strategy, refuse_many_processes, refuse_options
from hvdkit.strategies.replicas import ReplicaWeighing, sum_over_replicas

_LOGICAL_CPUS = 2  # number of replicas if there is no GPU and the user gave no number


class MirroredStrategy(Strategy):
    """Data parallelism inside one process; see `Strategy` for the attributes.

    Args:
        replicas: number of this host's GPUs to use; without a GPU, number of logical CPUs to divide the CPU into.
    """

    name = "mirrored"

    def __init__(self, replicas: int | None = None) -> None:
        refuse_many_processes(self.name)
        self.world = world.enter(world.World.single())
        fit.install()  # which weighs the replicas' losses
        self._strategy = self._over_devices(replicas)
        self.size = self._strategy.num_replicas_in_sync
        self.shares: Sequence[int] = range(self.size)

    def _over_devices(self, replicas: int | None) -> tf.distribute.Strategy:
        """Configures the devices, and returns TensorFlow's strategy over them."""
        devices = _devices(replicas)
        # On CPUs, reduce on one device: it adds up the copies from all devices in a fixed order.
        return tf.distribute.MirroredStrategy(
            devices, cross_device_ops=None if "GPU" in devices[0] else tf.distribute.ReductionToOneDevice()
        )

    def scope(self) -> AbstractContextManager[Any]:
        """Returns the strategy's scope, which mirrors the variables made in it."""
        return self._strategy.scope()

    def distribute(self, optimizer: keras.optimizers.Optimizer, **options: Any) -> keras.optimizers.Optimizer:
        """Returns the optimizer, wrapped to sum gradients over the replicas before anything else.

        Keras sums after clipping, so each replica would clip its own part of the gradient. It also sums after the
        decision of `LossScaleOptimizer`. The result would differ from one process and from Horovod.

        Raises:
            UsageError: options were given that only Horovod's allreduce has. Or the optimizer uses a feature that does
                not work: Keras reduces inside a condition, where `tf.distribute` does not allow `merge_call`.
        """
        refuse_options(self.name, options)
        for name in ("gradient_accumulation_steps", "ema_overwrite_frequency"):
            if getattr(optimizer, name, None):
                raise UsageError(
                    f"The optimizer's {name} does not work with --strategy={self.name} (Keras sums gradients inside a "
                    f"condition, where tf.distribute cannot). Remove it, or use --strategy=horovod."
                )
        optimizer = with_loss_scale(optimizer)
        for part in parts_of(optimizer):
            leave_out_reduction(part)  # the sum is done before Keras calls this
        # Keras has already divided the loss by the number of replicas, so the sum of the gradients is their average.
        return ExchangingOptimizer(optimizer, sum_over_replicas, ReplicaWeighing)

    def callbacks(self) -> list[keras.callbacks.Callback]:
        """Returns no callbacks: `tf.distribute` mirrors variables and sums metrics."""
        return []

    def evaluate(self, model: keras.Model, batches: tf.data.Dataset) -> dict[str, float]:
        """Calls `Model.evaluate`, which divides each batch over the devices."""
        return model.evaluate(batches, verbose=0, return_dict=True)

    def evaluation_batch(self, examples: int, global_batch: int) -> int:
        """Returns the largest batch size up to the global one with which every device gets an example of every batch.

        `tf.distribute` divides a smaller last batch by rounding up, so a device may get no example. It would compute
        the mean of an empty batch, and the overall result would be NaN.
        """
        for batch in range(global_batch, self.size - 1, -1):
            rest = examples % batch
            if batch % self.size == 0 and (rest == 0 or -(-rest // self.size) * (self.size - 1) < rest):
                return batch
        raise UsageError(
            f"{examples} test examples cannot be divided into batches that give each of {self.size} devices an "
            f"example. Use fewer replicas."
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

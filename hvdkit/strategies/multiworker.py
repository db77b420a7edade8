"""`multiworker`: one process per replica; `tf.distribute.MultiWorkerMirroredStrategy` reduces the gradients.

Keras 3's own `fit` fails under it (keras-team/keras#20585): it passes the first batch, a tuple, to `Strategy.reduce`,
which takes single values under this strategy ("Attempt to convert a value (PerReplica: ...) ... to a Tensor").
A fix for that would not be enough:

- Keras also divides each worker's batch by the number of workers.
- The training step cannot run a collective inside the condition that Keras puts around it for `steps_per_execution`
  (see below).
- The states of metrics are either not made for the strategy (before Keras 3.10), or read by a collective. A callback
  on only one rank would then wait forever.

So `fit` does not see the strategy here. Each worker has its own variables, and only the sum of the gradients runs
under `Strategy.run`. Initial weights, metrics and BatchNormalization's statistics are synchronized as with `horovod`.
"""

from typing import Any

import keras
import tensorflow as tf

from hvdkit import world
from hvdkit.compat.tensorflow import number_collectives_when_traced
from hvdkit.errors import UsageError
from hvdkit.optimizers import weighing
from hvdkit.optimizers.exchanging import ExchangingOptimizer
from hvdkit.optimizers.gradients import Gradient
from hvdkit.optimizers.loss_scale import with_loss_scale
from hvdkit.strategies import cluster
from hvdkit.strategies.horovod import HorovodStrategy
from hvdkit.strategies.replicas import sum_over_replicas


class MultiWorkerStrategy(HorovodStrategy):
    """Data parallelism between processes with TensorFlow's own collectives; see `Strategy` for the attributes.

    Create it before TensorFlow makes its first tensor.

    Args:
        replicas: if given, the required number of ranks.

    Raises:
        UsageError: on all ranks, if `TF_CONFIG` is set, TensorFlow has started, or a host is not reachable.
    """

    name = "multiworker"

    def __init__(self, replicas: int | None = None) -> None:
        mistake = None
        try:
            super().__init__(replicas)
            cluster.refuse_tf_config()
            _take_cpu()
        except UsageError as error:
            if not world.is_initialized():
                raise
            mistake = error
        resolver = cluster.join(mistake)
        number_collectives_when_traced()
        self._strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver)

    def distribute(self, optimizer: keras.optimizers.Optimizer, **options: Any) -> keras.optimizers.Optimizer:
        """Returns the optimizer, wrapped to average gradients over the workers before anything else.

        Raises:
            UsageError: options were given that only Horovod's allreduce has.
        """
        if options:
            raise UsageError(
                f"--strategy=multiworker has no {', '.join(options)}: tf.distribute sends gradients unchanged. "
                f"Remove it, or use --strategy=horovod."
            )
        scope = _weighing if self.size > 1 else None
        return ExchangingOptimizer(with_loss_scale(optimizer), _WorkerAverage(self._strategy), scope)


class _WorkerAverage:
    """Averages gradients over the workers, in a separate graph.

    Workers match their collectives by numbers that are assigned when a graph is traced (see
    `hvdkit.compat.tensorflow.number_collectives_when_traced`). A single worker may trace a training step again, for a
    batch of a different size. This graph depends only on the variables, so all workers trace it equally often.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        self._graphs: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grads: list[Gradient]) -> list[Gradient]:
        """Returns the average of each gradient over all workers, in the order given."""
        places = [i for i, g in enumerate(grads) if g is not None]
        if self._strategy.num_replicas_in_sync == 1 or not places:
            return grads
        specs = tuple(_spec(grads[i]) for i in places)
        if specs not in self._graphs:
            self._graphs[specs] = tf.function(self._average, input_signature=[list(specs)])
        result = list(grads)
        for place, average in zip(places, self._graphs[specs]([grads[i] for i in places]), strict=True):
            result[place] = average
        return result

    @tf.autograph.experimental.do_not_convert
    def _average(self, grads: list[Gradient]) -> list[Gradient]:
        return self._strategy.run(self._average_in_replica, args=(grads,))

    @tf.autograph.experimental.do_not_convert
    def _average_in_replica(self, grads: list[Gradient]) -> list[Gradient]:
        # tf.distribute needs each tensor's device, which a function's arguments do not have.
        here = tf.nest.map_structure(tf.identity, grads, expand_composites=True)
        replicas = self._strategy.num_replicas_in_sync
        return tf.nest.map_structure(
            lambda total: (
                tf.IndexedSlices(total.values / replicas, total.indices, total.dense_shape)
                if isinstance(total, tf.IndexedSlices)
                else total / replicas
            ),
            sum_over_replicas(here),
        )


def _weighing() -> weighing.Scope:
    """Returns what weighs the workers' losses by what they count. The counts do not go through `tf.distribute`."""
    return weighing.Weighing("multiworker", world.horovod().global_process_set)


def _take_cpu() -> None:
    """Configures one logical CPU, which TensorFlow allows only while it can still join a cluster."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        for number in (2, 1):  # TensorFlow raises an error only for a change, so change it first
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * number)
    except RuntimeError as error:
        raise UsageError(
            f"The strategy multiworker must be made once, and before TensorFlow makes its first tensor ({error}). Call "
            f"hvdkit.strategies.create('multiworker') at the start of the script."
        ) from error


def _spec(grad: tf.Tensor | tf.IndexedSlices) -> Any:
    if isinstance(grad, tf.IndexedSlices):
        size = None if grad.dense_shape is None else grad.dense_shape.dtype
        return tf.IndexedSlicesSpec(grad.shape, grad.dtype, grad.indices.dtype, size, [None])
    return tf.TensorSpec(grad.shape, grad.dtype)

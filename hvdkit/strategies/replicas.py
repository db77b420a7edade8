"""What the replicas of a `tf.distribute` strategy sum: gradients, and what their losses count."""

import contextlib
from typing import Any

import tensorflow as tf

from hvdkit.optimizers.gradients import Gradient
from hvdkit.optimizers.weighing import Weighing, examples_of_call


class ReplicaWeighing(Weighing):
    """Weighs losses by what the replicas of the current `tf.distribute` strategy count; made in a replica context.

    Keras divides each mean by the number of replicas, and a sum by nothing. `sum_over_replicas` adds up the gradients.
    """

    def __init__(self) -> None:
        super().__init__("replicas", _Replicas(), averages=False)

    def after(self, value: tf.Tensor) -> contextlib.AbstractContextManager[Any]:
        """Returns a null context: `tf.distribute` keeps the order of its collectives."""
        return contextlib.nullcontext()

    def shown_of_sum(self) -> Any:
        """Returns the factor with which a sum is shown, beside the number of replicas, by which Keras multiplies."""
        return tf.math.divide_no_nan(1.0, self.factor_by_size())

    def factor_by_size(self) -> Any:
        """Returns the size of this replica's batch over the mean size.

        `tf.distribute` divides a batch by rounding up, so the last replicas may have fewer examples.
        """
        mine = examples_of_call()
        return tf.math.divide_no_nan(self.parts * mine, self.sum(mine))

    def sum(self, counts: tf.Tensor) -> tf.Tensor:
        """Returns the sum over replicas."""
        replica = tf.distribute.get_replica_context()
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, tf.stop_gradient(counts))


class _Replicas:
    """The replicas of the current strategy, in place of a process set."""

    def size(self) -> int:
        """Returns their number."""
        return tf.distribute.get_strategy().num_replicas_in_sync


def sum_over_replicas(grads: list[Gradient]) -> list[Gradient]:
    """Sums gradients over replicas. Call it in a replica context. None stays None, sparse gradients stay sparse."""
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return grads
    result = list(grads)
    for dtype in sorted({g.dtype.name for g in grads if g is not None}):  # a buffer holds a single dtype
        places = [i for i, g in enumerate(grads) if g is not None and g.dtype.name == dtype]
        reduced = replica.all_reduce(tf.distribute.ReduceOp.SUM, [grads[i] for i in places])
        for place, total in zip(places, reduced, strict=True):
            result[place] = total
    return result

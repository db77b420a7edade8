"""Sums gradients over the replicas of a `tf.distribute` strategy."""

import tensorflow as tf

from hvdkit.optimizers.gradients import Gradient


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

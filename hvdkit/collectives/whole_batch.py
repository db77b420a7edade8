"""`whole_batch`: the examples of all ranks, for a loss that compares examples with each other.

Let rank r of N have the examples z_r, and the loss L_r of its own examples against those of all ranks. One process has
the loss L = (L_1 + ... + L_N) / N, so dL/dz_r = (dL_1/dz_r + ... + dL_N/dz_r) / N. `DistributedOptimizer` divides by N,
so the gradient of gathering must be the *sum* over ranks. Horovod's allgather takes their mean, with which other ranks'
examples count N times less than in one process.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.collectives import operations, wire


@tf.autograph.experimental.do_not_convert
def whole_batch(value: Any, name: str | None = None, process_set: Any = None) -> Any:
    """Concatenates the ranks' examples, for losses that compare each example with those of all ranks.

    Contrastive losses and in-batch negatives need more than a rank's own examples. Let each rank compute the mean loss
    of its own examples against those of all: with equal batches, `DistributedOptimizer` and `DistributedGradientTape`
    then train what one process trains with the global batch. A collective call, forwards and backwards. `allgather`
    does not do this: its gradient is Horovod's, the mean over ranks.

    Args:
        value: floats [examples, ...]; only the number of examples may differ between ranks.
        name: name of the collective, the same on all ranks.
        process_set: the ranks that take part, which must be those of the optimizer; by default all.

    Returns:
        A tensor [examples of all ranks, ...], in the order of ranks.

    Raises:
        ValueError: the value is a scalar.

    Example, with `first = hvd.rank() * len(images)` and embeddings of length one:
        logits = tf.matmul(images, hvd.whole_batch(texts), transpose_b=True)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.range(first, first + len(images)), logits)
    """
    name = name or wire.caller("whole_batch")

    @tf.custom_gradient
    def gathered(part: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            total = operations.allreduce(
                tf.convert_to_tensor(upstream), f"{name}.gradient", op=world.horovod().Sum, process_set=process_set
            )
            rows = tf.shape(part)[:1]
            everyone = operations.allgather(rows, f"{name}.rows", process_set=process_set)
            start = tf.reduce_sum(everyone[: (process_set or world).rank()])
            return total[start : start + rows[0]]

        return operations.allgather(part, name, process_set=process_set), gradient

    tensor = tf.convert_to_tensor(value)
    return gathered(tensor) if collectives.takes_part(process_set) else tensor

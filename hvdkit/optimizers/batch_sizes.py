"""Whether the ranks' batches have one size in a step, which decides whether their losses must be weighed by it.

Equal batches need no weights, and no message to find them. But a rank sees its own batch only, and the others' sizes
must be known before the backward pass. So a flag, the same on all ranks, says in which steps the ranks sum their sizes
in a small allreduce: in `fit`, those in which sizes may differ (see `hvdkit.model.batch_sizes`); elsewhere, in all. In
the other steps each rank takes its own size for that of all, and the heartbeat tells if this was wrong.
"""

from collections.abc import Callable

import tensorflow as tf

from hvdkit.optimizers import heartbeat
from hvdkit.optimizers.singletons import OncePerGraph


class BatchSizes:
    """This process's flag, and the size of its last batch.

    Attributes:
        compares: whether the ranks sum their sizes; set by `compare`.
    """

    def __init__(self) -> None:
        self.compares = True
        with tf.init_scope():  # a tf.function, where the first loss may be traced, cannot create variables
            self._compares = tf.Variable(True, trainable=False, name="compares_batch_sizes")
            self._compared = tf.Variable(0.0, trainable=False, name="compared_batch_size")

    def compare(self, on: bool) -> None:
        """Sets whether the ranks sum their sizes from the next step on. All ranks that train together call it alike."""
        if on != self.compares:
            self.compares = on
            self._compares.assign(on)

    def compared(self) -> float:
        """Returns the size of this rank's batch in the last step that compared sizes."""
        return float(self._compared.numpy())

    def factor(
        self, examples: tf.Tensor, ranks: int, sum_over_ranks: Callable[[tf.Tensor], tf.Tensor], notes: bool = True
    ) -> tf.Tensor:
        """Returns the size of this rank's batch over the mean size; 1 in steps that do not compare.

        Args:
            examples: the size of this rank's batch, float32, scalar.
            ranks: the number of ranks.
            sum_over_ranks: the allreduce.
            notes: whether all ranks of the heartbeat have such a batch, so that it can tell if sizes differ.
        """

        def compared() -> tf.Tensor:
            self._compared.assign(examples)
            if notes:
                heartbeat.current().note_batch(0.0)
            return tf.math.divide_no_nan(ranks * examples, sum_over_ranks(examples))

        def alike() -> tf.Tensor:
            if notes:
                heartbeat.current().note_batch(examples)
            return tf.ones([])

        return tf.cond(self._compares.read_value(), compared, alike)


current = OncePerGraph(BatchSizes)  # returns this process's batch sizes

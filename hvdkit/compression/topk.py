"""Top-k: sends the largest entries of the gradient, and keeps the others for later steps.

D. Alistarh et al., "The convergence of sparsified gradient methods", 2018, https://arxiv.org/abs/1809.10505. The
threshold comes from a sample (Y. Lin et al., "Deep gradient compression", 2018, https://arxiv.org/abs/1712.01887,
section 5): sorting millions of entries would take longer than sending them.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdkit import collectives
from hvdkit.collectives.traffic import elements
from hvdkit.compression.feedback import ErrorFeedback, State, join, part, poison, variable

_SAMPLE = 1 << 16
_ENTRY_BYTES = 8  # a float32 and an int32


class TopK(ErrorFeedback):
    """Sends the entries of largest magnitude, with their indices.

    Args:
        fraction: fraction of all entries, above 0 and up to 1; if many are equal, up to twice as many are sent.

    Raises:
        ValueError: `fraction` is not above 0 and up to 1.
    """

    def __init__(self, fraction: float = 0.01) -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be above 0 and up to 1, but is {fraction}")
        self.fraction = fraction

    def make_state(self, shapes: Sequence[tuple[int, ...]], ranks: int) -> None:
        """Creates one vector, the compression error."""
        self._error = variable((elements(shapes),), "topk_error")
        self.own.append(self._error)

    def average(
        self, gradients: list[tf.Tensor], payload: tf.Tensor, name: str, process_set: Any
    ) -> tuple[list[tf.Tensor], tf.Tensor, State]:
        """Allgathers every rank's entries and sums them by index."""
        vector = join(gradients) + self._error.value
        places = self._largest(tf.where(tf.math.is_finite(vector), vector, 0.0))
        values = tf.gather(vector, places) + poison(vector)
        rest = tf.tensor_scatter_nd_update(vector, places[:, tf.newaxis], tf.zeros_like(values))
        # One message: entries as pairs, then the payload as pairs with its indices.
        extra = tf.stack([payload, tf.bitcast(tf.range(-1, -1 - payload.shape[0], -1), tf.float32)], axis=1)
        pairs = tf.concat([tf.stack([values, tf.bitcast(places, tf.float32)], axis=1), extra], axis=0)
        everyone = collectives.gather_rows(pairs, name, process_set)
        where = tf.bitcast(everyone[:, 1], tf.int32)
        total = tf.math.unsorted_segment_sum(everyone[:, 0], tf.where(where < 0, -1 - where, -1), payload.shape[0])
        sums = tf.math.unsorted_segment_sum(everyone[:, 0], where, vector.shape[0])  # negative indices are ignored
        averages = part(sums / process_set.size(), [tuple(g.shape) for g in gradients])
        return averages, total, [(self._error, rest)]

    def wire_bytes(self, shapes: Sequence[tuple[int, ...]], ranks: int) -> float:
        """Counts each rank's entries, sent to all other ranks."""
        return (ranks - 1) * _ENTRY_BYTES * self._count(elements(shapes))

    def _count(self, length: int) -> int:
        return max(1, round(self.fraction * length))

    def _largest(self, vector: tf.Tensor) -> tf.Tensor:
        """Returns the indices of approximately the largest entries, int32."""
        length = vector.shape[0]
        size = tf.abs(vector)
        stride = max(1, length // _SAMPLE) | 1  # odd, so the sample of rows of even length covers more than one column
        sample = size[::stride]
        threshold = tf.math.top_k(sample, self._count(sample.shape[0]), sorted=True).values[-1]
        found = tf.cast(tf.where(size >= threshold)[:, 0], tf.int32)
        most = min(length, 2 * self._count(length))
        return tf.cond(
            tf.size(found) > most,
            lambda: tf.gather(found, tf.math.top_k(tf.gather(size, found), most).indices),
            lambda: found,
        )

"""Count the zeros of gradients, which are not sent over slow links (see `hvdkit/native/pack.h`)."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf


class ZeroShare(keras.callbacks.Callback):
    """Record which fraction of the dense gradients' elements is zero in the last step of a training on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self._share = tf.Variable(0.0, trainable=False)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Count in each step that is traced from now on, which takes a pass over the gradients."""
        optimizer = self.model.optimizer
        apply = optimizer.apply

        def count_and_apply(grads: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            dense = [tf.convert_to_tensor(g) for g in grads if g is not None and not isinstance(g, tf.IndexedSlices)]
            zeros = sum(tf.size(g) - tf.math.count_nonzero(g, dtype=tf.int32) for g in dense)
            elements = sum(tf.size(g) for g in dense)
            self._share.assign(tf.cast(zeros / tf.maximum(elements, 1), tf.float32))
            return apply(grads, *args, **kwargs)

        optimizer.apply = count_and_apply

    def on_train_end(self, logs: dict | None = None) -> None:
        """Stop counting."""
        del self.model.optimizer.apply

    def share(self) -> float:
        """Return the fraction of zeros, from 0 to 1."""
        return float(self._share)

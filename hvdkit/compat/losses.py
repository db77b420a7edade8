"""How Keras 3 reduces a loss: the one function that turns a value per element into one number.

Keras weighs the values by mask and sample weights, and divides their sum by what it counts: the denominator. Every
`keras.losses.Loss` does so in one private function, in Keras 3.10 to 3.16.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from hvdkit.compat.lookup import missing_in_keras, private

_FUNCTION = "reduce_weighted_values"


class Elements(NamedTuple):
    """What Keras reduces to one number.

    Attributes:
        values: a loss per element, in the loss's dtype.
        weights: sample weights, or None.
        mask: which elements count, or None.
        reduction: name of the reduction, or None.
    """

    values: Any
    weights: Any
    mask: Any
    reduction: str | None

    @property
    def is_reduced(self) -> bool:
        """Whether the values are one number already: Keras then leaves them as they are."""
        return self.values.shape.rank == 0

    @property
    def is_summed(self) -> bool:
        """Whether nothing divides the sum. Training without a reduction adds up the values' gradients."""
        return self.reduction in ("sum", "none", None)

    @property
    def counts_some(self) -> bool:
        """Whether the denominator depends on a mask or on weights, not on the number of elements alone."""
        return self.mask is not None or (self.reduction == "mean_with_sample_weight" and self.weights is not None)

    def denominator(self) -> tf.Tensor:
        """Returns what Keras divides the weighed sum by, in the values' dtype, scalar."""
        if self.reduction == "mean_with_sample_weight" and self.counts_some:
            apply_mask = private(_module(), "apply_mask")
            weights = apply_mask(self.weights, self.mask, dtype=self.values.dtype, reduction=self.reduction)
            return tf.reduce_sum(tf.cast(weights, self.values.dtype))
        count = tf.cast(tf.size(self.values), self.values.dtype)
        if self.mask is None:
            return count
        valid, places = tf.reduce_sum(tf.cast(self.mask, count.dtype)), tf.cast(tf.size(self.mask), count.dtype)
        return count * tf.math.divide_no_nan(valid, places)


def reduction_of_keras() -> Callable:
    """Returns the function `(values, sample_weight, mask, reduction, dtype) -> loss` that each loss calls once."""
    return private(_module(), _FUNCTION)


def replace_reduction(reduce: Callable[[Elements, Callable[[], Any]], Any]) -> Callable[[], None]:
    """Replaces that function, in all losses.

    Args:
        reduce: takes what is reduced and a function that returns Keras' result, and returns the loss.

    Returns:
        A function that restores Keras' own.
    """
    original = reduction_of_keras()

    def replacement(
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: Any = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        values = keras.ops.convert_to_tensor(values, dtype=dtype)
        elements = Elements(values, sample_weight, mask, reduction)
        return reduce(elements, lambda: original(values, sample_weight, mask, reduction, dtype))

    setattr(_module(), _FUNCTION, replacement)
    return lambda: setattr(_module(), _FUNCTION, original)


def _module() -> Any:
    try:
        from keras.src.losses import loss
    except ImportError as error:
        raise missing_in_keras("keras.src.losses.loss") from error
    return loss

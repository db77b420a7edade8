"""Updates of weights in one pass over memory, where Keras takes many.

Keras writes an optimizer in operations on whole arrays. Adam is a dozen, which read and write arrays as large as the
weights thirty times: in a network of matrices that is half a step, and in a small network a fifth of it. Here they are
one operation a variable: hvdkit's own for Adam, and TensorFlow's for gradient descent. The results are Keras', bit for
bit. Where an operation does not fit (on GPUs, in half precision, under XLA, without `hvdkit.native`), Keras' are used.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdkit import call_stack, native


def fuse(optimizer: keras.optimizers.Optimizer) -> None:
    """Lets an Adam, AdamW or SGD of Keras' update each variable by one operation; others stay as they are.

    Everything around the update is Keras' own: clipping, weight decay, moving averages, accumulation, loss scale.

    Args:
        optimizer: one that takes steps itself (see `hvdkit.optimizer.parts_of`), built or not.
    """
    fused = _FUSED.get(type(optimizer).update_step)  # none where a subclass has an update of its own
    if fused is not None:
        optimizer.update_step = functools.partial(_update, *fused, optimizer)


def _update(fits: Callable, update: Callable, optimizer: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    """Takes the place of `update_step`, which has the last three arguments."""
    if fits(optimizer, gradient, variable) and not call_stack.is_in_xla():
        update(optimizer, gradient, variable, learning_rate)
    else:
        type(optimizer).update_step(optimizer, gradient, variable, learning_rate)


def _fits_adam(optimizer: Any, gradient: Any, variable: Any) -> bool:
    is_on_host = "CPU" in variable.device or not tf.config.list_logical_devices("GPU")
    is_known = variable.dtype in (tf.float32, tf.float64)
    if isinstance(gradient, tf.IndexedSlices):
        is_known = is_known and gradient.indices.dtype in (tf.int32, tf.int64)
    return is_on_host and is_known and not optimizer.amsgrad and native.is_built()


def _adam(optimizer: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    """D. P. Kingma and J. Ba, "Adam", 2015, in the form at the end of its section 2."""
    place, dtype = optimizer._get_variable_index(variable), variable.dtype
    slots = [slots[place].value.handle for slots in (optimizer._momentums, optimizer._velocities)]
    step = tf.cast(optimizer.iterations + 1, dtype)
    power_1, power_2 = (tf.pow(tf.cast(beta, dtype), step) for beta in (optimizer.beta_1, optimizer.beta_2))
    scalars = {
        "alpha": tf.cast(learning_rate, dtype) * tf.sqrt(1 - power_2) / (1 - power_1),
        "rest_1": tf.constant(1 - optimizer.beta_1, dtype),
        "rest_2": tf.constant(1 - optimizer.beta_2, dtype),
        "epsilon": tf.constant(optimizer.epsilon, dtype),
    }
    if isinstance(gradient, tf.IndexedSlices):
        values = tf.cast(gradient.values, dtype)
        native.load().hvdkit_sparse_adam(_handle(variable), *slots, values, gradient.indices, **scalars)
    else:
        native.load().hvdkit_adam(_handle(variable), *slots, tf.cast(gradient, dtype), **scalars)


def _fits_sgd(optimizer: Any, gradient: Any, variable: Any) -> bool:
    return isinstance(gradient, tf.Tensor)


def _sgd(optimizer: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    """Gradient descent, with momentum or with Nesterov's."""
    dtype = variable.dtype
    gradient, rate = tf.cast(gradient, dtype), tf.cast(learning_rate, dtype)
    if not optimizer.momentum:
        tf.raw_ops.ResourceApplyGradientDescent(var=_handle(variable), alpha=rate, delta=gradient)
        return
    tf.raw_ops.ResourceApplyKerasMomentum(
        var=_handle(variable),
        accum=optimizer.momentums[optimizer._get_variable_index(variable)].value.handle,
        lr=rate,
        grad=gradient,
        momentum=tf.cast(optimizer.momentum, dtype),
        use_nesterov=optimizer.nesterov,
    )


def _handle(variable: Any) -> tf.Tensor:
    return (variable.value if isinstance(variable, keras.Variable) else variable).handle


_FUSED = {
    keras.optimizers.Adam.update_step: (_fits_adam, _adam),
    keras.optimizers.SGD.update_step: (_fits_sgd, _sgd),
}

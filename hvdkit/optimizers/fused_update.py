"""Updates of weights in one pass over memory, where Keras takes many.

Keras writes an optimizer in operations on whole arrays. Adam is a dozen, which read and write arrays as large as the
weights thirty times, 31 ms a step for 5.8 million of them. Here an update is one operation a variable, and takes 10 ms:
hvdkit's own for Adam, and TensorFlow's for gradient descent. The results are Keras', bit for bit. Where an operation
does not fit (on GPUs, inside of XLA, and Adam in half precision or without `hvdkit.native`), Keras' are used.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdkit import native
from hvdkit.compat import call_stack, keras3
from hvdkit.optimizers.parts import parts_of


def fuse(optimizer: keras.optimizers.Optimizer) -> None:
    """Lets an Adam, AdamW or SGD of Keras' update each variable by one operation; others stay as they are.

    Everything around the update is Keras' own: clipping, weight decay, moving averages, accumulation, loss scale.

    Args:
        optimizer: one that takes steps itself (see `hvdkit.optimizers.parts`), built or not.
    """
    kind, keras_own = type(optimizer), keras.optimizers.Optimizer
    # None where a subclass, a proxy or this very optimizer has an update of its own, or one of the parts of Keras'.
    if not issubclass(kind, keras_own):
        return
    fused = _FUSED.get(keras3.update_of(kind))
    if fused is None or keras3.has_own_update(optimizer):
        return
    if all(getattr(kind, part) is getattr(keras_own, part) for part in ("assign", "assign_add", "assign_sub")):
        keras3.replace_update(optimizer, functools.partial(_update, *fused, optimizer))


def _update(fits: Callable, update: Callable, optimizer: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    """Takes the place of `update_step`, which has the last three arguments."""
    inner = keras3.native_variable(variable)
    is_on_host = "CPU" in inner.device or not tf.config.list_logical_devices("GPU")
    has_its_shape = tf.TensorShape(gradient.shape).is_compatible_with(inner.shape)  # Keras would stretch it
    if is_on_host and has_its_shape and fits(optimizer, gradient, inner) and not call_stack.is_in_xla():
        update(optimizer, gradient, inner, learning_rate)
    else:
        keras3.update_of(type(optimizer))(optimizer, gradient, variable, learning_rate)


def _fits_adam(optimizer: Any, gradient: Any, variable: tf.Variable) -> bool:
    if isinstance(gradient, tf.IndexedSlices) and gradient.indices.dtype not in (tf.int32, tf.int64):
        return False
    dtypes = {tf.as_dtype(v.dtype) for v in (variable, *keras3.adam_slots(optimizer, variable))}
    return dtypes in ({tf.float32}, {tf.float64}) and not optimizer.amsgrad and native.is_built()


def _adam(optimizer: Any, gradient: Any, variable: tf.Variable, learning_rate: Any) -> None:
    """D. P. Kingma and J. Ba, "Adam", 2015, in the form at the end of its section 2."""
    dtype = variable.dtype
    slots = [slot.value.handle for slot in keras3.adam_slots(optimizer, variable)]
    step = tf.cast(optimizer.iterations + 1, dtype)
    power_1, power_2 = (tf.pow(tf.cast(beta, dtype), step) for beta in (optimizer.beta_1, optimizer.beta_2))
    scalars = {
        "alpha": tf.cast(learning_rate, dtype) * tf.sqrt(1 - power_2) / (1 - power_1),
        "rest_1": keras.ops.convert_to_tensor(1 - optimizer.beta_1, dtype),
        "rest_2": keras.ops.convert_to_tensor(1 - optimizer.beta_2, dtype),
        "epsilon": keras.ops.convert_to_tensor(optimizer.epsilon, dtype),
    }
    if isinstance(gradient, tf.IndexedSlices):
        values = tf.cast(gradient.values, dtype)
        native.load().hvdkit_sparse_adam(variable.handle, *slots, values, gradient.indices, **scalars)
    else:
        native.load().hvdkit_adam(variable.handle, *slots, tf.cast(gradient, dtype), **scalars)


def _fits_sgd(optimizer: Any, gradient: Any, variable: tf.Variable) -> bool:
    return isinstance(gradient, tf.Tensor)


def _sgd(optimizer: Any, gradient: Any, variable: tf.Variable, learning_rate: Any) -> None:
    """Gradient descent, with momentum or with Nesterov's."""
    dtype = variable.dtype
    gradient, rate = tf.cast(gradient, dtype), tf.cast(learning_rate, dtype)
    if not optimizer.momentum:
        tf.raw_ops.ResourceApplyGradientDescent(var=variable.handle, alpha=rate, delta=gradient)
        return
    tf.raw_ops.ResourceApplyKerasMomentum(
        var=variable.handle,
        accum=keras3.sgd_slot(optimizer, variable).value.handle,
        lr=rate,
        grad=gradient,
        momentum=tf.cast(optimizer.momentum, dtype),
        use_nesterov=optimizer.nesterov,
    )


_FUSED = {
    keras3.update_of(keras.optimizers.Adam): (_fits_adam, _adam),
    keras3.update_of(keras.optimizers.SGD): (_fits_sgd, _sgd),
}


def fuse_updates(optimizer: keras.optimizers.Optimizer) -> None:
    """Lets an optimizer, and those inside of it, update each variable in one pass over memory."""
    for part in parts_of(optimizer):
        fuse(part)

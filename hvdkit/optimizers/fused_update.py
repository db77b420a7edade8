"""Weight updates in one pass over memory, where Keras makes many passes.

Keras writes an optimizer as operations on whole arrays. Adam has a dozen of them, which read and write weight-sized
arrays thirty times: 31 ms a step for 5.8 million weights. Here an update is one operation per variable and takes 10 ms.
Adam uses hvdkit's own operation, gradient descent uses TensorFlow's. The results equal Keras' bit for bit. Keras'
operations still run where these do not apply: on GPUs, inside XLA, and for Adam in half precision or without
`hvdkit.native`.
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
    """Makes a Keras Adam, AdamW or SGD update each variable with one operation; others stay unchanged.

    Everything around the update remains Keras' own: clipping, weight decay, moving averages, accumulation, loss scale.

    Args:
        optimizer: an optimizer that applies updates itself (see `hvdkit.optimizers.parts`), built or not.
    """
    kind, keras_own = type(optimizer), keras.optimizers.Optimizer
    # None if a subclass, a proxy or this optimizer overrides the update, or any part of Keras' update.
    if not issubclass(kind, keras_own):
        return
    fused = _FUSED.get(keras3.update_of(kind))
    if fused is None or keras3.has_own_update(optimizer):
        return
    if all(getattr(kind, part) is getattr(keras_own, part) for part in ("assign", "assign_add", "assign_sub")):
        keras3.replace_update(optimizer, functools.partial(_update, *fused, optimizer))


def _update(fits: Callable, update: Callable, optimizer: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    """Replaces `update_step`, which takes the last three arguments."""
    inner = keras3.native_variable(variable)
    is_on_host = "CPU" in inner.device or not tf.config.list_logical_devices("GPU")
    has_its_shape = tf.TensorShape(gradient.shape).is_compatible_with(inner.shape)  # Keras would broadcast it
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
    """Updates by D. P. Kingma and J. Ba, "Adam", 2015, in the form at the end of section 2."""
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
    """Updates by gradient descent, with or without momentum or Nesterov momentum."""
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
    """Makes an optimizer, and those inside it, update each variable in one pass over memory."""
    for part in parts_of(optimizer):
        fuse(part)

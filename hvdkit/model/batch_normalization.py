"""Batch normalization over the batches of all ranks, as `BatchNormalization(synchronized=True)` promises.

Keras supports this flag only under `tf.distribute`; this module makes it work in a job of several ranks, too. The
layers remain Keras' own and differ only in the flag: they are cloned, saved and loaded with it. A saved model opens in
plain Keras, where a single process needs no allreduce.
"""

import logging
from typing import Any

import keras
import tensorflow as tf

from hvdkit import world
from hvdkit.collectives import wire
from hvdkit.collectives.mesh import mesh_of
from hvdkit.compat import keras3

_log = logging.getLogger(__name__)

_keras_moments = keras3.moments_of_keras()


def SyncBatchNormalization(fused: bool = False, **arguments: Any) -> keras.layers.BatchNormalization:  # noqa: N802 - Horovod's
    """Returns a `keras.layers.BatchNormalization` that uses the moments of the global batch in training.

    Local batches may differ in length: each unmasked example counts once. In training, each call allreduces three
    float64 numbers per channel, and three more in the backward pass. The gradient is that of the global batch, provided
    that it is averaged over the ranks (`DistributedOptimizer`). All ranks must call the layers in the same order.

    XLA cannot compile the allreduce, and `keras.layers.TimeDistributed` cannot vectorize it.

    Args:
        fused: must be False, accepted for compatibility with Horovod; Keras 3 has no fused kernel.
        **arguments: see `keras.layers.BatchNormalization`.

    Raises:
        ValueError: `fused` is true.

    Reference: S. Ioffe and C. Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167; the API is that
    of `horovod.tensorflow.SyncBatchNormalization`.
    """
    honour_flag()
    if fused:
        raise ValueError("SyncBatchNormalization(fused=True) is not possible: the ranks' moments are exchanged.")
    layer = keras.layers.BatchNormalization(**{**arguments, "synchronized": True})
    layer.supports_jit = False
    return layer


def synchronize_batch_normalization(model: keras.Model) -> keras.Model:
    """Makes every `BatchNormalization` of a built model, including nested ones, use the moments of the global batch.

    Changes the layers in place; they keep their weights. The training step is traced again.

    Args:
        model: any Keras model, for example one of `keras.applications`. Call this before `compile`.

    Returns:
        The model.
    """
    honour_flag()
    layers = [layer for layer in keras3.layers_of(model) if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in layers:
        layer.synchronized = True
        layer.supports_jit = False
    if model.compiled:
        model.train_function = None
        model.jit_compile = False
    _log.info("%d BatchNormalization layer(s) of %s take their moments over all ranks.", len(layers), model.name)
    return model


def honour_flag() -> None:
    """Makes Keras' `BatchNormalization(synchronized=True)` apply to all ranks in a job of several ranks."""
    keras3.replace_moments(_moments)


def _moments(self: Any, inputs: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns mean and variance of each channel; replaces Keras' method of this name."""
    ranks = _ranks_of(self) if self.synchronized and world.is_initialized() and world.size() > 1 else None
    if ranks is None or ranks.size() == 1:
        return _keras_moments(self, inputs, mask)
    axes, shape = keras3.reduction_axes(self), tf.shape(inputs)
    if mask is None:
        mean, variance = keras.ops.moments(inputs, axes=axes)
        counted = tf.fill(tf.shape(mean), tf.size(inputs, tf.int64) // tf.size(mean, tf.int64))
    else:
        mean, variance = _keras_moments(self, inputs, mask)
        counted = tf.math.count_nonzero(tf.broadcast_to(tf.cast(mask, tf.bool)[..., None], shape), axis=axes)
    # Steps in one graph are ordered by this layer's weights. This control dependency orders their collectives as well.
    with tf.control_dependencies([tf.convert_to_tensor(self.moving_mean)]):
        counted = tf.identity(counted)
    channels = [inputs.shape[self.axis]]
    mean, variance = _moments_of_all(tf.reshape(mean, channels), tf.reshape(variance, channels), counted, ranks)
    return tf.cast(mean, inputs.dtype), tf.cast(variance, inputs.dtype)


def _ranks_of(layer: keras.layers.BatchNormalization) -> Any:
    """Returns the ranks that have the layer, as a process set: of a divided model, those that hold the same part."""
    mesh = mesh_of([layer.moving_mean])
    return world.horovod().global_process_set if mesh is None else mesh.data_set


def _moments_of_all(
    mean: tf.Tensor, variance: tf.Tensor, counted: tf.Tensor, ranks: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    """Combines the ranks' moments [channels], in float64, where `E[x²] - E[x]²` does not lose precision."""
    count, mean, variance = (tf.cast(t, tf.float64) for t in (counted, mean, variance))
    mean, variance = (tf.where(count > 0, t, tf.zeros_like(t)) for t in (mean, variance))
    sums = _sum_over_ranks(tf.stack([count, count * mean, count * (variance + mean**2)]), ranks)
    count, total, squares = tf.unstack(sums)
    mean = tf.math.divide_no_nan(total, count)
    return mean, tf.maximum(tf.math.divide_no_nan(squares, count) - mean**2, 0.0)


def _sum_over_ranks(values: tf.Tensor, ranks: Any) -> tf.Tensor:
    """Sums over ranks; every rank's loss depends on the sum, so its gradient is the sum of all ranks' gradients.

    Horovod registers such a gradient, but lets TensorFlow name the operation. TensorFlow appends a number to such a
    name, and the numbers differ between ranks if one rank has created more tensors than the others.
    """

    def total(tensor: tf.Tensor) -> tf.Tensor:
        name = f"hvdkit.batch_normalization.{tensor.shape[-1]}"
        (result,) = wire.run("allreduce", [tensor], name, ranks, op=world.horovod().Sum)
        return tf.ensure_shape(result, tensor.shape)

    @tf.custom_gradient
    def summed(tensor: tf.Tensor) -> tuple[tf.Tensor, Any]:
        return total(tensor), total

    return summed(values)

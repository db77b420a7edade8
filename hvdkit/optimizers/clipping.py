"""Clipping by norm: for sharded models, whose norm is that of the whole gradient, and in the wrong place.

Keras clips the gradients it is given, but a rank of a sharded model has only parts of them. This module therefore sums
the squared norms over the ranks that hold one model together, and then applies Keras' rule.
"""

import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.collectives import wire
from hvdkit.collectives.mesh import Shard, mesh_of, shard_of

_log = logging.getLogger(__name__)
_CLIPPED = re.compile(r"(^|/)clip_by_(global_)?norm")  # names of TensorFlow's operations


def warn_of_clipped(grads: Sequence[Any]) -> None:
    """Warns of gradients that were clipped by their norm before the ranks average them; seen in graphs only."""
    if tf.executing_eagerly() or world.rank():
        return
    values = [grad.values if isinstance(grad, tf.IndexedSlices) else grad for grad in grads if grad is not None]
    if any(_CLIPPED.search(value.op.name) for value in values if isinstance(value, tf.Tensor)):
        _warn_once()


@functools.cache
def _warn_once() -> None:
    _log.warning(
        "The gradients are clipped by the norm that they have on each rank, and then averaged. One process clips the "
        "average, and trains another model. Give the optimizer global_clipnorm=... or clipnorm=..., or average first: "
        "tape = hvd.DistributedGradientTape(tape), with an optimizer that is not distributed."
    )


def clip_over_shards(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[Any], grads: list[Any], keras_clip: Callable
) -> list[Any]:
    """Clips by the norms of whole gradients where variables are shards, and as Keras does elsewhere.

    Args:
        optimizer: the optimizer whose clipping settings apply.
        variables: the variables that `grads` belong to.
        grads: one gradient per variable.
        keras_clip: Keras' own clipping function, which takes `grads`.
    """
    shards, mesh = [shard_of(v) for v in variables], mesh_of(variables)
    by_norm = optimizer.clipnorm or optimizer.global_clipnorm
    if mesh is None or mesh.model == 1 or not by_norm or len(shards) != len(grads):
        return keras_clip(grads)
    if optimizer.clipnorm:
        return _clip_each(grads, shards, mesh, optimizer.clipnorm)
    return _clip_all(grads, shards, mesh, optimizer.global_clipnorm)


def _clip_each(grads: list[Any], shards: Sequence[Shard | None], mesh: Any, limit: float) -> list[Any]:
    """Applies `clipnorm`: clips each variable's gradient by its own norm."""
    squares = _squares(grads)
    divided = [i for i, shard in enumerate(shards) if shard is not None and shard.axis is not None]
    if divided:  # the same variables on all ranks of a row
        whole = _sum(tf.stack([squares[i] for i in divided]), mesh, "each")
        for number, place in enumerate(divided):
            squares[place] = whole[number]
    return [_scaled(g, limit / tf.maximum(tf.sqrt(s), limit)) for g, s in zip(grads, squares, strict=True)]


def _clip_all(grads: list[Any], shards: Sequence[Shard | None], mesh: Any, limit: float) -> list[Any]:
    """Applies `global_clipnorm`: clips all gradients by their global norm, counting replicated gradients once."""
    counts = [shard is not None or mesh.model_index == 0 for shard in shards]
    squares = _squares(grads)
    mine = [square for square, counted in zip(squares, counts, strict=True) if counted]
    norm = tf.sqrt(_sum(tf.add_n(mine) if mine else wire.zeros([], norm_dtype(grads)), mesh, "all"))
    scale = limit * tf.minimum(1 / norm, 1 / limit) + (norm - norm)  # NaN if the norm is not finite, as in Keras
    return [tf.convert_to_tensor(g) * tf.cast(scale, g.dtype) for g in grads]  # dense, as in Keras


def norm_dtype(grads: Sequence[Any]) -> tf.DType:
    """Returns the dtype in which the norms of gradients are computed: float64 if one of them is, else float32."""
    return tf.float64 if any(g.dtype == tf.float64 for g in grads) else tf.float32


def _squares(grads: Sequence[Any]) -> list[tf.Tensor]:
    """Returns the squared norm of each gradient."""
    dtype = norm_dtype(grads)
    values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in grads]
    return [tf.reduce_sum(tf.square(tf.cast(v, dtype))) for v in values]


def _scaled(grad: Any, factor: tf.Tensor) -> Any:
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(grad.values * tf.cast(factor, grad.values.dtype), grad.indices, grad.dense_shape)
    return grad * tf.cast(factor, grad.dtype)


def _sum(values: tf.Tensor, mesh: Any, name: str) -> tf.Tensor:
    op = world.horovod().Sum
    return collectives.reduce_dense([values], f"hvdkit.clip.{name}", op=op, process_set=mesh.model_set)[0]

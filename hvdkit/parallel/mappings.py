"""Collectives with gradients, inside a model that is divided over the ranks of a row.

They come in conjugate pairs (M. Shoeybi et al., "Megatron-LM", 2019, https://arxiv.org/abs/1909.08053, section 3): one
is the identity in the forward pass and a sum in the backward pass, the other the reverse. After a `total` or `joined`,
all ranks compute the same. So the gradient that comes back to it is the same on all ranks, too.
"""

import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.collectives.mesh import Mesh


def spread(x: tf.Tensor, mesh: Mesh, name: str) -> tf.Tensor:
    """Returns its input, from which each rank computes a different part. Backward, sums the ranks' gradients.

    Args:
        x: float [...], the same on all ranks of a row of the mesh.
        mesh: the ranks.
        name: name of the collective, the same on all ranks.
    """

    @tf.custom_gradient
    def identity(x: tf.Tensor) -> tuple[tf.Tensor, object]:
        return tf.identity(x), lambda dy: _sum(dy, mesh, f"{name}.spread")

    return identity(x)


def total(x: tf.Tensor, mesh: Mesh, name: str) -> tf.Tensor:
    """Returns the sum of the ranks' terms. Backward, passes the gradient on unchanged.

    Args:
        x: float [...], this rank's term.
        mesh: the ranks.
        name: name of the collective, the same on all ranks.
    """

    @tf.custom_gradient
    def add_up(x: tf.Tensor) -> tuple[tf.Tensor, object]:
        return _sum(x, mesh, f"{name}.total"), tf.identity

    return add_up(x)


def joined(x: tf.Tensor, axis: int, mesh: Mesh, name: str) -> tf.Tensor:
    """Concatenates the ranks' even parts along an axis. Backward, takes this rank's part of the gradient.

    Args:
        x: [batch, ...], this rank's part.
        axis: any axis but the batch.
        mesh: the ranks.
        name: name of the collective, the same on all ranks.
    """

    @tf.custom_gradient
    def join(x: tf.Tensor) -> tuple[tf.Tensor, object]:
        return _join(x, axis, mesh, f"{name}.joined"), lambda dy: _own_part(dy, axis, mesh)

    return join(x)


def own_part(x: tf.Tensor, axis: int, mesh: Mesh, name: str) -> tf.Tensor:
    """Takes this rank's even part along an axis. Backward, concatenates the gradients of all parts.

    Args:
        x: [batch, ...], the same on all ranks.
        axis: any axis but the batch.
        mesh: the ranks.
        name: name of the collective, the same on all ranks.
    """

    @tf.custom_gradient
    def part(x: tf.Tensor) -> tuple[tf.Tensor, object]:
        return _own_part(x, axis, mesh), lambda dy: _join(dy, axis, mesh, f"{name}.own_part")

    return part(x)


def _sum(x: tf.Tensor, mesh: Mesh, name: str) -> tf.Tensor:
    if mesh.model == 1:
        return x
    op = world.horovod().Sum
    return collectives.reduce_dense([x], name, op=op, process_set=mesh.model_set)[0]


def _join(x: tf.Tensor, axis: int, mesh: Mesh, name: str) -> tf.Tensor:
    if mesh.model == 1:
        return x
    axis %= x.shape.rank
    rows = collectives.gather_rows(x, name, mesh.model_set)  # [ranks * batch, ...]
    parts = tf.reshape(rows, tf.concat([[mesh.model, -1], tf.shape(x)[1:]], axis=0))
    whole = tf.concat(tf.unstack(parts, mesh.model), axis=axis)
    shape = x.shape.as_list()
    shape[axis] = None if shape[axis] is None else shape[axis] * mesh.model
    return tf.ensure_shape(whole, shape)


def _own_part(x: tf.Tensor, axis: int, mesh: Mesh) -> tf.Tensor:
    return tf.split(x, mesh.model, axis=axis)[mesh.model_index]

"""Exchanges inside a model, with gradients: what the ranks that hold one model between them tell each other.

In pairs, as M. Shoeybi et al. have them ("Megatron-LM", 2019, https://arxiv.org/abs/1909.08053, section 3): what is the
identity forwards is a sum backwards, and the other way round. A gradient that comes from behind a `total` or `joined`
is the same on all ranks, because what they compute from there on is.
"""

import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.collectives.mesh import Mesh


def spread(x: tf.Tensor, mesh: Mesh, name: str) -> tf.Tensor:
    """What all ranks have, for each to compute another part from: backwards the sum of their gradients.

    Args:
        x: float [...], the same on all ranks of a row of the mesh.
        mesh: the ranks.
        name: of the exchange, the same on all ranks.
    """

    @tf.custom_gradient
    def identity(x: tf.Tensor) -> tuple[tf.Tensor, object]:
        return tf.identity(x), lambda dy: _sum(dy, mesh, f"{name}.spread")

    return identity(x)


def total(x: tf.Tensor, mesh: Mesh, name: str) -> tf.Tensor:
    """The sum of the ranks' terms: backwards the identity.

    Args:
        x: float [...], each rank's own.
        mesh: the ranks.
        name: of the exchange, the same on all ranks.
    """

    @tf.custom_gradient
    def add_up(x: tf.Tensor) -> tuple[tf.Tensor, object]:
        return _sum(x, mesh, f"{name}.total"), tf.identity

    return add_up(x)


def joined(x: tf.Tensor, axis: int, mesh: Mesh, name: str) -> tf.Tensor:
    """The ranks' even parts put together along an axis: backwards each rank's own part.

    Args:
        x: [batch, ...], each rank's own part.
        axis: not that of the batch.
        mesh: the ranks.
        name: of the exchange, the same on all ranks.
    """

    @tf.custom_gradient
    def join(x: tf.Tensor) -> tuple[tf.Tensor, object]:
        return _join(x, axis, mesh, f"{name}.joined"), lambda dy: _own_part(dy, axis, mesh)

    return join(x)


def own_part(x: tf.Tensor, axis: int, mesh: Mesh, name: str) -> tf.Tensor:
    """This rank's even part of what all ranks have: backwards the parts' gradients put together.

    Args:
        x: [batch, ...], the same on all ranks.
        axis: not that of the batch.
        mesh: the ranks.
        name: of the exchange, the same on all ranks.
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

"""Sends a tensor from one rank to its neighbour, over a border between the stages of a model."""

from collections.abc import Sequence

import tensorflow as tf

from hvdkit import world
from hvdkit.collectives import wire
from hvdkit.collectives.mesh import Mesh


def send(mesh: Mesh, stage: int, x: tf.Tensor, name: str) -> tf.Tensor:
    """Sends a tensor over a border between stages.

    Args:
        mesh: the ranks.
        stage: the column before the border.
        x: [batch, ...].
        name: name of the transfer, the same on both sides.

    Returns:
        A tensor that you must pass to `Outbox.close`.
    """
    name, pair = f"hvdkit.pipeline.border{stage}.{name}", mesh.neighbours(stage)
    return wire.send(x, name, pair)


def receive(mesh: Mesh, stage: int, shape: tf.Tensor, dtype: str, name: str) -> tf.Tensor:
    """Receives a tensor from the rank on the other side of a border.

    Args:
        mesh: the ranks.
        stage: the column before the border.
        shape: shape of the tensor, [batch, ...], as an int32 tensor.
        dtype: dtype of the tensor.
        name: name of the transfer, the same on both sides.
    """
    name, pair = f"hvdkit.pipeline.border{stage}.{name}", mesh.neighbours(stage)
    first = mesh.data_index * mesh.model + stage
    root = first + 1 if world.rank() == first else first
    return wire.receive(shape, dtype, name, pair, root)


class Outbox:
    """Makes a step wait for its sends, and keeps TensorFlow from removing them from the graph.

    TensorFlow prunes a stateless operation, such as Horovod's, if nothing uses its result. So `close` writes one
    element of each result into a variable. The variable is created before the step is traced: TensorFlow traces a step
    that creates a variable twice, and would do so on this rank only.
    """

    def __init__(self) -> None:
        self._place = tf.Variable(0.0, trainable=False, name="sent")

    def close(self, sent: Sequence[tf.Tensor]) -> None:
        """Waits for the sends, as part of the graph that is being traced."""
        first = [tf.cast(tf.reshape(tensor, [-1])[:1], tf.float32) for tensor in sent]
        self._place.assign(tf.reduce_sum(tf.concat(first, axis=0)))

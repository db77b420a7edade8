"""Sends a tensor from one rank to its neighbour with collectives, because Horovod has no point-to-point operations.

On one host, both ranks gather their rows through shared memory, and the receiver has zero rows. Between hosts, it is a
broadcast in a process set of the two ranks, the fastest of Horovod's collectives for this (measure it with
`python -m hvdkit.bench collectives`).
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.collectives import shared_memory, wire
from hvdkit.collectives.mesh import Mesh
from hvdkit.compat.tensorflow import run_out_of_order


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
    if shared_memory.gathers(x.dtype):
        return _gather(x, name, pair)
    return wire.run("broadcast", [collectives.to_wire(x)], name, pair, root_rank=world.rank())[0]


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
    if shared_memory.gathers(tf.as_dtype(dtype)):
        return _gather(wire.zeros(tf.concat([[0], shape[1:]], axis=0), dtype), name, pair)
    first = mesh.data_index * mesh.model + stage
    root = first + 1 if world.rank() == first else first
    room = collectives.to_wire(wire.zeros(shape, dtype))
    (received,) = wire.run("broadcast", [room], name, pair, root_rank=root)
    return collectives.from_wire(received, tf.as_dtype(dtype))


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


def _gather(rows: tf.Tensor, name: str, pair: Any) -> tf.Tensor:
    """Gathers the rows of both sides.

    A tf.function runs stateful operations one after another, in the order of their creation. Each side would wait at
    its first transfer for the other side: a deadlock. So these operations run outside this order.
    """
    (both,) = wire.run_shared("gather", [rows], name, pair)
    if not tf.executing_eagerly():
        run_out_of_order(both.op)
    return both

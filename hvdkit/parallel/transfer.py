"""From one rank to its neighbour, by collectives: Horovod has no other way.

On one host both ranks gather their rows through its memory, and the receiver has none. Between hosts it is a broadcast
in a process set of the two, which of Horovod's ways is the fastest (`python -m hvdkit.bench collectives`).
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.collectives import shared_memory, wire
from hvdkit.collectives.mesh import Mesh


def send(mesh: Mesh, stage: int, x: tf.Tensor, name: str) -> tf.Tensor:
    """Sends a tensor over a border between stages.

    Args:
        mesh: the ranks.
        stage: the column before the border.
        x: [batch, ...].
        name: of the transfer, the same on both sides.

    Returns:
        What must be given to `Outbox.close`.
    """
    name, pair = f"hvdkit.pipeline.border{stage}.{name}", mesh.neighbours(stage)
    if shared_memory.gathers(x.dtype):
        return _gather(x, name, pair)
    return wire.run("broadcast", [collectives.to_wire(x)], name, pair, root_rank=world.rank())[0]


def receive(mesh: Mesh, stage: int, shape: tf.Tensor, dtype: str, name: str) -> tf.Tensor:
    """What the rank on the other side of a border sends.

    Args:
        mesh: the ranks.
        stage: the column before the border.
        shape: int32, of what is sent: [batch, ...].
        dtype: of what is sent.
        name: of the transfer, the same on both sides.
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
    """Sees to it that a step ends only when what `send` returned is there, and that TensorFlow does not leave it out.

    An operation without a state of its own, such as Horovod's, of which nobody uses the result, is no more than a knot
    of dependencies to it. So something of each result is put down where it cannot see that nobody looks. The place is
    made before a step is traced: TensorFlow traces a step twice that makes a variable, and on this rank alone.
    """

    def __init__(self) -> None:
        self._place = tf.Variable(0.0, trainable=False, name="sent")

    def close(self, sent: Sequence[tf.Tensor]) -> None:
        """Waits for what was sent, as part of the graph that is being traced."""
        first = [tf.cast(tf.reshape(tensor, [-1])[:1], tf.float32) for tensor in sent]
        self._place.assign(tf.reduce_sum(tf.concat(first, axis=0)))


def _gather(rows: tf.Tensor, name: str, pair: Any) -> tf.Tensor:
    """Rows of both sides. A tf.function runs stateful operations one after another, in the order of their making.

    Each side would wait at its first transfer for the other's. So these are taken out of that order.
    """
    (both,) = wire.run_shared("gather", [rows], name, pair)
    manager = getattr(tf.compat.v1.get_default_graph(), "experimental_acd_manager", None)
    if manager is not None:
        manager.run_independently(both.op)
    return both

"""Three numbers that travel with every exchange of gradients: proof that it happened, and votes to stop or to leave.

Silence is what makes data parallel training dangerous: an optimizer that averages nothing trains on, and a rank that
leaves `fit` alone leaves the others waiting. So every rank adds a vector to each exchange: its rank + 1, whether it
wants to stop training, and whether it was told to leave the machine (a signal). The sum of the first over the ranks is
known in closed form if the exchange does what it should, and all ranks learn of a wish in the same step, without a
message of its own. The three floats ride in the gradients' buffer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit import world

LENGTH = 3
_BROKEN = -1e30  # more than all exchanges of any training can make good again


class Heartbeat:
    """What this process sends with each exchange, and what came back since `begin`.

    Attributes:
        all_stop: set by a callback that stops training on all ranks alike, so that nobody needs to be told.
    """

    def __init__(self) -> None:
        self.all_stop = False
        with tf.init_scope():  # variables cannot be made inside a tf.function, where the first exchange may be traced
            self._received = tf.Variable([0.0] * LENGTH, trainable=False, name="heartbeat_received")
            self._wish = tf.Variable(0.0, trainable=False, name="wish_to_stop")
            self._leave = tf.Variable(0.0, trainable=False, name="wish_to_leave")

    def begin(self) -> None:
        """Forgets what was before: a training begins."""
        self._received.assign([0.0] * LENGTH)
        self._wish.assign(0.0)
        self._leave.assign(0.0)
        self.all_stop = False

    def wish_to_stop(self) -> None:
        """Makes the next exchanges carry this rank's wish to stop."""
        self._wish.assign(1.0)

    def wish_to_leave(self) -> None:
        """Makes the next exchanges say that this rank was told to leave."""
        self._leave.assign(1.0)

    def leaving(self) -> int:
        """How many ranks were told to leave, as all ranks know since their last exchange."""
        return int(np.nan_to_num(self._received.numpy()[2]))

    def read(self) -> tuple[float, int]:
        """The number of exchanges that were right, below zero once one was wrong; and the votes to stop."""
        proven, votes, _ = self._received.numpy()
        return float(proven), int(np.nan_to_num(votes))

    def payload(self) -> tf.Tensor:
        """What this rank adds to an exchange: float32, [LENGTH]."""
        return tf.stack([tf.constant(world.rank() + 1.0), self._wish.read_value(), self._leave.read_value()])

    def receive(self, total: tf.Tensor, ranks: Sequence[int]) -> None:
        """Takes the sum over `ranks`, float32 [LENGTH], in a graph or eagerly."""
        expected = float(sum(rank + 1 for rank in ranks))
        right = tf.abs(total[0] - expected) < 0.25
        before = self._received.read_value()
        proven = before[:1] + tf.where(right, 1.0, _BROKEN)
        self._received.assign(tf.concat([proven, tf.maximum(before[1:], tf.round(total[1:]))], axis=0))


_heartbeat: Heartbeat | None = None


def current() -> Heartbeat:
    """This process's heartbeat."""
    global _heartbeat
    if _heartbeat is None:
        _heartbeat = Heartbeat()
    return _heartbeat


def members(process_set: Any) -> list[int]:
    """The global ranks of a Horovod process set."""
    ranks = process_set.ranks
    return list(range(world.size())) if ranks is None or process_set.process_set_id == 0 else list(ranks)

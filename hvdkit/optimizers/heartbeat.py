"""The heartbeat: five numbers sent with every gradient allreduce, as a check of the allreduce and as stop requests.

Data parallel training can fail silently. An optimizer that does not average trains on without an error, and if one rank
exits `fit` alone, the others hang. So every rank adds a vector to each allreduce: its rank + 1, whether it requests a
stop of training, and whether a signal told it to exit. The sum of the first number over the ranks has a closed form,
which proves that the allreduce works. All ranks learn of a stop request in the same step, without a message of its own.

The other two numbers tell whether the ranks' batches have one size: only then is the mean over ranks that over all
examples. They are the size of this rank's batch b, and b times a factor f of the rank. If all sizes are equal, the sum
of f b is the mean of f times the sum of b, and it hardly ever is if sizes differ.

The five floats are part of the gradient buffer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit import world
from hvdkit.optimizers.singletons import OncePerGraph

LENGTH = 5
_GOLDEN = 0.618034  # its multiples are spread evenly between whole numbers
_BROKEN = -1e30  # more than all allreduces of any training run can add up to


class Heartbeat:
    """What this process sends with each allreduce, and what it has received since `begin`.

    Attributes:
        all_stop: set by a callback that stops training on all ranks alike, so no stop request is needed.
    """

    def __init__(self) -> None:
        self.all_stop = False
        with tf.init_scope():  # a tf.function, where the first allreduce may be traced, cannot create variables
            self._received = tf.Variable([0.0] * 4, trainable=False, name="heartbeat_received")
            self._wish = tf.Variable(0.0, trainable=False, name="wish_to_stop")
            self._leave = tf.Variable(0.0, trainable=False, name="wish_to_leave")
            self._batch = tf.Variable(0.0, trainable=False, name="batch_size")

    def begin(self) -> None:
        """Resets the heartbeat at the start of training."""
        self._received.assign([0.0] * 4)
        self._wish.assign(0.0)
        self._leave.assign(0.0)
        self._batch.assign(0.0)
        self.all_stop = False

    def wish_to_stop(self) -> None:
        """Makes the next allreduces carry this rank's stop request."""
        self._wish.assign(1.0)

    def wish_to_leave(self) -> None:
        """Makes the next allreduces carry that this rank was told to exit."""
        self._leave.assign(1.0)

    def note_batch(self, examples: tf.Tensor | float) -> None:
        """Makes the next allreduces carry the size of this rank's batch; 0 on all ranks if it does not matter."""
        self._batch.assign(examples)

    def had_unequal_batches(self) -> bool:
        """Returns whether noted batches differed in size since `begin`; the same on all ranks."""
        return bool(self._received.numpy()[3])

    def leaving(self) -> int:
        """Returns how many ranks were told to exit, as of the last allreduce; the same on all ranks."""
        return int(np.nan_to_num(self._received.numpy()[2]))

    def read(self) -> tuple[float, int]:
        """Returns the number of correct allreduces, negative once one was wrong, and the number of stop requests."""
        proven, votes, *_ = self._received.numpy()
        return float(proven), int(np.nan_to_num(votes))

    def payload(self) -> tf.Tensor:
        """Returns what this rank adds to an allreduce: float32, [LENGTH]."""
        rank, batch = world.rank(), self._batch.read_value()
        wishes = [self._wish.read_value(), self._leave.read_value()]
        return tf.stack([tf.constant(rank + 1.0), *wishes, batch, batch * _factor(rank)])

    def received(self) -> tf.Tensor:
        """Returns what this process has received so far: float32, [4]. In a graph, ordered after `receive`."""
        return self._received.read_value()

    def receive(self, total: tf.Tensor, ranks: Sequence[int]) -> None:
        """Receives the sum over `ranks`, float32 [LENGTH], in a graph or eagerly."""
        expected = float(sum(rank + 1 for rank in ranks))
        right = tf.abs(total[0] - expected) < 0.25
        before = self.received()
        proven = before[:1] + tf.where(right, 1.0, _BROKEN)
        mean = sum(map(_factor, ranks)) / len(ranks)
        unequal = tf.abs(total[4] - mean * total[3]) > 0.02 + 1e-7 * total[3]  # float32 rounds
        told = tf.concat([tf.round(total[1:3]), [tf.cast(unequal, tf.float32)]], axis=0)
        self._received.assign(tf.concat([proven, tf.maximum(before[1:], told)], axis=0))


def _factor(rank: int) -> float:
    """Returns a factor for a rank's batch size: far from the mean over ranks, and another one for each rank."""
    return (-1) ** rank * (1 + rank * _GOLDEN % 1)


current = OncePerGraph(Heartbeat)  # returns this process's heartbeat


def members(process_set: Any) -> list[int]:
    """The global ranks of a Horovod process set."""
    ranks = process_set.ranks
    return list(range(world.size())) if ranks is None or process_set.process_set_id == 0 else list(ranks)

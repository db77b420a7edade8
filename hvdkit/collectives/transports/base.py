"""`Transport`: a way to send tensors between ranks. This module defines what a transport must implement.

**How to add a transport.** Write `transports/yours.py` with a subclass of `Transport`:

1. `start` decides whether this job can use the transport, with the same answer on all ranks
   (`world.introduction.introduce` asks them all). It returns the transport or None. It runs once, before TensorFlow
   starts. An environment variable that disables the transport belongs here; so does the warning that says what is
   missing.
2. `serves` returns which requests it accepts. The answer must be the same on all ranks. So it may depend on the kind,
   the dtype and the process set, but on nothing that only one rank knows.
3. `allreduce` and `allgather` do the work. They run while a graph is traced, or eagerly. Set `needs_graph` if the
   operation needs a node with a name. The name they receive is unique in the graph and the same on all ranks: match
   messages by it. Operations must be stateful in TensorFlow, or their results used; otherwise TensorFlow prunes them.
4. If the transport can send while the rank computes, override `allreduce_start` and `allreduce_done`, too.
5. Add the class to `_KNOWN` in `transports/__init__.py`: the first one in this list that serves a request runs it.
6. Add it to `TRANSPORTS` in `tests/parallel/collectives/test_transports.py`, which tests one contract for all of them.

A transport may contain others: one between hosts can first sum within each host by `SharedMemory`.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import tensorflow as tf

from hvdkit.collectives.traffic import ring_bytes
from hvdkit.compat.tensorflow import run_out_of_order
from hvdkit.world.ranks import World

Kind = Literal["allreduce", "allgather", "transfer"]


@dataclasses.dataclass(frozen=True)
class Scale:
    """The factors of a sum.

    Attributes:
        before: factor before the sum.
        after: factor after the sum.
        average: whether the sum is also divided by the number of ranks that take part.
    """

    before: float = 1.0
    after: float = 1.0
    average: bool = False


@dataclasses.dataclass(frozen=True)
class Usage:
    """Statistics of a transport in this process.

    Attributes:
        seconds: time spent in collectives.
        waiting_seconds: part of this time spent waiting for other ranks.
        collectives: number of collectives.
        hidden_bytes: bytes this process sent through shared memory, which no network interface counts.
    """

    seconds: float
    waiting_seconds: float
    collectives: int
    hidden_bytes: int


class Transport(abc.ABC):
    """A way to send tensors between ranks.

    Attributes:
        name: readable name.
        key: one word for it, used in the names of results.
        needs_graph: whether its operations find their name only in a graph: eager calls then run as a small graph.
        scatters_by_allreduce: whether a reduce-scatter is faster as an allreduce of which each rank keeps its part, as
            where sending bytes costs nothing.
        bucket_bytes: smallest size of gradients that are worth an allreduce of their own, which then overlaps the rest
            of the backward pass; None if one allreduce of all gradients is fastest.
    """

    name: ClassVar[str]
    key: ClassVar[str]
    needs_graph: ClassVar[bool] = False
    scatters_by_allreduce: ClassVar[bool] = False
    bucket_bytes: ClassVar[int | None] = None

    @classmethod
    @abc.abstractmethod
    def start(cls, world: World, preferred: "Sequence[Transport]") -> "Transport | None":
        """Decides with all ranks whether this job uses it. A collective call, before TensorFlow starts.

        Args:
            world: the ranks of this job.
            preferred: the transports that this job uses and that come first.

        Returns:
            The transport or None, the same on all ranks.
        """

    def stop(self) -> None:  # noqa: B027 - most have nothing to stop
        """Stops the transport in this process; no collective follows."""

    @abc.abstractmethod
    def serves(self, kind: Kind, dtype: tf.DType, process_set: Any) -> bool:
        """Returns whether it serves such tensors between these ranks; the same on all ranks.

        Args:
            kind: name of the method that would be called.
            dtype: dtype of the tensors.
            process_set: the Horovod process set that takes part.
        """

    @abc.abstractmethod
    def allreduce(
        self, tensors: Sequence[tf.Tensor], name: str, process_set: Any, *, scale: Scale, overlaps: bool = False
    ) -> list[tf.Tensor]:
        """Sums tensors over the ranks of a process set; the result has the same bits on every rank.

        Args:
            tensors: dense, of one dtype, in the same order and of the same shapes on all ranks.
            name: the same on all ranks, and unique among the collectives of this graph.
            process_set: the Horovod process set that takes part; this rank is in it.
            scale: factors of the sum.
            overlaps: whether this rank has other work to do meanwhile. In a graph, operations may then run in any
                order. The caller ensures that two calls of the same operation follow each other.
        """

    def allreduce_start(  # noqa: B027 - `allreduce_done` does the work of those that cannot overlap
        self, tensors: Sequence[tf.Tensor], name: str, process_set: Any, *, scale: Scale, slot: str
    ) -> None:
        """Starts an allreduce that continues while this rank computes, if the transport can; returns at once.

        The names are XLA's (all-reduce-start, all-reduce-done).

        Args:
            tensors: as for `allreduce`.
            name: as for `allreduce`.
            process_set: as for `allreduce`.
            scale: as for `allreduce`.
            slot: where this process finds it again. It need not be the same on all ranks. An earlier allreduce in the
                slot is completed, but its results are dropped.
        """

    def allreduce_done(
        self,
        tensors: Sequence[tf.Tensor],
        name: str,
        process_set: Any,
        *,
        scale: Scale,
        slot: str,
        is_started: tf.Tensor,
    ) -> list[tf.Tensor]:
        """Waits for the allreduce that was started in a slot, perhaps by another graph, and returns its results.

        By default, allreduces now: the same results, without overlap.

        Args:
            tensors: those given to `allreduce_start`, or tensors of their shapes if they are not needed again.
            name: as for `allreduce`, but not that of `allreduce_start`.
            process_set: as for `allreduce`.
            scale: as for `allreduce_start`.
            slot: as for `allreduce_start`.
            is_started: whether this process has started it; the same on all ranks. If not, as after a restart from a
                checkpoint, `tensors` are allreduced now. bool, scalar.
        """
        return self.allreduce(tensors, name, process_set, scale=scale)

    @abc.abstractmethod
    def allgather(self, tensors: Sequence[tf.Tensor], name: str, process_set: Any) -> list[tf.Tensor]:
        """Concatenates the rows of the ranks of a process set, in rank order.

        Args:
            tensors: a single one; the number of rows may differ between ranks, the other dimensions are the same.
            name: as for `allreduce`.
            process_set: as for `allreduce`.
        """

    def transfer(self, tensors: Sequence[tf.Tensor], name: str, process_set: Any, *, root: int) -> list[tf.Tensor]:
        """Moves a tensor from one rank to the others of a process set: an allgather in which only one rank has rows.

        Both sides call it. A `tf.function` runs stateful operations in the order of their creation. In this order, each
        side would wait at its first transfer for the other, a deadlock. So this method removes the operation from that
        order.

        Args:
            tensors: a single one: the tensor to send, or zeros of the shape that `room` returns.
            name: as for `allreduce`.
            process_set: as for `allreduce`.
            root: the rank that sends.
        """
        (rows,) = self.allgather(tensors, name, process_set)
        if not tf.executing_eagerly():
            run_out_of_order(rows.op)
        return [rows]

    def room(self, shape: tf.Tensor) -> tf.Tensor:
        """Returns the shape of a receiver's input to `transfer`, for a tensor of `shape` (int32 [dimensions])."""
        return tf.concat([[0], shape[1:]], axis=0)

    def allreduce_bytes(self, size: float, ranks: int) -> float:
        """Returns the bytes that a rank sends for an allreduce of `size` bytes."""
        return ring_bytes(size, ranks)

    def refuse_to_join(self) -> None:  # noqa: B027 - most let ranks join
        """Raises if this rank stops calling collectives (`hvdkit.join`) and the others would hang.

        Raises:
            UsageError: the transport does not support this; the message gives an alternative.
        """

    def usage(self) -> Usage | None:
        """Returns the statistics of this process; None if the transport keeps none."""
        return None

    @abc.abstractmethod
    def describe(self) -> str:
        """Describes the transport in this job, in one log line."""


def scaled(tensor: tf.Tensor, factor: float) -> tf.Tensor:
    """Multiplies by a factor in at least float32, and integers in float64; integers are truncated.

    `tf.cast` would round the factor to float32 even for float64 tensors.
    """
    if factor == 1:
        return tensor
    wide = tf.float32 if tensor.dtype.is_floating and tensor.dtype.size <= 4 else tf.float64
    return tf.cast(tf.cast(tensor, wide) * tf.constant(factor, wide), tensor.dtype)


def may_block() -> bool:
    """Returns whether an operation created now may wait on the thread that runs it.

    An eager operation may: it holds up no other one. In a graph, TensorFlow may have queued operations behind it.
    """
    return tf.executing_eagerly()


def in_any_order(outputs: list[tf.Tensor], overlaps: bool) -> list[tf.Tensor]:
    """Removes the operation of these outputs from the order of stateful operations in a graph, if it overlaps them."""
    if overlaps and not tf.executing_eagerly():
        run_out_of_order(outputs[0].op)
    return outputs

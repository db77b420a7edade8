"""`Transport`: a way for tensors to get from rank to rank. What one has to say of itself, and what it has to do.

**How to add a transport.** Write `transports/yours.py` with a subclass of `Transport`:

1. `start` decides whether this job can use it, with the same answer on all ranks (`world.introduction.introduce` asks
   them all), and returns the transport or None. It runs once, before TensorFlow starts. An environment variable that
   turns it off belongs here; so does the warning that says what is missing.
2. `serves` says which requests it takes. The answer must be the same on all ranks, so it may depend on the kind, the
   dtype and the process set, and on nothing that one rank alone knows.
3. `allreduce` and `allgather` do the work. They run while a graph is traced, or eagerly; set `needs_graph` if the
   operation needs a node with a name. The name that they are given is unique in the graph and the same on all ranks:
   match messages by it. Operations must have state in TensorFlow's sense, or be used, or TensorFlow leaves them out.
4. Put the class into `_KNOWN` in `transports/__init__.py`: the first one there that serves a request carries it.
5. Add it to `TRANSPORTS` in `tests/parallel/test_transports.py`, which holds every transport to the same contract.

A transport may hold others: one between hosts can add up within a host by `SharedMemory` first.
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
    """What a sum is multiplied by.

    Attributes:
        before: factor before the sum.
        after: factor after it.
        average: whether the sum is also divided by the number of ranks that take part.
    """

    before: float = 1.0
    after: float = 1.0
    average: bool = False


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a transport has done in this process.

    Attributes:
        seconds: spent in collectives.
        waiting_seconds: of these, spent waiting for other ranks.
        collectives: how many there were.
        hidden_bytes: that left this process without passing a network interface, where they would be counted.
    """

    seconds: float
    waiting_seconds: float
    collectives: int
    hidden_bytes: int


class Transport(abc.ABC):
    """A way for tensors to get from rank to rank.

    Attributes:
        name: as people read it.
        key: one word for it, in the names of results.
        needs_graph: whether its operations find their name in a graph alone: eager calls then run as a small graph.
        scatters_by_allreduce: whether a reduce-scatter is done best as an allreduce of which each rank keeps its part,
            because bytes cost nothing on the way.
    """

    name: ClassVar[str]
    key: ClassVar[str]
    needs_graph: ClassVar[bool] = False
    scatters_by_allreduce: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def start(cls, world: World) -> "Transport | None":
        """Agrees with all ranks whether this job uses it. A collective call, before TensorFlow starts.

        Returns:
            The transport, or None, alike on all ranks.
        """

    def stop(self) -> None:  # noqa: B027 - most have nothing to stop
        """Ends this process's part; no collective follows."""

    @abc.abstractmethod
    def serves(self, kind: Kind, dtype: tf.DType, process_set: Any) -> bool:
        """Whether it carries such tensors between these ranks; alike on all ranks.

        Args:
            kind: name of the method that would be called.
            dtype: of the tensors.
            process_set: the Horovod process set that takes part.
        """

    @abc.abstractmethod
    def allreduce(self, tensors: Sequence[tf.Tensor], name: str, process_set: Any, *, scale: Scale) -> list[tf.Tensor]:
        """Sums tensors over the ranks of a process set; every rank gets the same bits.

        Args:
            tensors: dense, of one dtype, in the same order and of the same shapes on all ranks.
            name: the same on all ranks, and in use for no other collective of this graph.
            process_set: the Horovod process set that takes part; this rank is in it.
            scale: what the sums are multiplied by.
        """

    @abc.abstractmethod
    def allgather(self, tensors: Sequence[tf.Tensor], name: str, process_set: Any) -> list[tf.Tensor]:
        """Puts the rows of the ranks of a process set one after another, in the order of the ranks.

        Args:
            tensors: a single one; the ranks' numbers of rows may differ, the other dimensions are alike.
            name: as for `allreduce`.
            process_set: as for `allreduce`.
        """

    def transfer(self, tensors: Sequence[tf.Tensor], name: str, process_set: Any, *, root: int) -> list[tf.Tensor]:
        """Moves a tensor from one rank to the other ones of a process set: an allgather to which one rank brings rows.

        Both sides call it. A `tf.function` runs stateful operations one after another, in the order of their making:
        each side would wait at its first transfer for the other's. So this one is taken out of that order.

        Args:
            tensors: a single one: what is sent, or zeros of the shape that `room` gives.
            name: as for `allreduce`.
            process_set: as for `allreduce`.
            root: the rank that sends.
        """
        (rows,) = self.allgather(tensors, name, process_set)
        if not tf.executing_eagerly():
            run_out_of_order(rows.op)
        return [rows]

    def room(self, shape: tf.Tensor) -> tf.Tensor:
        """Shape of what a receiver brings to `transfer`, for a tensor of this shape (int32 [dimensions])."""
        return tf.concat([[0], shape[1:]], axis=0)

    def allreduce_bytes(self, size: float, ranks: int) -> float:
        """Bytes that a rank sends for an allreduce of `size` bytes."""
        return ring_bytes(size, ranks)

    def refuse_to_join(self) -> None:  # noqa: B027 - most let ranks join
        """Ends a job whose rank leaves the collectives to the others (`hvdkit.join`), if they would wait for it.

        Raises:
            UsageError: says how to do without.
        """

    def usage(self) -> Usage | None:
        """What it has done in this process; None if it does not count."""
        return None

    @abc.abstractmethod
    def describe(self) -> str:
        """What it is in this job, in a line of a log."""

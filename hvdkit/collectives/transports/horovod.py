"""Horovod as a transport, which serves every request that no other transport serves; and its operations: `run`.

Horovod matches the ranks' operations by the names of their nodes, which `hvdkit.collectives.wire` sets.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdkit import world
from hvdkit.collectives.transports.base import Kind, Scale, Transport, scaled
from hvdkit.world.ranks import World

_LONGEST_IDLE_CYCLE_MS = 50.0
# Dtypes that Horovod can send; others (uint32 seeds, bfloat16 weights, ...) are sent as bytes.
_DTYPES = {"uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64", "bool"}


class Horovod(Transport):
    """Gloo, MPI or NCCL, between any ranks."""

    name = "horovod"
    key = "horovod"
    needs_graph = True

    @classmethod
    def start(cls, world: World, preferred: Sequence[Transport]) -> "Horovod":
        """Returns the transport: it is always available."""
        _limit_idle_cycles(_LONGEST_IDLE_CYCLE_MS if preferred else 0.0)
        return cls()

    def serves(self, kind: Kind, dtype: tf.DType, process_set: Any) -> bool:
        """Returns True: Horovod serves every request."""
        return True

    def allreduce(
        self, tensors: Sequence[tf.Tensor], name: str, process_set: Any, *, scale: Scale, overlaps: bool = False
    ) -> list[tf.Tensor]:
        """Allreduces the tensors as one group, so Horovod starts them together and fuses them."""
        if tensors[0].dtype == tf.bfloat16:
            return self._sum_bfloat16(tensors, name, process_set, scale)
        hvd = world.horovod()
        options = {"kind": "grouped_allreduce", "op": hvd.Average if scale.average else hvd.Sum}
        if tensors[0].dtype == tf.float64:  # Horovod's factors are float32
            sums = run([scaled(t, scale.before) for t in tensors], name, process_set, **options)
            return [scaled(t, scale.after) for t in sums]
        return run(tensors, name, process_set, prescale_factor=scale.before, postscale_factor=scale.after, **options)

    def allgather(self, tensors: Sequence[tf.Tensor], name: str, process_set: Any) -> list[tf.Tensor]:
        """Allgathers the tensor, as bytes if Horovod does not support its dtype."""
        (rows,) = run([to_wire(tensors[0])], name, process_set, kind="allgather")
        return [from_wire(rows, tensors[0].dtype)]

    def transfer(self, tensors: Sequence[tf.Tensor], name: str, process_set: Any, *, root: int) -> list[tf.Tensor]:
        """Moves the tensor by a broadcast, Horovod's fastest way (`python -m hvdkit.bench collectives`)."""
        (moved,) = run([to_wire(tensors[0])], name, process_set, kind="broadcast", root_rank=root)
        return [from_wire(moved, tensors[0].dtype)]

    def room(self, shape: tf.Tensor) -> tf.Tensor:
        """Returns the shape unchanged: all ranks pass the same shape to a broadcast."""
        return shape

    def describe(self) -> str:
        """Names the libraries it was built and started with."""
        hvd = world.horovod()
        parts = {"MPI": hvd.mpi_enabled(), "Gloo": hvd.gloo_enabled(), "NCCL": hvd.nccl_built()}
        return f"Horovod ({', '.join(name for name, there in parts.items() if there)})"

    def _sum_bfloat16(self, tensors: Sequence[tf.Tensor], name: str, process_set: Any, scale: Scale) -> list[tf.Tensor]:
        """Sums bfloat16 tensors with the traffic of a ring: scatter the parts, sum each in float32, gather the sums.

        Each rank sends and receives 2 (N - 1) / N times the buffer, as in a ring allreduce. The result has the same
        bits on every rank, because each part is summed and rounded on one rank.
        """
        ranks = process_set.size()
        flat = tf.concat([tf.reshape(t, [-1]) for t in tensors], axis=0)
        length = tf.size(flat)
        part = (length + ranks - 1) // ranks
        padded = tf.reshape(tf.pad(flat, [[0, part * ranks - length]]), [ranks, part])
        wires = [to_wire(padded), tf.constant([], tf.int32)]
        received, _ = run(wires, f"{name}.scatter", process_set, kind="alltoall")
        summed = tf.reduce_sum(tf.cast(from_wire(received, tf.bfloat16), tf.float32), axis=0)
        mean = summed / ranks if scale.average else summed
        mine = tf.cast(mean * (scale.before * scale.after), tf.bfloat16)
        (total,) = self.allgather([mine[tf.newaxis]], f"{name}.gather", process_set)
        parts = tf.split(tf.reshape(total, [-1])[:length], [tf.size(t) for t in tensors])
        return [tf.reshape(p, tf.shape(t)) for p, t in zip(parts, tensors, strict=True)]


def _limit_idle_cycles(longest: float) -> None:
    """Sets how many milliseconds a cycle of Horovod's background thread may take while nothing goes through Horovod.

    Each cycle is an exchange of messages between all ranks, a thousand times a second, which costs a core that also
    trains 8 % of its time. In the Horovod that launch/bootstrap.sh builds, a cycle takes a tenth of the time since the
    last collective, up to this limit; 0 is Horovod's own behaviour.
    """
    set_longest = getattr(ctypes.CDLL(None), "horovod_set_longest_idle_cycle_ms", None)  # all that is loaded
    if set_longest is not None:
        set_longest(ctypes.c_double(longest))


def run(
    tensors: Sequence[tf.Tensor], name: str, process_set: Any, *, kind: str, device: str = "", **attributes: Any
) -> list[tf.Tensor]:
    """Runs one of Horovod's operations as a node of the current graph; see `hvdkit.collectives.wire.run`."""
    hvd = world.horovod()
    common = {"name": name, "process_set": process_set, "ignore_name_scope": True}
    with tf.device(device or None):
        if kind == "alltoall":
            return list(hvd.alltoall(tensors[0], splits=tensors[1], **common, **attributes))
        if kind == "grouped_reducescatter":  # the public function has no name argument
            return list(hvd.mpi_ops._grouped_reducescatter(list(tensors), **common, **attributes))
        if kind.startswith("grouped_"):
            return list(getattr(hvd, kind)(list(tensors), **common, **attributes))
        return [getattr(hvd, kind)(tensors[0], **common, **attributes)]


def to_wire(tensor: tf.Tensor) -> tf.Tensor:
    """Returns what Horovod can send: the tensor itself, or its bytes if Horovod does not support the dtype."""
    if tensor.dtype.name in _DTYPES:
        return tensor
    return tf.bitcast(tensor, tf.uint8)  # adds a last dimension of the dtype's size in bytes


def from_wire(tensor: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Does the inverse of `to_wire`."""
    return tensor if dtype.name in _DTYPES else tf.bitcast(tensor, dtype)

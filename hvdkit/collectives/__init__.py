"""Collectives: everything that moves tensors between ranks.

`transports` are the ways to send data between ranks. `wire` runs one operation over a transport, under a name that is
the same on all ranks. `tensors`, `variables` and `objects` are the collectives that the rest of hvdkit uses, and this
package re-exports them. `operations` are the public collectives, with Horovod's names.
"""

from hvdkit.collectives.objects import (
    allgather_object,
    broadcast_object,
    broadcast_object_fn,
    gather_object,
    scatter_object,
)
from hvdkit.collectives.tensors import (
    allreduce_sum,
    barrier,
    check_root,
    gather_rows,
    reduce_dense,
    reduce_dense_done,
    reduce_dense_start,
    size_of,
    takes_part,
)
from hvdkit.collectives.transports.horovod import from_wire, to_wire
from hvdkit.collectives.variables import average_variables, broadcast_variables, digest

__all__ = [
    "allgather_object",
    "allreduce_sum",
    "average_variables",
    "barrier",
    "broadcast_object",
    "broadcast_object_fn",
    "broadcast_variables",
    "check_root",
    "digest",
    "from_wire",
    "gather_object",
    "gather_rows",
    "reduce_dense",
    "reduce_dense_done",
    "reduce_dense_start",
    "scatter_object",
    "size_of",
    "takes_part",
    "to_wire",
]

"""Collectives for tensors, which the rest of hvdkit uses.

All ranks of the process set must call each function here. In a job of one rank each is the identity. The ranks' calls
are matched by name (see `hvdkit.collectives.wire`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit import world
from hvdkit.collectives import wire
from hvdkit.collectives.transports import Scale
from hvdkit.errors import UsageError


class NotInProcessSetError(tf.errors.InvalidArgumentError, UsageError):
    """A rank is not in the process set. The error of TensorFlow that Horovod raises, and a `ValueError`."""


def allreduce_sum(values: np.ndarray, name: str, process_set: Any = None) -> np.ndarray:
    """Sums an array over the ranks, outside any graph.

    Args:
        values: array of any shape; int64 and float64 keep their precision.
        name: name of the allreduce, the same on all ranks.
        process_set: the Horovod process set that takes part; by default all ranks.
    """
    if not takes_part(process_set):
        return values
    op = world.horovod().Sum
    return wire.run("allreduce", [tf.convert_to_tensor(values)], f"hvdkit.{name}", process_set, op=op)[0].numpy()


def barrier(process_set: Any = None, name: str | None = None) -> None:
    """Returns when all ranks of the process set have called it.

    Args:
        process_set: the ranks that wait for each other; by default all.
        name: distinguishes barriers, so ranks at different barriers do not match; by default one name for all.
    """
    if takes_part(process_set):  # horovod.tensorflow has no barrier
        op = world.horovod().Sum
        wire.run("allreduce", [tf.zeros([1])], f"hvdkit.barrier.{name}", process_set, op=op)


def takes_part(process_set: Any) -> bool:
    """Returns whether there are other ranks to communicate with: False in a job of one rank.

    Raises:
        ValueError: the process set is not registered, or this rank is not in it (`NotInProcessSetError`).
    """
    if world.size() == 1:
        return False
    if process_set is None or process_set.process_set_id == 0:
        return True
    if process_set.process_set_id is None:
        raise ValueError(
            f"{process_set} is not registered: pass it to hvdkit.init(process_sets=[...]) or, with "
            f"HOROVOD_DYNAMIC_PROCESS_SETS=1 in the environment, to hvdkit.add_process_set on all ranks."
        )
    if not process_set.included():
        raise NotInProcessSetError(
            None,
            None,
            f"Rank {world.rank()} is not among the ranks {process_set.ranks} of the process set: only those may call. "
            f"Write `if process_set.included(): ...`.",
        )
    return process_set.size() > 1


def size_of(process_set: Any) -> int:
    """Returns the number of ranks that take part."""
    return world.size() if process_set is None or world.size() == 1 else process_set.size()


def check_root(root_rank: int, process_set: Any) -> None:
    """Raises a `NotInProcessSetError` if `root_rank` does not take part: Horovod would hang, or end the process."""
    ranks = range(world.size()) if process_set is None or not process_set.process_set_id else process_set.ranks
    if root_rank not in ranks:
        message = f"root_rank={root_rank} does not take part; the ranks are {list(ranks)}."
        raise NotInProcessSetError(None, None, message)


def reduce_dense(
    tensors: Sequence[tf.Tensor],
    name: str,
    *,
    op: Any,
    process_set: Any,
    prescale: float = 1.0,
    postscale: float = 1.0,
    overlaps: bool = False,
) -> list[tf.Tensor]:
    """Averages or sums tensors over the ranks of a process set; in a graph or eagerly.

    All tensors of one dtype are sent together, by the transport that serves them (see `hvdkit.collectives.transports`).

    Args:
        tensors: dense tensors, in the same order and of the same shapes on all ranks.
        name: prefix of the name of the allreduce, the same on all ranks.
        op: Horovod's `Average` or `Sum`.
        process_set: the Horovod process set that takes part.
        prescale: factor before the sum; for bfloat16 over Horovod, summed in float32, it applies after the sum.
        postscale: factor after the sum.
        overlaps: whether it overlaps other operations of the graph (see `Transport.allreduce`).
    """
    scale = Scale(prescale, postscale, average=op == world.horovod().Average)
    results: list[tf.Tensor | None] = [None] * len(tensors)
    for dtype, places in _by_dtype(tensors).items():
        reduced = wire.allreduce([tensors[i] for i in places], f"{name}.{dtype}", process_set, scale, overlaps)
        for place, tensor in zip(places, reduced, strict=True):
            results[place] = tf.ensure_shape(tensor, tensors[place].shape)
    return results


def reduce_dense_start(tensors: Sequence[tf.Tensor], name: str, *, op: Any, process_set: Any, slot: str) -> None:
    """Starts averaging or summing tensors while this rank computes; `reduce_dense_done` returns the results.

    Args:
        tensors: as for `reduce_dense`.
        name: as for `reduce_dense`.
        op: as for `reduce_dense`.
        process_set: as for `reduce_dense`.
        slot: where this process finds them again; an earlier start in the slot is dropped.
    """
    scale = Scale(average=op == world.horovod().Average)
    for dtype, places in _by_dtype(tensors).items():
        given = [tensors[i] for i in places]
        wire.allreduce_start(given, f"{name}.{dtype}", process_set, scale, f"{slot}.{dtype}")


def reduce_dense_done(
    tensors: Sequence[tf.Tensor], name: str, *, op: Any, process_set: Any, slot: str, is_started: tf.Tensor
) -> list[tf.Tensor]:
    """Returns the results of `reduce_dense_start`.

    Args:
        tensors: those given to `reduce_dense_start`: transports that cannot overlap reduce them only now.
        name: as for `reduce_dense`, but not that of `reduce_dense_start`.
        op: as for `reduce_dense_start`.
        process_set: as for `reduce_dense_start`.
        slot: as for `reduce_dense_start`.
        is_started: whether this process has started it, the same on all ranks; if not, `tensors` are reduced now.
    """
    scale = Scale(average=op == world.horovod().Average)
    results: list[tf.Tensor | None] = [None] * len(tensors)
    for dtype, places in _by_dtype(tensors).items():
        given = [tensors[i] for i in places]
        reduced = wire.allreduce_done(given, f"{name}.{dtype}", process_set, scale, f"{slot}.{dtype}", is_started)
        for place, tensor in zip(places, reduced, strict=True):
            results[place] = tf.ensure_shape(tensor, tensors[place].shape)
    return results


def _by_dtype(tensors: Sequence[tf.Tensor]) -> dict[str, list[int]]:
    """Returns the places of the tensors of each dtype, in the order of the dtypes' names."""
    dtypes = [t.dtype.name for t in tensors]
    return {dtype: [i for i, d in enumerate(dtypes) if d == dtype] for dtype in sorted(set(dtypes))}


def gather_rows(tensor: tf.Tensor, name: str, process_set: Any) -> tf.Tensor:
    """Concatenates the ranks' tensors along the first dimension, whose length may differ between ranks."""
    rows = wire.allgather(tensor, name, process_set)
    return tf.ensure_shape(rows, [None, *tensor.shape[1:]])

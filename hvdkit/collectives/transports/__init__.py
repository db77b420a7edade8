"""The transports between ranks, and the only place that selects one.

All ranks select the same transports when a job starts (`start`). Each collective then uses the first transport that
serves it (`choose`). No other code checks which transport that is. `base` documents how to add one.
"""

import logging
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdkit.collectives.transports.base import Kind, Scale, Transport, Usage
from hvdkit.collectives.transports.horovod import Horovod
from hvdkit.collectives.transports.shared_memory import SharedMemory
from hvdkit.collectives.transports.sockets import Sockets
from hvdkit.world.ranks import World

__all__ = ["Horovod", "Kind", "Scale", "Transport", "Usage", "choose", "in_use", "refuse_to_join", "start", "stop"]

_KNOWN: tuple[type[Transport], ...] = (SharedMemory, Sockets, Horovod)  # in order of preference
_log = logging.getLogger(__name__)

_in_use: tuple[Transport, ...] = (Horovod(),)


def start(world: World) -> None:
    """Selects the transports of this job, the same on all ranks. A collective call, before TensorFlow starts."""
    global _in_use
    started: list[Transport] = []
    for known in _KNOWN:
        transport = known.start(world, started)
        started += [transport] if transport is not None else []
    _in_use = tuple(started)
    if world.is_root:
        _log.info("Tensors travel by %s.", ", then by ".join(transport.describe() for transport in _in_use))


def stop() -> None:
    """Stops the transports of this process."""
    global _in_use
    for transport in _in_use:
        transport.stop()
    _in_use = (Horovod(),)


def in_use() -> Sequence[Transport]:
    """Returns the transports of this job, in order of preference."""
    return _in_use


def choose(kind: Kind, dtype: Any, process_set: Any) -> Transport:
    """Returns the transport for such tensors between these ranks; the same on all ranks.

    Args:
        kind: "allreduce", "allgather" or "transfer".
        dtype: dtype of the tensors.
        process_set: the Horovod process set that takes part.
    """
    dtype = tf.as_dtype(dtype)
    return next(transport for transport in _in_use if transport.serves(kind, dtype, process_set))


def refuse_to_join() -> None:
    """Raises if this rank stops calling collectives while the others continue, and a transport would hang.

    Raises:
        UsageError: a transport does not support this; the message gives an alternative.
    """
    for transport in _in_use:
        transport.refuse_to_join()

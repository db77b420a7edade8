"""The ways for tensors to get from rank to rank, and the one place where one is chosen.

All ranks agree on the transports of a job when it begins (`start`). Then each collective goes by the first of them that
serves it (`choose`); nothing else asks which one that is. `base` says how to add one.
"""

import logging
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdkit.collectives.transports.base import Kind, Scale, Transport, Usage
from hvdkit.collectives.transports.horovod import Horovod
from hvdkit.collectives.transports.shared_memory import SharedMemory
from hvdkit.world.ranks import World

__all__ = ["Horovod", "Kind", "Scale", "Transport", "Usage", "choose", "in_use", "refuse_to_join", "start", "stop"]

_KNOWN: tuple[type[Transport], ...] = (SharedMemory, Horovod)  # whoever comes first is asked first
_log = logging.getLogger(__name__)

_in_use: tuple[Transport, ...] = (Horovod(),)


def start(world: World) -> None:
    """Agrees with all ranks on the transports of this job. A collective call, before TensorFlow starts."""
    global _in_use
    started = [known.start(world) for known in _KNOWN]
    _in_use = tuple(transport for transport in started if transport is not None)
    if world.is_root:
        _log.info("Tensors travel by %s.", ", then by ".join(transport.describe() for transport in _in_use))


def stop() -> None:
    """Ends this process's part in the job."""
    global _in_use
    for transport in _in_use:
        transport.stop()
    _in_use = (Horovod(),)


def in_use() -> Sequence[Transport]:
    """The transports of this job, whoever is asked first in front."""
    return _in_use


def choose(kind: Kind, dtype: Any, process_set: Any) -> Transport:
    """The transport that carries such tensors between these ranks; alike on all ranks.

    Args:
        kind: "allreduce", "allgather" or "transfer".
        dtype: of the tensors.
        process_set: the Horovod process set that takes part.
    """
    dtype = tf.as_dtype(dtype)
    return next(transport for transport in _in_use if transport.serves(kind, dtype, process_set))


def refuse_to_join() -> None:
    """Ends a job whose rank leaves the collectives to the others, if a transport would let them wait for it.

    Raises:
        UsageError: says how to do without.
    """
    for transport in _in_use:
        transport.refuse_to_join()

"""Collectives for Python objects, pickled with cloudpickle.

They return objects, so they run at once: eagerly, or in the session of a TensorFlow 1 graph. While a `tf.function` is
traced they would run on the ranks alone that trace it then, so they are refused.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import numpy as np
import tensorflow as tf

from hvdkit import world
from hvdkit.collectives import wire
from hvdkit.collectives.tensors import check_root, takes_part
from hvdkit.errors import UsageError

_PIECE = 1 << 30  # maximum number of bytes per collective


def broadcast_object(
    obj: Any, root_rank: int = 0, session: Any = None, name: str | None = None, process_set: Any = None
) -> Any:
    """Returns the root rank's `obj` on all ranks (pickled with cloudpickle, only between the ranks of this job).

    Args:
        obj: any object that can be pickled; ignored on ranks other than the root.
        root_rank: the rank whose object is returned; a global rank, even with a process set.
        session: the session of a TensorFlow 1 graph; by default the current one.
        name: name of the broadcast, the same on all ranks; by default the name of the calling function.
        process_set: the ranks that take part; by default all.

    Raises:
        ValueError: there is no such root rank, or this rank is not in the process set.
        UsageError: a `tf.function` is being traced.
    """
    check_root(root_rank, process_set)
    if not takes_part(process_set):
        return obj
    name = f"hvdkit.{name}" if name else wire.caller("broadcast_object", line=False)
    mine = cloudpickle.dumps(obj) if world.rank() == root_rank else b""
    broadcast = functools.partial(_run_now, "broadcast", process_set=process_set, session=session, root_rank=root_rank)
    length = broadcast(np.array([len(mine)]), f"{name}.length")
    content = broadcast(np.frombuffer(mine, np.uint8) if mine else np.zeros(length, np.uint8), f"{name}.content")
    return obj if mine else cloudpickle.loads(content.tobytes())


def broadcast_object_fn(
    root_rank: int = 0, session: Any = None, name: str | None = None, process_set: Any = None
) -> Callable[[Any], Any]:
    """Returns a function that broadcasts the object it is given; see `broadcast_object`, as for the arguments."""
    options = {"session": session, "name": name or "broadcast_object_fn", "process_set": process_set}
    return functools.partial(broadcast_object, root_rank=root_rank, **options)


def allgather_object(obj: Any, session: Any = None, name: str | None = None, process_set: Any = None) -> list[Any]:
    """Returns the objects of all ranks, in rank order.

    Args:
        obj: any object that can be pickled.
        session: the session of a TensorFlow 1 graph; by default the current one.
        name: name of the allgather, the same on all ranks; by default the calling line.
        process_set: the ranks that take part; by default all.

    Raises:
        ValueError: this rank is not in the process set.
        UsageError: a `tf.function` is being traced.
    """
    if not takes_part(process_set):
        return [obj]
    name = f"hvdkit.gather.{name}" if name else wire.caller("allgather_object")
    mine = np.frombuffer(cloudpickle.dumps(obj), np.uint8)
    gather = functools.partial(_run_now, "allgather", process_set=process_set, session=session)
    lengths, content = gather(np.array([len(mine)]), f"{name}.lengths"), gather(mine, f"{name}.content")
    return [cloudpickle.loads(part.tobytes()) for part in np.split(content, np.cumsum(lengths)[:-1])]


def gather_object(obj: Any, name: str) -> list[Any]:
    """Returns the objects of all ranks on rank 0, and an empty list on other ranks, which need no memory for them.

    Args:
        obj: any object that can be pickled.
        name: name of the gather, the same on all ranks.
    """
    if not takes_part(None):
        return [obj]
    received = _exchange_bytes([cloudpickle.dumps(obj), *[b""] * (world.size() - 1)], f"hvdkit.gather.{name}")
    return [cloudpickle.loads(content) for content in received] if world.rank() == 0 else []


def scatter_object(objects: Sequence[Any], name: str) -> Any:
    """Returns to each rank its own object of rank 0's list.

    Args:
        objects: one object per rank, on rank 0; ignored on other ranks.
        name: name of the scatter, the same on all ranks.
    """
    if not takes_part(None):
        return objects[0]
    mine = [cloudpickle.dumps(o) for o in objects] if world.rank() == 0 else [b""] * world.size()
    return cloudpickle.loads(_exchange_bytes(mine, f"hvdkit.scatter.{name}")[0])


def _run_now(
    kind: str, value: np.ndarray, name: str, *, process_set: Any, session: Any, **attributes: Any
) -> np.ndarray:
    """Runs a collective on an array and returns its result: eagerly, or in a session."""
    if tf.executing_eagerly():
        (result,) = wire.run(kind, [tf.convert_to_tensor(value)], name, process_set, **attributes)
        return result.numpy()
    session = session or tf.compat.v1.get_default_session()
    if tf.inside_function() or session is None:
        raise UsageError(
            "An object was to be sent between ranks (broadcast_object, allgather_object, ...) while a graph is built, "
            "where only the ranks that build it would take part. Call this outside of tf.function, or send tensors."
        )
    given = tf.compat.v1.placeholder_with_default(value, value.shape)  # a constant could be folded on this rank alone
    (result,) = wire.run(kind, [given], name, process_set, **attributes)
    return session.run(result)


def _exchange_bytes(contents: Sequence[bytes], name: str) -> list[bytes]:
    """Sends each rank its bytes and returns those received from each, in pieces: a collective counts in int32."""
    lengths = tf.constant([max(map(len, contents))], tf.int64)
    (lengths,) = wire.run("allgather", [lengths], f"{name}.lengths", None)
    received: list[list[bytes]] = [[] for _ in contents]
    piece = _PIECE // len(contents)
    for begin in range(0, int(tf.reduce_max(lengths)), piece):
        cut = [content[begin : begin + piece] for content in contents]
        splits = tf.constant([len(part) for part in cut], tf.int32)
        content, sizes = wire.run("alltoall", [_bytes(b"".join(cut)), splits], f"{name}.content", None)
        for place, part in enumerate(np.split(content.numpy(), np.cumsum(sizes.numpy())[:-1])):
            received[place].append(part.tobytes())
    return [b"".join(parts) for parts in received]


def _bytes(content: bytes) -> tf.Tensor:
    return tf.convert_to_tensor(np.frombuffer(content, np.uint8))

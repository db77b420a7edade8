"""Moving values between ranks: the collectives that the rest of hvdkit is built from.

Every function here must be called by all ranks of the process set. Each is the identity in a job of one rank. The
ranks' calls are matched by name (see `hvdkit.wire`).
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import cloudpickle
import numpy as np
import tensorflow as tf

from hvdkit import shared_memory, watchdog, wire, world

_PIECE = 1 << 30  # bytes that one exchange of objects moves at most
# Horovod moves these; anything else (uint32 seeds, bfloat16 weights, ...) travels as bytes.
_HOROVOD_DTYPES = {"uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64", "bool"}


def allreduce_sum(values: np.ndarray, name: str, process_set: Any = None) -> np.ndarray:
    """Sums an array over the ranks, outside of any graph.

    Args:
        values: array of any shape; int64 and float64 keep their precision.
        name: what is summed; the same on all ranks.
        process_set: the Horovod process set that takes part; by default all ranks.
    """
    if not takes_part(process_set):
        return values
    op = world.horovod().Sum
    return wire.run("allreduce", [tf.convert_to_tensor(values)], f"hvdkit.{name}", process_set, op=op)[0].numpy()


def broadcast_object(
    obj: Any, root_rank: int = 0, session: Any = None, name: str | None = None, process_set: Any = None
) -> Any:
    """Returns the root rank's `obj` on all ranks (pickled with cloudpickle, between the ranks of this job only).

    Args:
        obj: any object that can be pickled; what ranks other than the root pass is not looked at.
        root_rank: the rank (among all ranks, also with a process set) whose object is taken.
        session: accepted for Horovod's sake.
        name: what is broadcast, the same on all ranks; by default the function that calls.
        process_set: the ranks that take part; by default all.

    Raises:
        ValueError: there is no such root rank, or this rank is not in the process set.
    """
    check_root(root_rank, process_set)
    if not takes_part(process_set):
        return obj
    name = f"hvdkit.{name}" if name else wire.caller("broadcast_object", line=False)
    mine = cloudpickle.dumps(obj) if world.rank() == root_rank else b""
    length = tf.constant([len(mine)], tf.int64)
    (length,) = wire.run("broadcast", [length], f"{name}.length", process_set, root_rank=root_rank)
    content = _bytes(mine) if mine else tf.zeros(length, tf.uint8)
    (content,) = wire.run("broadcast", [content], f"{name}.content", process_set, root_rank=root_rank)
    return obj if mine else cloudpickle.loads(content.numpy().tobytes())


def allgather_object(obj: Any, session: Any = None, name: str | None = None, process_set: Any = None) -> list[Any]:
    """Returns the objects of all ranks, in the order of the ranks.

    Args:
        obj: any object that can be pickled.
        session: accepted for Horovod's sake.
        name: what is gathered, the same on all ranks; by default the line that calls.
        process_set: the ranks that take part; by default all.
    """
    if not takes_part(process_set):
        return [obj]
    name = f"hvdkit.gather.{name}" if name else wire.caller("allgather_object")
    mine = cloudpickle.dumps(obj)
    (lengths,) = wire.run("allgather", [tf.constant([len(mine)], tf.int64)], f"{name}.lengths", process_set)
    (content,) = wire.run("allgather", [_bytes(mine)], f"{name}.content", process_set)
    parts = np.split(content.numpy(), np.cumsum(lengths.numpy())[:-1])
    return [cloudpickle.loads(part.tobytes()) for part in parts]


def gather_object(obj: Any, name: str) -> list[Any]:
    """Returns the objects of all ranks on rank 0, and nothing elsewhere: other ranks need no memory for them.

    Args:
        obj: any object that can be pickled.
        name: what is gathered, the same on all ranks.
    """
    if not takes_part(None):
        return [obj]
    received = _exchange_bytes([cloudpickle.dumps(obj), *[b""] * (world.size() - 1)], f"hvdkit.gather.{name}")
    return [cloudpickle.loads(content) for content in received] if world.rank() == 0 else []


def scatter_object(objects: Sequence[Any], name: str) -> Any:
    """Returns to each rank its own of the objects that rank 0 has.

    Args:
        objects: one a rank, on rank 0; elsewhere not looked at.
        name: what is scattered, the same on all ranks.
    """
    if not takes_part(None):
        return objects[0]
    mine = [cloudpickle.dumps(o) for o in objects] if world.rank() == 0 else [b""] * world.size()
    return cloudpickle.loads(_exchange_bytes(mine, f"hvdkit.scatter.{name}")[0])


def barrier(process_set: Any = None, name: str | None = None) -> None:
    """Returns when all ranks of the process set have called it.

    Args:
        process_set: the ranks that wait for each other; by default all.
        name: tells barriers apart, so that ranks cannot pass different ones together; by default the same for all.
    """
    if takes_part(process_set):  # horovod.tensorflow has none of its own
        op = world.horovod().Sum
        wire.run("allreduce", [tf.zeros([1])], f"hvdkit.barrier.{name}", process_set, op=op)


def broadcast_variables(
    variables: Sequence[Any], root_rank: int = 0, process_set: Any = None, inplace: bool = False
) -> None:
    """Assigns the root rank's values to `variables` on all ranks.

    What all ranks have alike, as after equal seeds, is told by its SHA-256 and does not travel.

    Args:
        variables: `keras.Variable`s or `tf.Variable`s of any dtype, in the same order and of the same shapes on all
            ranks.
        root_rank: the rank (among all ranks, also with a process set) whose values are taken.
        process_set: the ranks that take part; by default all.
        inplace: accepted for Horovod's sake, where it saves the memory of a copy.

    Raises:
        ValueError: the ranks' lists differ in length, shape or dtype; the message shows the first difference. Or there
            is no such root rank.
    """
    check_root(root_rank, process_set)
    if not takes_part(process_set):
        return
    native = [getattr(v, "value", v) if not isinstance(v, tf.Variable) else v for v in variables]
    differing = _differing(variables, native, process_set)

    @tf.function
    def broadcast() -> None:
        for number, variable in differing:
            tensor = [to_wire(variable.read_value())]
            name = f"hvdkit.broadcast.{number}"
            (received,) = wire.run("broadcast", tensor, name, process_set, root_rank=root_rank)
            variable.assign(from_wire(received, variable.dtype))

    if differing:
        everyone = process_set is None or process_set.process_set_id == 0
        with watchdog.waiting("hvdkit.broadcast", f"{len(differing)} variables", everyone):
            broadcast()


def takes_part(process_set: Any) -> bool:
    """Whether there is anybody to exchange with: False in a job of one rank.

    Raises:
        ValueError: the process set is not registered, or this rank is not in it.
    """
    if world.size() == 1:
        return False
    if process_set is None or process_set.process_set_id == 0:
        return True
    if process_set.size() == 1:
        return False
    if process_set.process_set_id is None:
        raise ValueError(
            f"{process_set} is not registered: pass it to hvdkit.init(process_sets=[...]) or, with "
            f"HOROVOD_DYNAMIC_PROCESS_SETS=1 in the environment, to hvdkit.add_process_set on all ranks."
        )
    if not process_set.included():
        raise ValueError(
            f"Rank {world.rank()} is not among the ranks {process_set.ranks} of the process set: only those may call. "
            f"Write `if process_set.included(): ...`."
        )
    return True


def size_of(process_set: Any) -> int:
    """Number of ranks that take part."""
    return world.size() if process_set is None or world.size() == 1 else process_set.size()


def check_root(root_rank: int, process_set: Any) -> None:
    """Raises a `ValueError` if no such rank takes part: Horovod would wait for it, or end the process."""
    ranks = range(world.size()) if process_set is None or not process_set.process_set_id else process_set.ranks
    if root_rank not in ranks:
        raise ValueError(f"root_rank={root_rank} does not take part; the ranks are {list(ranks)}.")


def average_variables(variables: Sequence[Any], process_set: Any = None) -> None:
    """Sets float variables to their mean over the ranks; those that all hold alike are left as they are."""
    if not takes_part(process_set):
        return
    digests = allgather_object([digest([v]) for v in variables], name="average.digests", process_set=process_set)
    differing = [v for number, v in enumerate(variables) if len({d[number] for d in digests}) > 1]
    for number, variable in enumerate(differing):
        total = allreduce_sum(np.asarray(variable, dtype=np.float64), f"average.{number}", process_set)
        variable.assign(total / size_of(process_set))


def digest(variables: Sequence[Any]) -> str:
    """SHA-256 over the shapes and values of variables, in hexadecimal: equal if and only if all bits are equal."""
    sha = hashlib.sha256()
    for variable in variables:
        value = np.ascontiguousarray(tf.convert_to_tensor(variable).numpy())
        sha.update(f"{value.dtype.name}{value.shape}".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()


def reduce_dense(
    tensors: Sequence[tf.Tensor],
    name: str,
    *,
    op: Any,
    process_set: Any,
    prescale: float = 1.0,
    postscale: float = 1.0,
) -> list[tf.Tensor]:
    """Averages or sums tensors over the ranks of a process set; in a graph or eagerly.

    All tensors of one dtype travel as one group, so that Horovod starts on them together and fuses them. Between ranks
    of one host they go through its memory instead, where that can be done (see `hvdkit.shared_memory`).

    Args:
        tensors: dense tensors, in the same order and of the same shapes on all ranks.
        name: prefix of the exchange's name, the same on all ranks.
        op: Horovod's `Average` or `Sum`.
        process_set: the Horovod process set that takes part.
        prescale: factor before the sum; Horovod does not use it for bfloat16, whose sums are taken in float32.
        postscale: factor after the sum; likewise.
    """
    hvd = world.horovod()
    results: list[tf.Tensor | None] = [None] * len(tensors)
    for dtype in sorted({t.dtype.name for t in tensors}):
        places = [i for i, t in enumerate(tensors) if t.dtype.name == dtype]
        group = [tensors[i] for i in places]
        if shared_memory.sums(group[0].dtype):
            divisor = process_set.size() if op == hvd.Average else 1
            factors = {"before": prescale, "after": postscale, "divisor": divisor}
            reduced = wire.run_shared("sum", group, f"{name}.{dtype}", process_set, **factors)
        elif dtype == "bfloat16":
            average = op == hvd.Average
            reduced = _sum_bfloat16(group, f"{name}.bfloat16", average=average, process_set=process_set)
        else:
            reduced = wire.run(
                "grouped_allreduce",
                group,
                f"{name}.{dtype}",
                process_set,
                op=op,
                prescale_factor=prescale,
                postscale_factor=postscale,
            )
        for place, tensor in zip(places, reduced, strict=True):
            results[place] = tf.ensure_shape(tensor, tensors[place].shape)
    return results


def gather_rows(tensor: tf.Tensor, name: str, process_set: Any) -> tf.Tensor:
    """Concatenates the ranks' tensors along the first dimension, whose length may differ from rank to rank."""
    if shared_memory.gathers(tensor.dtype):
        (rows,) = wire.run_shared("gather", [tensor], name, process_set)
    else:
        (rows,) = wire.run("allgather", [to_wire(tensor)], name, process_set)
        rows = from_wire(rows, tensor.dtype)
    return tf.ensure_shape(rows, [None, *tensor.shape[1:]])


def _sum_bfloat16(tensors: list[tf.Tensor], name: str, *, average: bool, process_set: Any) -> list[tf.Tensor]:
    """A ring's traffic without a bfloat16 allreduce: scatter the parts, sum each in float32, gather the sums.

    Each rank sends and receives 2 (N - 1) / N times the buffer, as a ring allreduce does, and every rank ends with
    the same bits, because each part is summed and rounded in one place.
    """
    ranks = process_set.size()
    flat = tf.concat([tf.reshape(t, [-1]) for t in tensors], axis=0)
    length = tf.size(flat)
    part = (length + ranks - 1) // ranks
    padded = tf.reshape(tf.pad(flat, [[0, part * ranks - length]]), [ranks, part])
    even = tf.constant([], tf.int32)
    received, _ = wire.run("alltoall", [to_wire(padded), even], f"{name}.scatter", process_set)
    summed = tf.reduce_sum(tf.cast(from_wire(received, tf.bfloat16), tf.float32), axis=0)
    mine = tf.cast(summed / ranks if average else summed, tf.bfloat16)
    total = gather_rows(mine[tf.newaxis], f"{name}.gather", process_set)
    parts = tf.split(tf.reshape(total, [-1])[:length], [tf.size(t) for t in tensors])
    return [tf.reshape(p, tf.shape(t)) for p, t in zip(parts, tensors, strict=True)]


def to_wire(tensor: tf.Tensor) -> tf.Tensor:
    """Returns what Horovod can move: the tensor itself or, of dtypes that it lacks, its bytes."""
    if tensor.dtype.name in _HOROVOD_DTYPES:
        return tensor
    return tf.bitcast(tensor, tf.uint8)  # adds a last dimension of the dtype's size in bytes


def from_wire(tensor: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Undoes `to_wire`."""
    return tensor if dtype.name in _HOROVOD_DTYPES else tf.bitcast(tensor, dtype)


def _exchange_bytes(contents: Sequence[bytes], name: str) -> list[bytes]:
    """Sends to each rank its bytes, and returns those from each; in pieces, as a collective counts in int32."""
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


def _differing(
    variables: Sequence[Any], native: Sequence[tf.Variable], process_set: Any
) -> list[tuple[int, tf.Variable]]:
    """The variables whose values are not the same on all ranks, with their places.

    By position: names are numbered, differently on a rank that has made one more model.

    Raises:
        ValueError: the ranks' lists differ in length, shape or dtype.
    """
    mine = [
        (f"{tuple(n.shape)} {n.dtype.name}", getattr(v, "path", n.name), _digest(n))
        for v, n in zip(variables, native, strict=True)
    ]
    everyone = allgather_object(mine, name="shapes", process_set=process_set)
    ranks = range(len(everyone)) if process_set is None or not process_set.process_set_id else process_set.ranks
    for rank, other in zip(ranks, everyone, strict=True):
        pairs = zip(everyone[0], other, strict=False)
        differing = next(((a, b) for a, b in pairs if a[0] != b[0]), None)
        if differing:
            (shape, path, _), (other_shape, _, _) = differing
            difference = f"{path} is {shape} on rank {ranks[0]} and {other_shape} on rank {rank}"
        elif len(other) != len(everyone[0]):
            difference = f"rank {ranks[0]} has {len(everyone[0])} variables and rank {rank} has {len(other)}"
        else:
            continue
        raise ValueError(
            f"Ranks cannot share their variables, because their models differ: {difference}. "
            f"Build the same model, with the same trainable layers, on every rank."
        )
    digests = zip(*([digest for _, _, digest in other] for other in everyone), strict=True)
    alike = [len(set(of_all)) == 1 for of_all in digests]
    return [(number, variable) for number, variable in enumerate(native) if not alike[number]]


def _digest(variable: tf.Variable) -> bytes:
    values = np.ascontiguousarray(variable.numpy())
    if values.dtype == object:  # strings, whose lengths count
        values = np.frombuffer(repr(values.tolist()).encode(), np.uint8)
    return hashlib.sha256(values.reshape(-1).view(np.uint8).data).digest()

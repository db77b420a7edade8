"""Moving values between ranks: the collectives that the rest of hvdkit is built from.

Every function here must be called by all ranks, in the same order. Each is the identity in a job of one rank. Names
are given explicitly: Horovod matches tensors by name, and TensorFlow's automatic names differ once one rank has
traced a function more often than another.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit import world

# Horovod moves these; anything else (uint32 seeds, bfloat16 weights, ...) travels as bytes.
_HOROVOD_DTYPES = {"uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64", "bool"}


def allreduce_sum(values: np.ndarray, name: str) -> np.ndarray:
    """Sums an array over all ranks, outside of any graph.

    Args:
        values: array of any shape; int64 and float64 keep their precision.
        name: what is summed; the same on all ranks.
    """
    if world.size() == 1:
        return values
    hvd = world.horovod()
    return hvd.allreduce(tf.convert_to_tensor(values), op=hvd.Sum, name=f"hvdkit.{name}").numpy()


def broadcast_object(obj: Any, root_rank: int = 0, name: str = "object") -> Any:
    """Returns the root rank's `obj` on all ranks (pickled with cloudpickle, between the ranks of this job only)."""
    if world.size() == 1:
        return obj
    # Horovod's default name is the object's type, which hangs when the other ranks pass None.
    return world.horovod().broadcast_object(obj, root_rank, name=f"hvdkit.{name}")


def allgather_object(obj: Any, name: str = "object") -> list[Any]:
    """Returns the objects of all ranks, in the order of the ranks."""
    if world.size() == 1:
        return [obj]
    return world.horovod().allgather_object(obj, name=f"hvdkit.gather.{name}")


def barrier() -> None:
    """Returns when all ranks have called it."""
    allreduce_sum(np.zeros(1), name="barrier")  # horovod.tensorflow has none of its own


def broadcast_variables(variables: Sequence[Any], root_rank: int = 0) -> None:
    """Assigns the root rank's values to `variables` on all ranks.

    Args:
        variables: `keras.Variable`s or `tf.Variable`s of any dtype, in the same order and of the same shapes on all
            ranks.
        root_rank: the rank whose values are taken.

    Raises:
        ValueError: the ranks' lists differ in length, shape or dtype; the message shows the first difference.
    """
    if world.size() == 1 or not variables:
        return
    native = [getattr(v, "value", v) if not isinstance(v, tf.Variable) else v for v in variables]
    _check_same_shapes(variables, native)
    hvd = world.horovod()

    @tf.function
    def broadcast() -> None:
        for number, variable in enumerate(native):
            wire = _to_wire(variable.read_value())
            received = hvd.broadcast(wire, root_rank, name=f"hvdkit.broadcast.{number}")
            variable.assign(_from_wire(received, variable.dtype))

    broadcast()


def average_variables(variables: Sequence[Any]) -> None:
    """Sets float variables to their mean over all ranks; those that all ranks hold alike are left as they are."""
    if world.size() == 1:
        return
    digests = allgather_object([digest([v]) for v in variables], name="average.digests")
    differing = [v for number, v in enumerate(variables) if len({d[number] for d in digests}) > 1]
    for number, variable in enumerate(differing):
        total = allreduce_sum(np.asarray(variable, dtype=np.float64), name=f"average.{number}")
        variable.assign(total / world.size())


def digest(variables: Sequence[Any]) -> str:
    """SHA-256 over the shapes and values of variables, in hexadecimal: equal if and only if all bits are equal."""
    sha = hashlib.sha256()
    for variable in variables:
        value = np.ascontiguousarray(tf.convert_to_tensor(variable).numpy())
        sha.update(f"{value.dtype.name}{value.shape}".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()


def average_dense(tensors: Sequence[tf.Tensor], name: str, *, average: bool, process_set: Any) -> list[tf.Tensor]:
    """Averages (or sums) tensors over the ranks of a process set; in a graph or eagerly.

    All tensors of one dtype travel as one group, so that Horovod starts on them together and fuses them.

    Args:
        tensors: dense tensors, in the same order and of the same shapes on all ranks.
        name: prefix of the exchange's name, the same on all ranks.
        average: divide by the number of ranks.
        process_set: the Horovod process set that takes part.
    """
    hvd = world.horovod()
    results: list[tf.Tensor | None] = [None] * len(tensors)
    for dtype in sorted({t.dtype.name for t in tensors}):
        places = [i for i, t in enumerate(tensors) if t.dtype.name == dtype]
        group = [tensors[i] for i in places]
        if dtype == "bfloat16":
            reduced = _sum_bfloat16(group, f"{name}.bfloat16", average=average, process_set=process_set)
        else:
            op = hvd.Average if average else hvd.Sum
            reduced = hvd.grouped_allreduce(
                group, op=op, name=f"{name}.{dtype}", ignore_name_scope=True, process_set=process_set
            )
        for place, tensor in zip(places, reduced, strict=True):
            results[place] = tf.ensure_shape(tensor, tensors[place].shape)
    return results


def gather_rows(tensor: tf.Tensor, name: str, process_set: Any) -> tf.Tensor:
    """Concatenates the ranks' tensors along the first dimension, whose length may differ from rank to rank."""
    hvd = world.horovod()
    wire = _to_wire(tensor)
    rows = hvd.allgather(wire, name=name, ignore_name_scope=True, process_set=process_set)
    return tf.ensure_shape(_from_wire(rows, tensor.dtype), [None, *tensor.shape[1:]])


def _sum_bfloat16(tensors: list[tf.Tensor], name: str, *, average: bool, process_set: Any) -> list[tf.Tensor]:
    """A ring's traffic without a bfloat16 allreduce: scatter the parts, sum each in float32, gather the sums.

    Each rank sends and receives 2 (N - 1) / N times the buffer, as a ring allreduce does, and every rank ends with
    the same bits, because each part is summed and rounded in one place.
    """
    hvd = world.horovod()
    ranks = process_set.size()
    flat = tf.concat([tf.reshape(t, [-1]) for t in tensors], axis=0)
    length = tf.size(flat)
    part = (length + ranks - 1) // ranks
    padded = tf.reshape(tf.pad(flat, [[0, part * ranks - length]]), [ranks, part])
    received = hvd.alltoall(_to_wire(padded), name=f"{name}.scatter", ignore_name_scope=True, process_set=process_set)
    received = received[0] if isinstance(received, tuple) else received
    summed = tf.reduce_sum(tf.cast(_from_wire(received, tf.bfloat16), tf.float32), axis=0)
    mine = tf.cast(summed / ranks if average else summed, tf.bfloat16)
    total = gather_rows(mine[tf.newaxis], f"{name}.gather", process_set)
    parts = tf.split(tf.reshape(total, [-1])[:length], [tf.size(t) for t in tensors])
    return [tf.reshape(p, tf.shape(t)) for p, t in zip(parts, tensors, strict=True)]


def _to_wire(tensor: tf.Tensor) -> tf.Tensor:
    if tensor.dtype.name in _HOROVOD_DTYPES:
        return tensor
    return tf.bitcast(tensor, tf.uint8)  # adds a last dimension of the dtype's size in bytes


def _from_wire(tensor: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return tensor if dtype.name in _HOROVOD_DTYPES else tf.bitcast(tensor, dtype)


def _check_same_shapes(variables: Sequence[Any], native: Sequence[tf.Variable]) -> None:
    """By position: names are numbered, differently on a rank that has made one more model."""
    mine = [
        (f"{tuple(n.shape)} {n.dtype.name}", getattr(v, "path", n.name)) for v, n in zip(variables, native, strict=True)
    ]
    everyone = allgather_object(mine, name="shapes")
    for rank, other in enumerate(everyone):
        pairs = zip(everyone[0], other, strict=False)
        differing = next(((a, b) for a, b in pairs if a[0] != b[0]), None)
        if differing:
            (shape, path), (other_shape, _) = differing
            difference = f"{path} is {shape} on rank 0 and {other_shape} on rank {rank}"
        elif len(other) != len(everyone[0]):
            difference = f"rank 0 has {len(everyone[0])} variables and rank {rank} has {len(other)}"
        else:
            continue
        raise ValueError(
            f"Ranks cannot share their variables, because their models differ: {difference}. "
            f"Build the same model, with the same trainable layers, on every rank."
        )

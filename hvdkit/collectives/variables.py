"""Collectives for the variables of a model or optimizer: broadcast, averages, checksums."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit import watchdog
from hvdkit.collectives import wire
from hvdkit.collectives.objects import allgather_object
from hvdkit.collectives.tensors import allreduce_sum, check_root, size_of, takes_part
from hvdkit.collectives.transports.horovod import from_wire, to_wire


def broadcast_variables(
    variables: Sequence[Any], root_rank: int = 0, process_set: Any = None, inplace: bool = False
) -> Any:
    """Assigns the root rank's values to `variables` on all ranks.

    Variables that are equal on all ranks, as after equal seeds, are detected by their SHA-256 and not sent. In a graph
    all variables are sent whenever the graph runs.

    Args:
        variables: `keras.Variable`s or `tf.Variable`s of any dtype, in the same order and of the same shapes on all
            ranks.
        root_rank: the rank whose values are assigned; a global rank, even with a process set.
        process_set: the ranks that take part; by default all.
        inplace: ignored, accepted for compatibility with Horovod, where it saves the memory of a copy.

    Returns:
        None; in a graph, the operation that does this.

    Raises:
        ValueError: the ranks' lists differ in length, shape or dtype; the message shows the first difference. Or there
            is no such root rank.
    """
    return _broadcast(_native(variables), variables, root_rank, process_set, "hvdkit.broadcast")


def broadcast_(
    variables: Sequence[Any], root_rank: int, name: str | None = None, process_set: Any = None
) -> list[tf.Tensor]:
    """Assigns the root rank's values to `variables` on all ranks, and returns them.

    Args:
        variables: as for `broadcast_variables`, as are `root_rank` and `process_set`.
        root_rank: the rank whose values are assigned.
        name: name of the broadcast, the same on all ranks.
        process_set: the ranks that take part; by default all.

    Returns:
        The new values, in the order of `variables`.
    """
    native = _native(variables)
    done = _broadcast(native, variables, root_rank, process_set, name or "hvdkit.broadcast_")
    with tf.control_dependencies([] if done is None else [done]):
        return [variable.read_value() for variable in native]


def _native(variables: Sequence[Any]) -> list[tf.Variable]:
    return [getattr(v, "value", v) if not isinstance(v, tf.Variable) else v for v in variables]


def _broadcast(
    native: Sequence[tf.Variable], variables: Sequence[Any], root_rank: int, process_set: Any, name: str
) -> Any:
    check_root(root_rank, process_set)
    if not takes_part(process_set):
        return tf.no_op()

    def send(numbered: Iterable[tuple[int, tf.Variable]]) -> Any:
        assigned = []
        for number, variable in numbered:
            tensor = [to_wire(variable.read_value())]
            (received,) = wire.run("broadcast", tensor, f"{name}.{number}", process_set, root_rank=root_rank)
            assigned.append(variable.assign(from_wire(received, variable.dtype.base_dtype)))
        return tf.group(*assigned)

    if not tf.executing_eagerly():
        return send(enumerate(native))
    if differing := _differing(variables, native, process_set):
        everyone = process_set is None or process_set.process_set_id == 0
        with watchdog.waiting(name, f"{len(differing)} variables", everyone):
            _run_in_graph(functools.partial(send, differing))
    return None


def _run_in_graph(function: Callable[[], Any]) -> None:
    @tf.function(autograph=False)
    def run() -> None:
        function()

    run()


def average_variables(variables: Sequence[Any], process_set: Any = None) -> None:
    """Sets float variables to their mean over the ranks; variables that are equal on all ranks do not change."""
    if not variables or not takes_part(process_set):
        return
    digests = allgather_object([digest([v]) for v in variables], name="average.digests", process_set=process_set)
    differing = [v for number, v in enumerate(variables) if len({d[number] for d in digests}) > 1]
    for number, variable in enumerate(differing):
        total = allreduce_sum(np.asarray(variable, dtype=np.float64), f"average.{number}", process_set)
        variable.assign(total / size_of(process_set))


def digest(variables: Sequence[Any]) -> str:
    """Returns the hexadecimal SHA-256 of variables' shapes and values: equal if and only if all bits are equal."""
    sha = hashlib.sha256()
    for variable in variables:
        value = np.ascontiguousarray(tf.convert_to_tensor(variable).numpy())
        sha.update(f"{value.dtype.name}{value.shape}".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()


def _differing(
    variables: Sequence[Any], native: Sequence[tf.Variable], process_set: Any
) -> list[tuple[int, tf.Variable]]:
    """Returns the variables whose values are not the same on all ranks, with their indices.

    Compares by position: names contain numbers, which differ on a rank that created one more model.

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

"""One Horovod operation, under a name that all ranks agree on: what every exchange of tensors goes through.

Horovod matches the ranks' operations by name. It takes the name from the operation's node in a graph: outside of a
graph it sees none, and pairs whatever operation of that kind each rank comes to next, without an error. So an eager
call is run here as a graph of one node. And nodes get their names here, not from TensorFlow, whose automatic names
differ once one rank has made another layer or traced a function more often.
"""

import collections
import functools
import re
import sys
import weakref
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import tensorflow as tf

from hvdkit import watchdog, world
from hvdkit.collectives import shared_memory

_OURS = ("hvdkit", "tensorflow", "keras")  # packages in which the user's line is not to be found
# How often each name is used in each graph: a second node of one name would be taken for the first.
_used: weakref.WeakKeyDictionary[Any, collections.Counter[str]] = weakref.WeakKeyDictionary()


def run(
    kind: str,
    tensors: Sequence[tf.Tensor],
    name: str,
    process_set: Any = None,
    device: str = "",
    **attributes: Any,
) -> list[tf.Tensor]:
    """Runs one operation of Horovod, eagerly or as part of the graph that is being traced.

    Args:
        kind: name of the operation in `horovod.tensorflow`: "allreduce", "grouped_allgather", "alltoall", ...
        tensors: its inputs, of dtypes that Horovod has; for "alltoall" the rows and the splits (empty for even ones).
        name: the same on all ranks; characters that TensorFlow does not take are replaced. If it is used again in one
            graph, a number is added.
        process_set: the process set that takes part; None for all ranks.
        device: where the operation is placed, as in `tf.device`.
        **attributes: further arguments, such as `op` and `root_rank`.

    Returns:
        The operation's outputs; for "alltoall" the rows and the received splits.
    """
    process_set = process_set or world.horovod().global_process_set
    name = _clean(name)
    options = (("device", device), *sorted(attributes.items()))
    if not tf.executing_eagerly():
        return _operation(kind, tensors, _unique(name), process_set, options)
    specs = tuple(tf.TensorSpec([None] * t.shape.rank, t.dtype) for t in tensors)
    function = _one_node(kind, specs, name, process_set, process_set.process_set_id, options)
    with watchdog.waiting(name, _detail(kind, tensors), everyone=process_set.process_set_id == 0):
        return list(function(*tensors))


def run_shared(
    kind: str, tensors: Sequence[tf.Tensor], name: str, process_set: Any, **attributes: Any
) -> list[tf.Tensor]:
    """Runs one exchange through shared memory, eagerly or as part of the graph that is being traced.

    Args:
        kind: "sum" (see `shared_memory.reduce`) or "gather", of one tensor (`shared_memory.gather`).
        tensors: its inputs, of one dtype.
        name: as for `run`.
        process_set: the process set that takes part.
        **attributes: further arguments of `reduce`.
    """
    name = _clean(name)

    def exchange(name: str) -> list[tf.Tensor]:
        if kind == "gather":
            return [shared_memory.gather(tensors[0], name, process_set)]
        return shared_memory.reduce(tensors, name, process_set, **attributes)

    if not tf.executing_eagerly():
        return exchange(_unique(name))
    with watchdog.waiting(name, _detail(f"shared_{kind}", tensors), everyone=process_set.process_set_id == 0):
        return exchange(name)


def zeros(shape: Any, dtype: Any) -> tf.Tensor:
    """Zeros to bring to an exchange, of which TensorFlow does not know that they are constant.

    Of a constant it computes whatever follows when it optimises the graph, an exchange too, on this rank alone.
    """
    return tf.raw_ops.Empty(shape=tf.convert_to_tensor(shape, tf.int32), dtype=tf.as_dtype(dtype), init=True)


def _clean(name: str) -> str:
    """The name in characters that TensorFlow takes for a node's."""
    name = re.sub(r"[^A-Za-z0-9_.\-]", "_", name)
    return name if name[:1].isalnum() else f"x{name}"


def _detail(kind: str, tensors: Sequence[tf.Tensor]) -> str:
    """What must be alike on all ranks: `float32[3, 4]`, or `float32[any, 4]` where each may bring rows of its own."""
    own_rows = "gather" in kind or "alltoall" in kind
    shapes = [["any", *t.shape[1:]] if own_rows else list(t.shape) for t in tensors]
    return ", ".join(f"{t.dtype.name}[{', '.join(map(str, s))}]" for t, s in zip(tensors, shapes, strict=True))


def forget() -> None:
    """Drops the graphs of eager calls: they belong to a job that has ended (see `hvdkit.runtime`)."""
    _one_node.cache_clear()


def caller(kind: str, line: bool = True) -> str:
    """A name for a call to which the user gave none: `kind` and where in the user's code it is made.

    So calls that ranks make in different order do not meet; Horovod then reports the names that it waits for.

    Args:
        kind: name of the operation.
        line: whether the line counts; otherwise all calls of one function are alike (for what the root rank and
            the others call on two lines of an `if`).
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame = frame.f_back
    file = PurePath(frame.f_code.co_filename).name
    # Autograph writes the user's function into a file of random name: its lines are the same on all ranks.
    place = frame.f_code.co_name if file.startswith("__autograph_generated") else f"{file}.{frame.f_code.co_name}"
    return f"hvdkit.{kind}.{place}.{frame.f_lineno}" if line else f"hvdkit.{kind}.{place}"


def _unique(name: str) -> str:
    """Tells apart operations of one name that may run at the same time, by their order in the outermost graph.

    Two optimizers of one class in a custom `train_step`, for example. Each rank traces the same graph, so the numbers
    agree, whatever else a rank has traced before.
    """
    graph = tf.compat.v1.get_default_graph()
    while getattr(graph, "outer_graph", None) is not None and graph.outer_graph.building_function:
        graph = graph.outer_graph
    used = _used.setdefault(graph, collections.Counter())
    used[name] += 1
    return name if used[name] == 1 else f"{name}.{used[name]}"


@functools.lru_cache(maxsize=1024)
def _one_node(kind: str, specs: tuple[Any, ...], name: str, process_set: Any, number: int, options: Any) -> Any:
    """The concrete function, which is a graph even while `tf.config.run_functions_eagerly` is on.

    `number` is part of the key: a process set that is registered anew gets another one, which graphs hold.
    """

    def call(*tensors: tf.Tensor) -> list[tf.Tensor]:
        return _operation(kind, tensors, name, process_set, options)

    return tf.function(call, input_signature=specs, autograph=False).get_concrete_function()


def _operation(kind: str, tensors: Sequence[tf.Tensor], name: str, process_set: Any, options: Any) -> list[tf.Tensor]:
    hvd = world.horovod()
    attributes = dict(options)
    common = {"name": name, "process_set": process_set, "ignore_name_scope": True}
    with tf.device(attributes.pop("device") or None):
        if kind == "alltoall":
            return list(hvd.alltoall(tensors[0], splits=tensors[1], **common, **attributes))
        if kind == "grouped_reducescatter":  # the public one takes no name
            return list(hvd.mpi_ops._grouped_reducescatter(list(tensors), **common, **attributes))
        if kind.startswith("grouped_"):
            return list(getattr(hvd, kind)(list(tensors), **common, **attributes))
        return [getattr(hvd, kind)(tensors[0], **common, **attributes)]

"""One collective under a name that is the same on all ranks: every collective on tensors goes through this module.

`run` runs one of Horovod's operations. `allreduce`, `allgather`, `send` and `receive` use the transport that serves
them best (see `hvdkit.collectives.transports`).

Horovod matches the ranks' operations by name, and takes the name from the operation's node in a graph. Outside a graph
it has no name: it pairs the next operation of that kind on each rank, without an error. So this module runs an eager
call as a graph of one node. It also names the nodes itself: TensorFlow's automatic names differ once one rank has
created one more layer or traced a function more often.
"""

import collections
import functools
import re
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

import tensorflow as tf

from hvdkit import watchdog, world
from hvdkit.collectives import transports
from hvdkit.collectives.transports import Scale, horovod

_OURS = ("hvdkit", "tensorflow", "keras")  # packages that are skipped in the search for the user's line
# How often each name is used in each graph: Horovod would confuse two nodes with the same name.
_used: weakref.WeakKeyDictionary[Any, collections.Counter[str]] = weakref.WeakKeyDictionary()


def run(
    kind: str,
    tensors: Sequence[tf.Tensor],
    name: str,
    process_set: Any = None,
    device: str = "",
    **attributes: Any,
) -> list[tf.Tensor]:
    """Runs one of Horovod's operations, eagerly or as part of the graph that is being traced.

    Args:
        kind: name of the operation in `horovod.tensorflow`: "allreduce", "grouped_allgather", "alltoall", ...
        tensors: its inputs, of dtypes that Horovod supports; for "alltoall" the rows and the splits (empty for even
            splits).
        name: the same on all ranks; characters that TensorFlow does not allow are replaced. If one graph uses the name
            again, a number is appended.
        process_set: the process set that takes part; None for all ranks.
        device: device of the operation, as in `tf.device`.
        **attributes: further arguments, such as `op` and `root_rank`.

    Returns:
        The operation's outputs; for "alltoall" the rows and the received splits.
    """
    process_set = process_set or world.horovod().global_process_set
    return _run(horovod.run, True, kind, tensors, name, process_set, kind=kind, device=device, **attributes)


def allreduce(
    tensors: Sequence[tf.Tensor], name: str, process_set: Any, scale: Scale, overlaps: bool = False
) -> list[tf.Tensor]:
    """Sums tensors of one dtype over ranks, by the transport that serves them (see `Transport.allreduce`).

    Args:
        tensors: dense, in the same order and of the same shapes on all ranks.
        name: as for `run`.
        process_set: the process set that takes part.
        scale: factors of the sum.
        overlaps: whether it overlaps other operations of the graph.
    """
    transport = transports.choose("allreduce", tensors[0].dtype, process_set)
    how = {"scale": scale, "overlaps": overlaps}
    return _run(transport.allreduce, transport.needs_graph, "allreduce", tensors, name, process_set, **how)


def allreduce_start(tensors: Sequence[tf.Tensor], name: str, process_set: Any, scale: Scale, slot: str) -> None:
    """Starts what `allreduce_done` ends, by the same transport (see `Transport.allreduce_start`)."""
    transport = transports.choose("allreduce", tensors[0].dtype, process_set)
    name = _clean(name) if tf.executing_eagerly() else _unique(_clean(name))
    transport.allreduce_start(tensors, name, process_set, scale=scale, slot=slot)


def allreduce_done(
    tensors: Sequence[tf.Tensor], name: str, process_set: Any, scale: Scale, slot: str, is_started: tf.Tensor
) -> list[tf.Tensor]:
    """Returns the results of what `allreduce_start` has started (see `Transport.allreduce_done`)."""
    transport = transports.choose("allreduce", tensors[0].dtype, process_set)
    given, options = [*tensors, is_started], {"transport": transport, "scale": scale, "slot": slot}
    return _run(_done, transport.needs_graph, "allreduce", given, name, process_set, **options)


def _done(
    given: Sequence[tf.Tensor], name: str, process_set: Any, transport: transports.Transport, **options: Any
) -> list[tf.Tensor]:
    *tensors, is_started = given
    return transport.allreduce_done(tensors, name, process_set, is_started=is_started, **options)


def allgather(tensor: tf.Tensor, name: str, process_set: Any) -> tf.Tensor:
    """Concatenates the ranks' rows, by the transport that serves them (see `Transport.allgather`)."""
    transport = transports.choose("allgather", tensor.dtype, process_set)
    return _run(transport.allgather, transport.needs_graph, "allgather", [tensor], name, process_set)[0]


def send(tensor: tf.Tensor, name: str, pair: Any) -> tf.Tensor:
    """Sends a tensor of at least one dimension to the other rank of a process set, which calls `receive`.

    Returns:
        A tensor that is available once the tensor is sent.
    """
    transport = transports.choose("transfer", tensor.dtype, pair)
    options = {"root": world.rank()}
    return _run(transport.transfer, transport.needs_graph, "transfer", [tensor], name, pair, **options)[0]


def receive(shape: tf.Tensor, dtype: Any, name: str, pair: Any, root: int) -> tf.Tensor:
    """Returns the tensor that the other rank of a process set passes to `send`.

    Args:
        shape: shape of the tensor, int32 [dimensions].
        dtype: dtype of the tensor.
        name: as for `run`, and the same as on the other rank.
        pair: the process set of the two ranks.
        root: the rank that sends.
    """
    transport = transports.choose("transfer", dtype, pair)
    room = zeros(transport.room(shape), dtype)
    return _run(transport.transfer, transport.needs_graph, "transfer", [room], name, pair, root=root)[0]


def _run(
    operation: Callable[..., list[tf.Tensor]],
    needs_graph: bool,
    report_as: str,
    tensors: Sequence[tf.Tensor],
    name: str,
    process_set: Any,
    **options: Any,
) -> list[tf.Tensor]:
    """Runs `operation(tensors, name, process_set, **options)`, eagerly or as part of the graph that is being traced."""
    name = _clean(name)
    if not tf.executing_eagerly():
        return operation(tensors, _unique(name), process_set, **options)
    with watchdog.waiting(name, _detail(report_as, tensors), everyone=process_set.process_set_id == 0):
        if not needs_graph:
            return operation(tensors, name, process_set, **options)
        specs = tuple(tf.TensorSpec([None] * t.shape.rank, t.dtype) for t in tensors)
        number, items = process_set.process_set_id, tuple(sorted(options.items()))
        return list(map(_of_any_gradient, _one_node(operation, specs, name, process_set, number, items)(*tensors)))


def _of_any_gradient(result: tf.Tensor) -> tf.Tensor:
    """Returns the result of an eager call, which takes a gradient of any float dtype, as Horovod's operations do.

    The graph would refuse one of another dtype than its own, such as the `output_gradients` of a tape.
    """
    if not result.dtype.is_floating:
        return result

    @tf.custom_gradient
    def same(tensor: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        return tf.identity(tensor), lambda upstream: tf.cast(upstream, tensor.dtype)

    return same(result)


def zeros(shape: Any, dtype: Any) -> tf.Tensor:
    """Returns zeros as input of a collective; TensorFlow does not know that they are constant.

    TensorFlow folds constants when it optimizes a graph: it would run a collective on a constant, on this rank alone.
    """
    return tf.raw_ops.Empty(shape=tf.convert_to_tensor(shape, tf.int32), dtype=tf.as_dtype(dtype), init=True)


def _clean(name: str) -> str:
    """Replaces the characters that TensorFlow does not allow in a node's name."""
    name = re.sub(r"[^A-Za-z0-9_.\-]", "_", name)
    return name if name[:1].isalnum() else f"x{name}"


def _detail(kind: str, tensors: Sequence[tf.Tensor]) -> str:
    """Returns what must match on all ranks: `float32[3, 4]`, or `float32[any, 4]` if the number of rows may differ."""
    own_rows = any(part in kind for part in ("gather", "alltoall", "transfer"))
    shapes = [["any", *t.shape[1:]] if own_rows else list(t.shape) for t in tensors]
    return ", ".join(f"{t.dtype.name}[{', '.join(map(str, s))}]" for t, s in zip(tensors, shapes, strict=True))


def forget() -> None:
    """Drops the graphs of eager calls: they belong to a job that has ended (see `hvdkit.runtime`)."""
    _one_node.cache_clear()


def caller(kind: str, line: bool = True) -> str:
    """Returns a name for an unnamed call: `kind` and the position of the call in the user's code.

    So calls that ranks make in a different order do not match; Horovod then reports the names that it waits for.

    Args:
        kind: name of the operation.
        line: whether the name contains the line number. Without it, all calls in one function have the same
            name: the root rank and the others may call in two branches of an `if`.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame = frame.f_back
    file = PurePath(frame.f_code.co_filename).name
    # Autograph writes the user's function to a file with a random name, but its lines are the same on all ranks.
    place = frame.f_code.co_name if file.startswith("__autograph_generated") else f"{file}.{frame.f_code.co_name}"
    return f"hvdkit.{kind}.{place}.{frame.f_lineno}" if line else f"hvdkit.{kind}.{place}"


def _unique(name: str) -> str:
    """Numbers operations with the same name that may run at the same time, by their order in the outermost graph.

    An example is two optimizers of one class in a custom `train_step`. Each rank traces the same graph, so the numbers
    match, whatever else a rank has traced before.
    """
    graph = tf.compat.v1.get_default_graph()
    while getattr(graph, "outer_graph", None) is not None and graph.outer_graph.building_function:
        graph = graph.outer_graph
    used = _used.setdefault(graph, collections.Counter())
    used[name] += 1
    return name if used[name] == 1 else f"{name}.{used[name]}"


@functools.lru_cache(maxsize=1024)
def _one_node(operation: Any, specs: tuple[Any, ...], name: str, process_set: Any, number: int, options: Any) -> Any:
    """Returns the concrete function, which is a graph even while `tf.config.run_functions_eagerly` is on.

    `number` is part of the cache key: a process set that is registered again gets a new number, which graphs contain.
    """

    def call(*tensors: tf.Tensor) -> list[tf.Tensor]:
        return operation(tensors, name, process_set, **dict(options))

    return tf.function(call, input_signature=specs, autograph=False).get_concrete_function()

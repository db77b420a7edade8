"""Horovod's operations on tensors, with the names and arguments of `horovod.tensorflow.keras`.

They accept everything that TensorFlow converts to a tensor (arrays, numbers, Keras and TensorFlow variables), eagerly
and in graphs, and return tensors. All ranks of the process set must call them. In a job of one rank each is the
identity.

**Names.** Horovod matches the ranks' calls by name; here names also apply to eager calls. A call without a name is
identified by its line in the user's code. If ranks call in a different order, values are not mixed up: the job stops,
and Horovod reports the lines that wait. Ranks that call on different lines must pass the same `name`. An unnamed
`broadcast` is identified by its enclosing function, because the root rank often calls in another branch.

**Dtypes.** Dtypes that Horovod does not support (bfloat16, 16 and 32 bit unsigned integers, ...) are converted if the
conversion is exact. Averages do not overflow: they are computed in a wider dtype. Factors apply in at least float32,
to float64 and integers in float64. Operations without a meaning (sums of bool or strings) raise a `TypeError`.

**Arguments.** `horovod.tensorflow` and `horovod.tensorflow.keras` order some arguments differently, and name the first
one `tensor` or `value`: both are accepted (see `hvdkit.compat.horovod_arguments`).
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hvdkit import collectives, watchdog, world
from hvdkit.collectives import transports, wire
from hvdkit.collectives.adasum import adasum
from hvdkit.collectives.casting import NoneCompressor
from hvdkit.collectives.transports.base import scaled
from hvdkit.compat.horovod_arguments import of_both_modules
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)

# Dtypes that Horovod cannot sum, and the dtype in which they are sent instead.
_ADDED_AS = {"bfloat16": "float32", "int16": "int32", "uint16": "int32", "uint32": "int64"}
_SCATTERED_AS = {**_ADDED_AS, "int8": "int32", "uint8": "int32"}
_ADDED = {"uint8", "int8", "int32", "int64", "float16", "float32", "float64"}

# Autograph would rewrite these functions for the user's graph, which fails.
_as_it_is = tf.autograph.experimental.do_not_convert


class UnsupportedOperationError(UsageError, NotImplementedError):
    """The operation does not exist for these values. A `NotImplementedError`, as in Horovod."""


@_as_it_is
@of_both_modules(
    "tensor average device_dense device_sparse compression op prescale_factor postscale_factor name process_set "
    "ignore_name_scope"
)
def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: Any = None,
    compression: Any = NoneCompressor,
    device_dense: str = "",
    device_sparse: str = "",
    process_set: Any = None,
    ignore_name_scope: bool = False,
) -> Any:
    """Reduces a value over all ranks.

    Args:
        value: tensor-like of any shape, the same on all ranks; or `tf.IndexedSlices`, whose rows are allgathered.
        name: name of the allreduce, the same on all ranks.
        average: deprecated: True for `op=Average`, False for `op=Sum`.
        prescale_factor: factor before the reduction.
        postscale_factor: factor after the reduction.
        op: `hvdkit.Average` (the default; truncated for integers), `Sum`, `Min`, `Max`, `Product` or `Adasum` (floats
            only).
        compression: rounds the value before it is sent: `hvdkit.Compression.none`, `fp16` or `bf16` (sent as float32
            here; only `DistributedOptimizer` sends half the bytes).
        device_dense: device on which dense values are reduced, as in `tf.device`.
        device_sparse: likewise for `tf.IndexedSlices`.
        process_set: the ranks that take part; by default all.
        ignore_name_scope: ignored, accepted for compatibility with Horovod: names never contain scopes here.

    Returns:
        A tensor of the value's shape and dtype, or `tf.IndexedSlices`; the average of integer `tf.IndexedSlices` has
        floats, as in Horovod.

    Raises:
        ValueError: both `op` and `average` are given, this rank is not in the process set, or the operation does not
            support `op`.
        TypeError: values of this dtype cannot be reduced.
    """
    op = _op(op, average)
    name = name or wire.caller("allreduce")
    scale = (prescale_factor, postscale_factor)
    if isinstance(value, tf.IndexedSlices):
        return _reduce_rows(value, name, op, scale, compression, device_sparse, process_set)
    tensor = _tensor(value)
    return _reduce([tensor], "allreduce", name, op, scale, compression, device_dense, process_set)[0]


@_as_it_is
def grouped_allreduce(
    tensors: Sequence[Any],
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = NoneCompressor,
    op: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: Any = None,
    ignore_name_scope: bool = False,
    name: str | None = None,
) -> list[Any]:
    """Reduces several values over all ranks as one Horovod group; see `allreduce`.

    Args:
        tensors: tensor-likes or `tf.IndexedSlices`, in the same order on all ranks; dtypes may be mixed.
        average: see `allreduce`, as for all others.
        device_dense: see `allreduce`.
        device_sparse: see `allreduce`.
        compression: see `allreduce`.
        op: see `allreduce`.
        prescale_factor: see `allreduce`.
        postscale_factor: see `allreduce`.
        process_set: see `allreduce`.
        ignore_name_scope: see `allreduce`.
        name: see `allreduce`.

    Returns:
        The reduced values, in the order given. `tf.IndexedSlices` keep their own dense shape.
    """
    op = _op(op, average)
    name = name or wire.caller("grouped_allreduce")
    scale = (prescale_factor, postscale_factor)
    results: list[Any] = list(tensors)
    dense = [i for i, t in enumerate(tensors) if not isinstance(t, tf.IndexedSlices)]
    for place, value in enumerate(tensors):
        if isinstance(value, tf.IndexedSlices):
            results[place] = _reduce_rows(value, f"{name}.{place}", op, scale, compression, device_sparse, process_set)
    inputs = [_tensor(tensors[i]) for i in dense]
    reduced = _reduce(inputs, "grouped_allreduce", name, op, scale, compression, device_dense, process_set)
    for place, tensor in zip(dense, reduced, strict=True):
        results[place] = tensor
    return results


@_as_it_is
@of_both_modules("tensor name ignore_name_scope process_set")
def allgather(value: Any, name: str | None = None, ignore_name_scope: bool = False, process_set: Any = None) -> Any:
    """Concatenates the ranks' values along the first dimension, in rank order.

    Args:
        value: tensor-like of at least one dimension; only the first dimension may differ between ranks.
        name: name of the allgather, the same on all ranks.
        ignore_name_scope: ignored, accepted for compatibility with Horovod.
        process_set: the ranks that take part; by default all.

    Returns:
        A tensor whose first dimension is the sum of the ranks' first dimensions. Its gradient is Horovod's, the mean
        over ranks, which is not that of one process; see `hvdkit.whole_batch` for losses.
    """
    return _gather([_tensor(value)], "allgather", name or wire.caller("allgather"), process_set)[0]


@_as_it_is
def grouped_allgather(
    tensors: Sequence[Any], name: str | None = None, ignore_name_scope: bool = False, process_set: Any = None
) -> list[Any]:
    """Concatenates several values of all ranks, each along its first dimension; see `allgather`."""
    inputs = [_tensor(t) for t in tensors]
    return _gather(inputs, "grouped_allgather", name or wire.caller("grouped_allgather"), process_set)


@_as_it_is
@of_both_modules("tensor root_rank name ignore_name_scope process_set")
def broadcast(
    value: Any, root_rank: int, name: str | None = None, ignore_name_scope: bool = False, process_set: Any = None
) -> Any:
    """Returns the root rank's value on all ranks.

    Args:
        value: tensor-like, of the same shape and dtype on all ranks.
        root_rank: the rank whose value is returned; a global rank, even with a process set.
        name: name of the broadcast, the same on all ranks.
        ignore_name_scope: ignored, accepted for compatibility with Horovod.
        process_set: the ranks that take part; by default all.

    Raises:
        ValueError: there is no such root rank.
    """
    tensor = _tensor(value)
    collectives.check_root(root_rank, process_set)
    if not collectives.takes_part(process_set):
        return tensor
    name = name or wire.caller("broadcast", line=False)
    return _moved(lambda t: wire.run("broadcast", t, name, process_set, root_rank=root_rank), [tensor])[0]


@_as_it_is
@of_both_modules(
    "tensor device_dense compression op name process_set ignore_name_scope prescale_factor postscale_factor"
)
def reducescatter(
    value: Any,
    name: str | None = None,
    op: Any = None,
    device_dense: str = "",
    compression: Any = NoneCompressor,
    process_set: Any = None,
    ignore_name_scope: bool = False,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    """Reduces a value over all ranks and returns this rank's part of the rows.

    Args:
        value: tensor-like of at least one dimension, of the same shape on all ranks.
        name: name of the reduce-scatter, the same on all ranks.
        op: `hvdkit.Average` (the default) or `hvdkit.Sum`.
        device_dense: device on which it is reduced, as in `tf.device`.
        compression: see `allreduce`.
        process_set: the ranks that take part; by default all.
        ignore_name_scope: ignored, accepted for compatibility with Horovod.
        prescale_factor: factor before the reduction.
        postscale_factor: factor after the reduction.

    Returns:
        The rows of this rank, in rank order; if they do not divide evenly, the first ranks get one row more.
    """
    inputs, scale = [_tensor(value)], (prescale_factor, postscale_factor)
    name = name or wire.caller("reducescatter")
    return _reduce(inputs, "reducescatter", name, _op(op), scale, compression, device_dense, process_set)[0]


@_as_it_is
def grouped_reducescatter(
    tensors: Sequence[Any],
    device_dense: str = "",
    compression: Any = NoneCompressor,
    op: Any = None,
    process_set: Any = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
) -> list[Any]:
    """Reduces several values over all ranks and returns this rank's part of the rows of each; see `reducescatter`."""
    inputs, scale = [_tensor(t) for t in tensors], (prescale_factor, postscale_factor)
    name = name or wire.caller("grouped_reducescatter")
    return _reduce(inputs, "grouped_reducescatter", name, _op(op), scale, compression, device_dense, process_set)


@_as_it_is
def alltoall(
    tensor: Any,
    splits: Any = None,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: Any = None,
) -> Any:
    """Sends some rows to each rank, and returns the rows that all ranks sent to this one.

    Args:
        tensor: tensor-like of at least one dimension; only the first dimension may differ between ranks.
        splits: the number of rows for each rank, in rank order; by default equal numbers.
        name: name of the alltoall, the same on all ranks.
        ignore_name_scope: ignored, accepted for compatibility with Horovod.
        process_set: the ranks that take part; by default all.

    Returns:
        The received rows, in the order of their senders; with `splits` a pair: the rows, and how many each rank sent.
    """
    rows = _tensor(tensor)
    _check_rows([rows], "alltoall")
    counts = tf.constant([], tf.int32) if splits is None else tf.cast(_tensor(splits), tf.int32)
    if not collectives.takes_part(process_set):
        return rows if splits is None else (rows, counts)
    name = name or wire.caller("alltoall")
    received: list[tf.Tensor] = []

    def exchange(inputs: list[tf.Tensor]) -> list[tf.Tensor]:
        output, sent = wire.run("alltoall", [*inputs, counts], name, process_set)
        received.append(sent)
        return [output]

    output = _moved(exchange, [rows])[0]
    return output if splits is None else (output, received[0])


@_as_it_is
def join() -> Any:
    """Signals that this rank has no more data, and waits until all ranks have done so.

    Meanwhile this rank contributes zeros to the others' `allreduce`. Only `allreduce` works while a rank has joined.

    Returns:
        The rank that joined last, as an integer tensor.
    """
    if world.size() == 1:
        return tf.constant(0)
    transports.refuse_to_join()
    with watchdog.waiting("hvdkit.join"):
        last = world.horovod().join()
    watchdog.count_anew()
    return last


def broadcast_global_variables(root_rank: int) -> Any:
    """Broadcasts all variables of a TensorFlow 1 graph; raises an error elsewhere, except in a job of one rank.

    Args:
        root_rank: the rank whose values are assigned.

    Returns:
        In a TensorFlow 1 graph, the operation that does this.

    Raises:
        RuntimeError: there are several ranks, and no such graph: TensorFlow 2 keeps no list of all variables. The
            message says what to write instead.
    """
    if not (tf.executing_eagerly() or tf.inside_function()):
        return collectives.broadcast_variables(tf.compat.v1.global_variables(), root_rank)
    if world.size() > 1:
        raise RuntimeError(
            f"broadcast_global_variables({root_rank}) has no variables to broadcast: TensorFlow 2 keeps no list of all "
            f"variables. Write hvdkit.broadcast_variables([*model.weights, *model.optimizer.variables], "
            f"root_rank={root_rank}), or give model.fit "
            f"callbacks=[hvdkit.callbacks.BroadcastGlobalVariablesCallback({root_rank})]."
        )
    return None


def _op(op: Any, average: bool | None = None) -> Any:
    hvd = world.horovod()
    op = hvd.mpi_ops.handle_average_backwards_compatibility(op, average)
    known = {n: getattr(hvd, n) for n in ("Average", "Sum", "Adasum", "Min", "Max", "Product")}
    if op not in known.values():
        raise ValueError(f"op must be one of {', '.join(f'hvdkit.{n}' for n in known)}, but is {op!r}.")
    return op


def _tensor(value: Any) -> tf.Tensor:
    if isinstance(value, tf.IndexedSlices):
        raise TypeError("tf.IndexedSlices can be reduced by allreduce and grouped_allreduce only; pass its .values.")
    return tf.convert_to_tensor(value)


def _reduce(
    tensors: list[tf.Tensor], kind: str, name: str, op: Any, scale: Any, compression: Any, device: str, process_set: Any
) -> list[tf.Tensor]:
    """Runs all reductions of dense tensors. Tensors of one dtype form a group, as Horovod requires."""
    scatter = "reducescatter" in kind
    if scatter:
        _check_rows(tensors, kind)
    _check_op(op, scatter)
    for tensor in tensors:
        _check_addable(tensor, kind, op)
    if not collectives.takes_part(process_set):
        return [scaled(scaled(t, scale[0]), scale[1]) for t in tensors]
    given = [scaled(t, scale[0]) for t in tensors]
    if op == world.horovod().Adasum:
        combined = adasum(given, name, process_set or world.horovod().global_process_set) if given else []
        return [scaled(t, scale[1]) for t in combined]
    wires, contexts = zip(*[compression.compress(t) for t in given], strict=True) if given else ((), ())
    packing = _Packing(op, scatter, collectives.size_of(process_set))
    carriers = [packing.carrier(t) for t in wires]
    results: list[Any] = [None] * len(tensors)
    for dtype in sorted(set(carriers)):
        places = [i for i, carrier in enumerate(carriers) if carrier == dtype]
        packed = [packing.pack(wires[i]) for i in places]
        group = f"{name}.{dtype}" if kind.startswith("grouped") else name
        reduced = wire.run(kind, packed, group, process_set, device, op=packing.op(dtype))
        for place, total in zip(places, reduced, strict=True):
            unpacked = packing.unpack(total, wires[place].dtype)
            result = scaled(compression.decompress(unpacked, contexts[place]), scale[1])
            results[place] = result if scatter else tf.ensure_shape(result, tensors[place].shape)
    return results


class _Packing:
    """What is sent for a tensor that is reduced: a dtype that Horovod can sum, in which no average overflows.

    The average of integers is exact: each is sent as the quotient and the remainder of its division by the number of
    ranks, both int64, because the sum of the integers themselves may exceed any integer dtype.
    """

    def __init__(self, op: Any, scatter: bool, ranks: int) -> None:
        self._given, self._ranks = op, ranks
        self._averages = op == world.horovod().Average
        self._sent_as = dict(_SCATTERED_AS if scatter else _ADDED_AS)
        if self._averages:
            self._sent_as["float16"] = "float32"

    def carrier(self, tensor: tf.Tensor) -> str:
        """Returns the dtype that is sent."""
        if self._averages and tensor.dtype.is_integer:
            return "int64"
        return self._sent_as.get(tensor.dtype.name, tensor.dtype.name)

    def op(self, carrier: str) -> Any:
        """Returns the operation on what is sent."""
        return world.horovod().Sum if self._averages and carrier == "int64" else self._given

    def pack(self, tensor: tf.Tensor) -> tf.Tensor:
        """Returns what is sent."""
        wide = tf.cast(tensor, self.carrier(tensor))
        if self._averages and tensor.dtype.is_integer:
            return tf.stack([wide // self._ranks, wide % self._ranks], axis=-1)
        return wide

    def unpack(self, total: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        """Returns the result in the tensor's own dtype; averages are rounded towards zero, as in Horovod."""
        if self._averages and dtype.is_integer:
            quotients, remainders = tf.unstack(total, num=2, axis=-1)
            floor, rest = quotients + remainders // self._ranks, remainders % self._ranks
            total = floor + tf.cast((floor < 0) & (rest > 0), total.dtype)
        return tf.cast(total, dtype)


def _reduce_rows(
    slices: tf.IndexedSlices, name: str, op: Any, scale: Any, compression: Any, device: str, process_set: Any
) -> tf.IndexedSlices:
    hvd = world.horovod()
    if op not in (hvd.Sum, hvd.Average):
        raise UnsupportedOperationError(
            "tf.IndexedSlices can be summed or averaged (op=hvdkit.Sum or hvdkit.Average), nothing else; "
            "tf.convert_to_tensor(slices) makes a dense tensor of them."
        )
    with tf.device(device or None):
        values, context = compression.compress(_tensor(slices.values))
        values = compression.decompress(allgather(values, f"{name}.values", process_set=process_set), context)
        indices = allgather(slices.indices, f"{name}.indices", process_set=process_set)
        if op == hvd.Average:  # as in Horovod, integers become floats
            values /= tf.cast(collectives.size_of(process_set), values.dtype)
        values = scaled(values, scale[0] * scale[1])
    shape = None if slices.dense_shape is None else _tensor(slices.dense_shape)
    return tf.IndexedSlices(values, indices, shape)


def _gather(tensors: list[tf.Tensor], kind: str, name: str, process_set: Any) -> list[tf.Tensor]:
    _check_rows(tensors, kind)
    if not collectives.takes_part(process_set) or not tensors:
        return tensors
    rows = _moved(lambda inputs: _run_by_dtype(inputs, kind, name, process_set), tensors)
    rows = [_naming_its_gradient(r) if r.dtype.is_floating else r for r in rows]
    return [tf.ensure_shape(r, [None, *t.shape[1:]]) if t.shape.rank else r for r, t in zip(rows, tensors, strict=True)]


@tf.custom_gradient
def _naming_its_gradient(rows: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """Returns gathered rows as they are, and warns where a loss takes their gradient."""

    def gradient(upstream: Any) -> Any:
        _warn_of_mean()
        return upstream

    return tf.identity(rows), gradient


@functools.cache
def _warn_of_mean() -> None:
    if world.rank() == 0:
        _log.warning(
            "A loss takes the gradient of hvd.allgather, which is Horovod's: the mean over ranks. The optimizer takes "
            "their mean once more, so what is gathered counts less than in one process, by the number of ranks. For a "
            "loss over the examples of all ranks, gather them by hvd.whole_batch(...)."
        )


def _run_by_dtype(tensors: list[tf.Tensor], kind: str, name: str, process_set: Any) -> list[tf.Tensor]:
    results: list[Any] = [None] * len(tensors)
    for dtype in sorted({t.dtype.name for t in tensors}):
        places = [i for i, t in enumerate(tensors) if t.dtype.name == dtype]
        suffix = f".{dtype}" if kind.startswith("grouped") else ""
        outputs = wire.run(kind, [tensors[i] for i in places], name + suffix, process_set)
        for place, output in zip(places, outputs, strict=True):
            results[place] = output
    return results


def _moved(move: Callable[[list[tf.Tensor]], list[tf.Tensor]], tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    """Moves tensors without changing values: dtypes that Horovod does not support are sent as float32 or as bytes."""
    for tensor in tensors:
        if tensor.dtype in (tf.string, tf.resource, tf.variant):
            raise TypeError(
                f"Tensors of dtype {tensor.dtype.name} cannot be sent between ranks. Send Python objects, such as "
                f"tensor.numpy(), with hvdkit.allgather_object or hvdkit.broadcast_object."
            )
    half = [t.dtype == tf.bfloat16 for t in tensors]  # exact in float32, and gradients can flow through it
    wires = [tf.cast(t, tf.float32) if h else collectives.to_wire(t) for t, h in zip(tensors, half, strict=True)]
    outputs = zip(move(wires), tensors, half, strict=True)
    return [tf.cast(o, t.dtype) if h else collectives.from_wire(o, t.dtype) for o, t, h in outputs]


def _check_rows(tensors: Sequence[tf.Tensor], kind: str) -> None:
    if any(t.shape.rank == 0 for t in tensors):
        raise ValueError(
            f"{kind} works along the first dimension, but was given a scalar: pass a list of one element, "
            f"such as tf.expand_dims(value, 0)."
        )


def _check_addable(tensor: tf.Tensor, kind: str, op: Any) -> None:
    if op == world.horovod().Adasum and not tensor.dtype.is_floating:
        raise TypeError(
            f"op=hvdkit.Adasum combines floats, but was given values of dtype {tensor.dtype.name}. Use hvdkit.Sum or "
            f"hvdkit.Average."
        )
    if tensor.dtype.name not in _ADDED | _ADDED_AS.keys():
        raise TypeError(
            f"{kind} cannot reduce values of dtype {tensor.dtype.name}. Cast them to one of "
            f"{', '.join(sorted(_ADDED))}, or gather them with hvdkit.allgather and reduce them yourself."
        )


def _check_op(op: Any, scatter: bool) -> None:
    hvd = world.horovod()
    if scatter and op not in (hvd.Average, hvd.Sum):
        raise ValueError("reducescatter can sum or average (op=hvdkit.Sum or hvdkit.Average), nothing else.")

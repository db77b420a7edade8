"""Gradients that only some ranks have: on the others they count as zeros, as in one process.

TensorFlow returns None for a variable on which the loss does not depend. In one process that sees the global batch, a
variable has a gradient if the loss of any example depends on it. So where one rank has a gradient and another has none,
the other's is zero. Where no rank has one, it stays None: optimizers leave such variables and their slots alone.

In eager steps (`run_eagerly`, a loop without `tf.function`) each step may depend on other variables, so the ranks tell
each other in each step which gradients they have. In a graph this is known when the step is traced, at other times on
each rank, so no message is possible: there the watchdog compares (see `watchdog.traced`), and a difference ends the job
before the first step is over.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit import collectives
from hvdkit.collectives.mesh import mesh_of
from hvdkit.compat.keras3 import native_variable

# The kinds of gradients, in the order in which the more general one wins: slices with int32 indices and with int64
# indices are added up as the latter, slices and a dense gradient as a dense one.
_NONE, _SLICES, _LONG_SLICES, _DENSE = range(4)


def complete(
    grads: Sequence[Any], variables: Sequence[Any], name: str, process_set: Any, is_local: Callable[[Any], bool]
) -> list[Any]:
    """Returns the gradients with zeros for those that only other ranks have; all ranks then have the same kinds.

    A collective call in an eager step. In a graph it returns the gradients as they are.

    Args:
        grads: this rank's gradients, one per variable: `tf.Tensor`, `tf.IndexedSlices` or None.
        variables: their variables, or the tensors that are differentiated by; in the same order on all ranks.
        name: prefix of the name of the collective, the same on all ranks.
        process_set: the ranks that take part, of which this is one.
        is_local: whether a variable's gradient stays on this rank.
    """
    if not tf.executing_eagerly() or mesh_of(variables) is not None:
        return list(grads)
    mine = [_NONE if is_local(v) else _kind(g) for g, v in zip(grads, variables, strict=True)]
    everyone = _gather(mine, name, process_set)
    if everyone is None:
        return list(grads)
    kinds = everyone.max(axis=0)
    return [
        grad if kind == own else _converted(grad, variable, kind)
        for grad, variable, own, kind in zip(grads, variables, mine, kinds, strict=True)
    ]


def _gather(mine: list[int], name: str, process_set: Any) -> np.ndarray | None:
    """Returns the kinds of all ranks, [ranks, variables]; None if ranks have different numbers of variables."""
    sent = tf.constant([len(mine), *mine], tf.int32)
    rows = collectives.gather_rows(sent, f"{name}.kinds", process_set).numpy()
    if rows.size != process_set.size() * len(sent):
        return None  # the check of all reductions says how the ranks' models differ
    table = rows.reshape([-1, len(sent)])
    return table[:, 1:] if (table[:, 0] == len(mine)).all() else None


def _kind(grad: Any) -> int:
    if grad is None:
        return _NONE
    if not isinstance(grad, tf.IndexedSlices):
        return _DENSE
    return _LONG_SLICES if grad.indices.dtype == tf.int64 else _SLICES


def _converted(grad: Any, variable: Any, kind: int) -> Any:
    """Returns a gradient as one of a more general kind; None as zeros."""
    if kind == _DENSE:
        return tf.zeros_like(native_variable(variable)) if grad is None else tf.convert_to_tensor(grad)
    indices = tf.int64 if kind == _LONG_SLICES else tf.int32
    if grad is not None:
        return tf.IndexedSlices(grad.values, tf.cast(grad.indices, indices), grad.dense_shape)
    native = native_variable(variable)
    rows = tf.zeros([0, *native.shape[1:]], native.dtype)
    return tf.IndexedSlices(rows, tf.zeros([0], indices), tf.shape(native, indices))

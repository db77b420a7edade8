"""Streaming synchronization: which weights form a fragment, at which steps, and the fragment that is under way."""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit.optimizers.gradients import GradientExchange

_slots = itertools.count()


def divide(sizes: Sequence[int], fragments: int) -> list[list[int]]:
    """Divides variables into fragments of about the same size.

    The largest variable comes first, and each goes to the fragment that is smallest so far (R. L. Graham, "Bounds on
    multiprocessing timing anomalies", 1969). Variables of one size keep the order of their depth, so they are dealt
    out: with equal layers, fragment p has every P-th one, as in the strided pattern of streaming DiLoCo.

    Args:
        sizes: bytes of each variable, in the order of depth.
        fragments: number of fragments, at most the number of variables.

    Returns:
        The places of the variables of each fragment, in order.
    """
    found: list[list[int]] = [[] for _ in range(fragments)]
    filled = [(0, 0)] * fragments  # bytes, and number of variables: empty ones must not leave a fragment empty
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        smallest = min(range(fragments), key=lambda p: filled[p])
        found[smallest].append(place)
        filled[smallest] = (filled[smallest][0] + sizes[place], filled[smallest][1] + 1)
    return [sorted(places) for places in found]


def timetable(steps: int, fragments: int) -> list[int]:
    """Returns which fragment is synchronized after which step.

    Args:
        steps: H, the steps in which each fragment is synchronized once.
        fragments: P, at most H. They are H / P steps apart; the last one comes after step H.

    Returns:
        For a step t, counted from 1, the fragment at index t mod H; `fragments` where there is none.
    """
    table = [fragments] * steps
    for fragment in range(fragments):
        table[steps * (fragment + 1) // fragments % steps] = fragment
    return table


class UnderWay:
    """The fragment that ranks allreduce while they compute: at most one.

    What this rank has sent is kept in variables. So training that resumes from a checkpoint repeats the allreduce, with
    the same result.

    Args:
        exchange: reduces the fragment, over its ranks.
        fragments: the variables of each fragment.
    """

    def __init__(self, exchange: GradientExchange, fragments: Sequence[Sequence[Any]]) -> None:
        self._exchange, self._fragments = exchange, fragments
        self._slot = f"{exchange.name}.{next(_slots)}"
        dtypes = sorted({_dtype(v) for variables in fragments for v in variables})
        longest = {d: max(sum(_lengths(variables, d)) for variables in fragments) for d in dtypes}
        with tf.init_scope():
            # 1 + the number of the fragment; 0 if there is none.
            self._which = keras.Variable(0, trainable=False, dtype="int32", name="fragment_under_way")
            self._sent = {
                d: keras.Variable(np.zeros(n), trainable=False, dtype=d, name=f"sent_of_{len(fragments)}_fragments")
                for d, n in longest.items()
            }
            # Not in a checkpoint: whether the allreduce runs in this process.
            self._is_started = tf.Variable(False, trainable=False, name="allreduce_is_started")

    @property
    def common(self) -> list[keras.Variable]:
        """The variables that are the same on all ranks."""
        return [self._which]

    @property
    def own(self) -> list[keras.Variable]:
        """The variables that differ between ranks."""
        return list(self._sent.values())

    def start(self, fragment: int, changes: Sequence[tf.Tensor]) -> None:
        """Starts the allreduce of a fragment."""
        variables = self._fragments[fragment]
        flat = {
            d: tf.concat([tf.reshape(c, [-1]) for c in changes if c.dtype.name == d], axis=0)
            for d in sorted({c.dtype.name for c in changes})
        }
        for dtype, tensor in flat.items():
            room = self._sent[dtype].shape[0] - tensor.shape[0]
            self._sent[dtype].assign(tf.pad(tensor, [[0, room]]) if room else tensor)
        firsts = [next(v for v in variables if _dtype(v) == dtype) for dtype in flat]
        self._exchange.start(list(flat.values()), firsts, f"fragment{fragment}", self._slot)
        self._which.assign(1 + fragment)
        self._is_started.assign(True)

    def is_under_way(self, fragment: tf.Tensor) -> tf.Tensor:
        """Returns whether the fragment (int32, scalar) is under way."""
        return tf.equal(self._which.value, 1 + fragment)

    def done(self, fragment: int) -> list[tf.Tensor]:
        """Waits for the allreduce of a fragment and returns the mean of the changes, one per variable."""
        variables = self._fragments[fragment]
        dtypes = sorted({_dtype(v) for v in variables})
        sent = [self._sent[d].value[: sum(_lengths(variables, d))] for d in dtypes]
        started = self._is_started.read_value()
        reduced = self._exchange.done(sent, f"fragment{fragment}", self._slot, started)
        self.drop()
        parts = {d: iter(tf.split(flat, _lengths(variables, d))) for d, flat in zip(dtypes, reduced, strict=True)}
        return [tf.reshape(next(parts[_dtype(v)]), v.shape) for v in variables]

    def drop(self) -> None:
        """Forgets the fragment that is under way."""
        self._which.assign(0)
        self._is_started.assign(False)

    def resume(self) -> None:
        """Makes `done` repeat the allreduce, as what runs in this process may be of an earlier training."""
        self._is_started.assign(False)


def _dtype(variable: Any) -> str:
    return keras.backend.standardize_dtype(variable.dtype)


def _lengths(variables: Sequence[Any], dtype: str) -> list[int]:
    """Returns the number of elements of each variable of this dtype."""
    return [int(np.prod(v.shape)) for v in variables if _dtype(v) == dtype]

"""The common base of compressors with error feedback.

Each rank adds the compression error of earlier gradients to the next gradient, so it is sent later, not lost (F. Seide
et al., "1-bit stochastic gradient descent", 2014; S. Karimireddy et al., "Error feedback fixes SignSGD", 2019,
https://arxiv.org/abs/1901.09847). A model's gradients are sent as one vector: a compressor does not see layers, unless
it asks for them.
"""

import abc
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.collectives.traffic import elements

State = Sequence[tuple[keras.Variable, tf.Tensor]]


class ErrorFeedback(abc.ABC):
    """A gradient reduction that sends compressed gradients.

    Create one per optimizer. Its state is created when the optimizer is built, and saved with the optimizer.
    `GradientExchange` calls `reduce` in the graph of a step.
    """

    def __init__(self) -> None:
        self._shapes: list[tuple[int, ...]] = []
        self.common: list[keras.Variable] = []  # state that is the same on all ranks
        self.own: list[keras.Variable] = []  # state of this rank
        self._dense: keras.Variable | None = None

    @abc.abstractmethod
    def make_state(self, shapes: Sequence[tuple[int, ...]], ranks: int) -> None:
        """Creates the variables in `common` and `own` for gradients of these shapes."""

    @abc.abstractmethod
    def average(
        self, gradients: list[tf.Tensor], payload: tf.Tensor, name: str, process_set: Any
    ) -> tuple[list[tf.Tensor], tf.Tensor, State]:
        """Averages gradients over the ranks, and assigns nothing.

        If a gradient of any rank is not finite, the result on all ranks must not be finite.

        Args:
            gradients: this rank's gradients, float32, dense.
            payload: a few more float32 numbers, such as the heartbeat, that are summed exactly with the same messages.
            name: prefix of the names of the collectives.
            process_set: the ranks that take part.

        Returns:
            The approximate mean of `gradients` over the ranks (float32, dense); the exact sum of `payload` (float32
            [n]); and the new values of the state's variables.
        """

    @abc.abstractmethod
    def wire_bytes(self, shapes: Sequence[tuple[int, ...]], ranks: int) -> float:
        """Returns the bytes that a rank sends per step for gradients of these shapes."""

    def build(self, shapes: Sequence[tuple[int, ...]], ranks: int) -> keras.Variable:
        """Creates the state once, and returns the switch that turns compression off.

        Raises:
            ValueError: the state exists for other gradients: a compressor serves only one optimizer.
        """
        shapes = [tuple(shape) for shape in shapes]
        if self._dense is None:
            with tf.init_scope():
                self._dense = variable((), "dense", "int32")
                self.common.append(self._dense)
                self.make_state(shapes, ranks)
            self._shapes = shapes
        elif shapes != self._shapes:
            raise ValueError(
                f"{type(self).__name__} keeps what it leaves out for {len(self._shapes)} gradients, and was given "
                f"{len(shapes)} of other shapes. Make one for each optimizer: hvdkit.Compression.{_name_of(self)}(...)."
            )
        return self._dense

    @classmethod
    def compress(cls, tensor: tf.Tensor) -> Any:
        """Rejects a single tensor.

        Raises:
            TypeError: always: a single tensor has no place to keep the compression error.
        """
        raise TypeError(
            f"{cls.__name__} compresses the gradients of an optimizer, and keeps what it leaves out with it: give it "
            f"to DistributedOptimizer or DistributedGradientTape. A single exchange can have fp16 or bf16."
        )

    @property
    def is_dense(self) -> bool:
        """Whether compression is turned off."""
        return self._dense is not None and bool(self._dense.numpy())

    def set_dense(self, dense: bool) -> None:
        """Turns compression off or on again from the next step; call it on all ranks alike."""
        if self._dense is None:
            raise RuntimeError("The optimizer is not built yet: there is nothing to switch.")
        self._dense.assign(int(dense))

    def reduce(
        self, gradients: Sequence[tf.Tensor], payload: tf.Tensor, name: str, process_set: Any
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Averages gradients of any float dtype, with `average` or, while compression is off, with an allreduce."""
        wide = [tf.cast(g, tf.float32) for g in gradients]
        dense = self.build([tuple(g.shape) for g in wide], process_set.size())

        def compressed() -> list[tf.Tensor]:
            averages, total, state = self.average(wide, payload, f"{name}.{_name_of(self)}", process_set)
            # A step that overflowed is skipped (see `optimizers.loss_scale`), and must not affect the state. The
            # averages are the same on all ranks, and so is this decision.
            is_finite = tf.math.is_finite(tf.add_n([tf.reduce_sum(a) for a in averages]))
            tf.cond(is_finite, lambda: _assign(state), lambda: None)
            return [*averages, total]

        def everything() -> list[tf.Tensor]:
            hvd = world.horovod()
            *sums, total = collectives.reduce_dense(
                [*wide, payload], f"{name}.dense", op=hvd.Sum, process_set=process_set
            )
            return [*(s / process_set.size() for s in sums), total]

        *averages, total = tf.cond(dense.value > 0, everything, compressed)
        return [tf.cast(a, g.dtype) for a, g in zip(averages, gradients, strict=True)], total


def variable(shape: tuple[int, ...], name: str, dtype: str = "float32") -> keras.Variable:
    """Returns a variable of zeros for a compressor's state."""
    return keras.Variable(np.zeros(shape), trainable=False, dtype=dtype, name=f"compression_{name}")


def _assign(state: State) -> None:
    for kept, value in state:
        kept.assign(value)


def poison(vector: tf.Tensor, axis: int | None = None) -> tf.Tensor:
    """Returns 0 where a vector, or each of its rows, is finite, and NaN elsewhere; add it to what this rank sends."""
    return 0.0 * tf.reduce_sum(vector, axis=axis)


def join(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Concatenates all elements into one vector."""
    return tf.concat([tf.reshape(t, [-1]) for t in tensors], axis=0)


def part(vector: tf.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[tf.Tensor]:
    """Does the inverse of `join`."""
    pieces = tf.split(vector, [elements([shape]) for shape in shapes])
    return [tf.reshape(piece, shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _name_of(compressor: ErrorFeedback) -> str:
    return type(compressor).__name__.lower()

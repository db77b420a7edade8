"""PowerSGD: sends each gradient matrix as a product of two low-rank factors.

T. Vogels, S. Karimireddy and M. Jaggi, "PowerSGD: practical low-rank gradient compression for distributed
optimization", 2019, https://arxiv.org/abs/1905.13727, algorithm 1: one step of power iteration, starting from the right
factor of the last step, with error feedback. Convolution kernels become matrices of (height × width × inputs) by
outputs.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.collectives.traffic import elements, ring_bytes
from hvdkit.compression.feedback import ErrorFeedback, State, variable


class PowerSGD(ErrorFeedback):
    """Sends low-rank factors of the gradients; sends vectors and small matrices uncompressed.

    Args:
        rank: rank of the approximation, 1 or more. Vogels et al. use 2 for a ResNet-18 and 4 for an LSTM.

    Raises:
        ValueError: `rank` is not an integer of 1 or more.
    """

    def __init__(self, rank: int = 4) -> None:
        super().__init__()
        if rank != int(rank) or rank < 1:
            raise ValueError(f"rank must be a whole number, 1 or more, but is {rank}")
        self.rank = int(rank)

    def make_state(self, shapes: Sequence[tuple[int, ...]], ranks: int) -> None:
        """Creates the right factor of each matrix, the same on all ranks, and its compression error."""
        generator = np.random.default_rng(0)  # the same on all ranks
        self._right: dict[int, keras.Variable] = {}
        self._error: dict[int, keras.Variable] = {}
        for place, shape in enumerate(shapes):
            if self._gains(shape):
                rows, columns = _matrix(shape)
                self._right[place] = variable((columns, self.rank), "right_factor")
                self._right[place].assign(generator.normal(size=(columns, self.rank)))
                self._error[place] = variable((rows, columns), "error")
        self.common += self._right.values()
        self.own += self._error.values()

    def average(
        self, gradients: list[tf.Tensor], payload: tf.Tensor, name: str, process_set: Any
    ) -> tuple[list[tf.Tensor], tf.Tensor, State]:
        """Averages with two allreduces: left factors and uncompressed gradients, then right factors."""
        results = list(gradients)
        matrices = {
            place: tf.reshape(gradients[place], _matrix(tuple(gradients[place].shape))) + error.value
            for place, error in self._error.items()
        }
        whole = [place for place in range(len(gradients)) if place not in matrices]
        lefts = [matrices[place] @ right.value for place, right in self._right.items()]
        sent = [*lefts, *(gradients[place] for place in whole), payload]
        *received, total = _sum(sent, f"{name}.left", process_set)
        received = [r / process_set.size() for r in received]
        for place, tensor in zip(whole, received[len(lefts) :], strict=True):
            results[place] = tensor
        lefts = [tf.linalg.qr(left).q for left in received[: len(lefts)]]
        rights = [tf.matmul(m, left, transpose_a=True) for m, left in zip(matrices.values(), lefts, strict=True)]
        rights = [r / process_set.size() for r in _sum(rights, f"{name}.right", process_set)] if rights else []
        state: list[tuple[keras.Variable, tf.Tensor]] = []
        for place, left, right in zip(matrices, lefts, rights, strict=True):
            product = tf.matmul(left, right, transpose_b=True)
            state += [(self._right[place], right), (self._error[place], matrices[place] - product)]
            results[place] = tf.reshape(product, tf.shape(gradients[place]))
        return results, total, state

    def wire_bytes(self, shapes: Sequence[tuple[int, ...]], ranks: int) -> float:
        """Counts both factors of each matrix, and the uncompressed gradients, in a ring."""
        numbers = [self.rank * sum(_matrix(s)) if self._gains(s) else elements([s]) for s in map(tuple, shapes)]
        return ring_bytes(4 * sum(numbers), ranks)

    def _gains(self, shape: tuple[int, ...]) -> bool:
        rows, columns = _matrix(shape)
        return min(rows, columns) >= self.rank and self.rank * (rows + columns) < rows * columns


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return elements([shape[:-1]]), shape[-1] if shape else 1


def _sum(tensors: list[tf.Tensor], name: str, process_set: Any) -> list[tf.Tensor]:
    return collectives.reduce_dense(tensors, name, op=world.horovod().Sum, process_set=process_set)

"""Quantization: 8 bits or 1 bit per number, with one scale per block.

The traffic is that of a ring, as for a dense allreduce. Each rank sends every other rank its part, compressed; sums its
own part; and sends the sum to all ranks, compressed again. Both compression errors are kept and added the next time (H.
Tang et al., "DoubleSqueeze", 2019, https://arxiv.org/abs/1905.05957).
"""

import abc
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdkit import collectives
from hvdkit.collectives import wire
from hvdkit.collectives.traffic import elements, ring_bytes
from hvdkit.compression.feedback import ErrorFeedback, State, join, part, poison, variable

_BLOCK = 256  # numbers per scale


class Quantised(ErrorFeedback):
    """Sends every number in a few bits. Subclasses define how a block becomes bytes."""

    block_bytes: int

    @staticmethod
    @abc.abstractmethod
    def encode(blocks: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Encodes float32 [n, 256] as bytes, uint8 [n, bytes], and scales, float32 [n]."""

    @staticmethod
    @abc.abstractmethod
    def decode(codes: tf.Tensor, scales: tf.Tensor) -> tf.Tensor:
        """Decodes the numbers, float32 [n, 256]."""

    def make_state(self, shapes: Sequence[tuple[int, ...]], ranks: int) -> None:
        """Creates the compression errors of the gradient that this rank sends, and of its part of the sum.

        Both are as long as the gradients, so another number of ranks can resume from a checkpoint.
        """
        self._lost, self._lost_of_sum = (variable((elements(shapes),), name) for name in ("error", "error_of_sum"))
        self.own += [self._lost, self._lost_of_sum]

    def average(
        self, gradients: list[tf.Tensor], payload: tf.Tensor, name: str, process_set: Any
    ) -> tuple[list[tf.Tensor], tf.Tensor, State]:
        """Scatters codes, sums, and allgathers codes of the sums together with the payload."""
        ranks, shapes = process_set.size(), [tuple(g.shape) for g in gradients]
        count, length = self._blocks(shapes, ranks), elements(shapes)
        shape = [ranks, count, _BLOCK]

        def in_blocks(vector: tf.Tensor) -> tf.Tensor:
            return tf.reshape(tf.pad(vector, [[0, count * ranks * _BLOCK - length]]), shape)

        message, lost = self._pack(tf.reshape(in_blocks(join(gradients) + self._lost.value), [-1, _BLOCK]))
        equal_parts = tf.constant([], tf.int32)  # Horovod's alltoall without sizes
        mine, _ = wire.run("alltoall", [message, equal_parts], f"{name}.scatter", process_set)
        mean = tf.reduce_sum(tf.reshape(self._unpack(mine), shape), axis=0) / ranks
        rank = process_set.rank()
        message, lost_of_sum = self._pack(mean + in_blocks(self._lost_of_sum.value)[rank])
        rows = -(-payload.shape[0] * 4 // message.shape[1])  # rows of codes that contain the payload
        bits = tf.reshape(tf.bitcast(payload, tf.uint8), [-1])
        extra = tf.reshape(tf.pad(bits, [[0, rows * message.shape[1] - bits.shape[0]]]), [rows, -1])
        everyone = collectives.gather_rows(tf.concat([message, extra], axis=0), f"{name}.gather", process_set)
        everyone = tf.reshape(everyone, [ranks, count + rows, message.shape[1]])
        bits = tf.reshape(everyone[:, count:], [ranks, -1])[:, : payload.shape[0] * 4]
        payloads = tf.bitcast(tf.reshape(bits, [ranks, payload.shape[0], 4]), tf.float32)
        whole = self._unpack(tf.reshape(everyone[:, :count], [ranks * count, message.shape[1]]))
        begin = rank * count * _BLOCK  # of this rank's part
        placed = tf.pad(tf.reshape(lost_of_sum, [-1]), [[begin, (ranks - 1) * count * _BLOCK - begin]])
        state = [(self._lost, tf.reshape(lost, [-1])[:length]), (self._lost_of_sum, placed[:length])]
        return part(tf.reshape(whole, [-1])[:length], shapes), tf.reduce_sum(payloads, axis=0), state

    def wire_bytes(self, shapes: Sequence[tuple[int, ...]], ranks: int) -> float:
        """Counts two passes of the codes, as in a ring."""
        return ring_bytes(self._blocks(shapes, ranks) * ranks * (self.block_bytes + 4), ranks)

    @staticmethod
    def _blocks(shapes: Sequence[tuple[int, ...]], ranks: int) -> int:
        """Returns the number of blocks in one rank's part."""
        return -(-elements(shapes) // (_BLOCK * ranks))

    def _pack(self, blocks: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns codes and scales as uint8 [n, bytes], and the compression error."""
        codes, scales = self.encode(blocks)
        scales += poison(blocks, axis=1)  # codes have no NaN
        return tf.concat([codes, tf.bitcast(scales, tf.uint8)], axis=1), blocks - self.decode(codes, scales)

    def _unpack(self, message: tf.Tensor) -> tf.Tensor:
        return self.decode(message[:, : self.block_bytes], tf.bitcast(message[:, self.block_bytes :], tf.float32))


class Int8(Quantised):
    """Eight bits per number: a quarter of float32's bytes. The scale is the largest magnitude of the block / 127."""

    block_bytes = _BLOCK

    @staticmethod
    def encode(blocks: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Rounds to multiples of 1/127 of the largest magnitude."""
        scales = tf.reduce_max(tf.abs(blocks), axis=1) / 127
        steps = tf.math.divide_no_nan(blocks, scales[:, tf.newaxis])
        return tf.bitcast(tf.cast(tf.round(steps), tf.int8), tf.uint8), scales

    @staticmethod
    def decode(codes: tf.Tensor, scales: tf.Tensor) -> tf.Tensor:
        """Multiplies by the scale."""
        return tf.cast(tf.bitcast(codes, tf.int8), tf.float32) * scales[:, tf.newaxis]


class OneBit(Quantised):
    """One bit per number, its sign: about 1/28 of float32's bytes. The scale is the mean magnitude of the block.

    It costs accuracy with optimizers that scale each weight by the magnitudes of its gradients, such as Adam: all
    numbers of a block get the same magnitude. Measured on two ranks: 56.4 % instead of 67.0 % for `cifar_cnn` on
    CIFAR-10 (AdamW, seven epochs), 96.4 % instead of 97.7 % for an MLP on MNIST (Adam, one epoch). Prefer `PowerSGD` or
    `TopK`.
    """

    block_bytes = _BLOCK // 8

    @staticmethod
    def encode(blocks: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Packs eight signs into a byte."""
        weights = tf.constant([1, 2, 4, 8, 16, 32, 64, 128], tf.int32)
        signs = tf.reshape(tf.cast(blocks >= 0, tf.int32), [-1, _BLOCK // 8, 8])
        return tf.cast(tf.reduce_sum(signs * weights, axis=2), tf.uint8), tf.reduce_mean(tf.abs(blocks), axis=1)

    @staticmethod
    def decode(codes: tf.Tensor, scales: tf.Tensor) -> tf.Tensor:
        """Returns plus or minus the scale."""
        masks = tf.constant([1, 2, 4, 8, 16, 32, 64, 128], tf.uint8)
        signs = tf.bitwise.bitwise_and(codes[:, :, tf.newaxis], masks) > 0
        return tf.where(tf.reshape(signs, [-1, _BLOCK]), scales[:, tf.newaxis], -scales[:, tf.newaxis])

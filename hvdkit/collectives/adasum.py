"""Adasum: combines the updates of several ranks; orthogonal updates are summed, parallel ones averaged.

S. Maleki et al., "Scaling Distributed Training with Adaptive Summation", MLSys 2021, https://arxiv.org/abs/2006.02924:

    Adasum(a, b) = (1 - a·b / (2 |a|²)) a + (1 - a·b / (2 |b|²)) b

for each tensor, in a binary tree over the ranks. Float64 tensors are combined in float64, all others in float32. The
dot products are those of vectors whose largest element is 1, so they neither overflow nor vanish.

Horovod implements this for MPI only. Here it uses alltoall and allgather, so it also works over Gloo and NCCL. The tree
is the paper's vector halving with distance doubling: at each level, two ranks exchange halves of their vectors. So the
traffic is that of a ring allreduce, about twice the buffer.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdkit import collectives
from hvdkit.collectives import wire


def adasum(tensors: Sequence[tf.Tensor], name: str, process_set: Any) -> list[tf.Tensor]:
    """Reduces tensors by Adasum over the ranks of a process set; in a graph or eagerly.

    Args:
        tensors: dense tensors of any shape and float dtype, the same on all ranks; each is reduced independently.
        name: prefix of the names of the collectives, the same on all ranks.
        process_set: the Horovod process set that takes part; its size must be a power of two.

    Raises:
        ValueError: the number of ranks is not a power of two.
    """
    ranks = process_set.size()
    if ranks & (ranks - 1):
        raise ValueError(
            f"op=hvdkit.Adasum combines ranks in pairs and needs 2, 4, 8, ... of them, but there are {ranks}. Start "
            f"another number, or use op=hvdkit.Average."
        )
    sizes = [tf.size(t) for t in tensors]
    dtype = tf.float64 if any(t.dtype == tf.float64 for t in tensors) else tf.float32
    flat = tf.concat([tf.reshape(tf.cast(t, dtype), [-1]) for t in tensors], axis=0)
    length = tf.size(flat)
    padding = -length % ranks
    vector = tf.pad(flat, [[0, padding]])
    owners = tf.repeat(
        tf.range(len(tensors) + 1), tf.stack([*sizes, padding])
    )  # the tensor that each element belongs to
    mine = process_set.rank()
    for level in range(ranks.bit_length() - 1):
        vector, owners = _combine(vector, owners, len(tensors) + 1, level, mine, f"{name}.{level}", process_set)
    pieces = collectives.gather_rows(vector[tf.newaxis], f"{name}.gather", process_set)
    whole = tf.reshape(tf.gather(pieces, _order_of_pieces(ranks)), [-1])[:length]
    parts = tf.split(whole, sizes, num=len(tensors))
    return [tf.cast(tf.reshape(p, tf.shape(t)), t.dtype) for p, t in zip(parts, tensors, strict=True)]


def _combine(
    vector: tf.Tensor, owners: tf.Tensor, count: int, level: int, mine: int, name: str, process_set: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes one level of the tree: this rank keeps one half of its vector and receives the partner's same half."""
    upper = bool(mine >> level & 1)
    halves, halves_of_owners = tf.split(vector, 2), tf.split(owners, 2)
    kept, sent, owners = halves[upper], halves[not upper], halves_of_owners[upper]
    received = _swap(sent, mine ^ (1 << level), name, process_set)
    first, second = (received, kept) if upper else (kept, received)
    dots = _dots(tf.cast(first, tf.float64), tf.cast(second, tf.float64), owners, count)
    # The two vectors are distributed over the ranks of this subtree.
    everyone = collectives.gather_rows(dots[tf.newaxis], f"{name}.dots", process_set)
    base = mine >> (level + 1) << (level + 1)
    dots, largest = everyone[base : base + (2 << level), :3], everyone[base : base + (2 << level), 3:]
    shrinking = tf.math.divide_no_nan(largest, tf.reduce_max(largest, axis=0))
    aa, ab, bb = tf.unstack(tf.reduce_sum(dots * shrinking**2, axis=0))
    weights = [tf.cast(1 - tf.math.divide_no_nan(ab, 2 * norm), first.dtype) for norm in (aa, bb)]
    return tf.gather(weights[0], owners) * first + tf.gather(weights[1], owners) * second, owners


def _dots(first: tf.Tensor, second: tf.Tensor, owners: tf.Tensor, count: int) -> tf.Tensor:
    """Returns a·a, a·b and b·b of each tensor's elements, divided by their largest magnitude; and this: [4, count]."""
    magnitudes = tf.maximum(tf.abs(first), tf.abs(second))
    largest = tf.maximum(tf.math.unsorted_segment_max(magnitudes, owners, count), 0)  # without elements: negative
    a, b = (tf.math.divide_no_nan(v, tf.gather(largest, owners)) for v in (first, second))
    return tf.stack([*(tf.math.unsorted_segment_sum(p, owners, count) for p in (a * a, a * b, b * b)), largest])


def _swap(tensor: tf.Tensor, partner: int, name: str, process_set: Any) -> tf.Tensor:
    splits = tf.scatter_nd([[partner]], [tf.size(tensor)], [process_set.size()])
    received, _ = wire.run("alltoall", [tensor, splits], f"{name}.halves", process_set)
    return tf.ensure_shape(received, [None])


def _order_of_pieces(ranks: int) -> list[int]:
    """Returns the rank that holds each piece of the result: the ranks ordered by their bit-reversed numbers."""
    bits = ranks.bit_length() - 1
    return sorted(range(ranks), key=lambda rank: [rank >> level & 1 for level in range(bits)])

"""The order of a shard's examples in an epoch, and the rest of an epoch after the number of ranks has changed.

An order is a function of (seed, epoch, share, shares) alone; for a shard that does not fit in memory, also of the size
of its shuffle buffer. So the number of steps taken is enough to know the position in an epoch. Each rank can compute
which examples all ranks have seen.

When a different number of ranks resumes in the middle of an epoch, they divide the examples that nobody has seen.
Neighbours in the split stay together: each rank still reads roughly one contiguous part of the files. The ranks finish
the epoch on this rest with the same global batch. So the epoch keeps its number of steps. Later epochs are not
affected.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.shard import even_share

_REST = 7_777_777_777  # keeps the seeds of an epoch's rest different from the seeds of full epochs


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive steps of one epoch with a constant number of shards.

    Attributes:
        shares: number of shards.
        steps: number of steps.
        buffers: size of each shard's shuffle buffer in examples; None for shards in memory, which are fully permuted.
    """

    shares: int
    steps: int
    buffers: tuple[int, ...] | None

    def to_json(self) -> dict[str, Any]:
        """Returns a dictionary to store in a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Stretch":
        """Restores what `to_json` returned."""
        buffers = content["buffers"]
        return cls(content["shares"], content["steps"], None if buffers is None else tuple(buffers))

    def goes_on(self, shares: int, buffers: Sequence[int] | None) -> bool:
        """Returns whether these shards would continue in the same order."""
        return self.shares == shares and self.buffers == (None if buffers is None else tuple(buffers))


def generator(seed: int, epoch: int, share: int, shares: int) -> np.random.Generator:
    """Returns the random generator that permutes a shard in memory."""
    return np.random.default_rng([seed, epoch, share, shares])


def stream_seed(seed: int, epoch: Any, share: int, shares: int, rest: int = 0) -> Any:
    """Returns the seed that shuffles a streamed shard, a different one for each (epoch, share) pair.

    Args:
        seed: the run's seed.
        epoch: the epoch, as a number or a scalar int64 tensor.
        share: index of the shard.
        shares: number of shards.
        rest: how often the number of ranks has changed in this epoch.
    """
    return seed * 1_000_003 + epoch * shares + share + rest * _REST


def shuffled(examples: tf.data.Dataset, buffer: int, seed: Any) -> tf.data.Dataset:
    """Shuffles a stream. Call it only in a function that TensorFlow traces (`flat_map`).

    tf.data combines the global seed with the seed of a shuffle. It fails if the global seed is 0 and the other one is a
    tensor. Here `set_seed` affects the traced function only.
    """
    tf.random.set_seed(1)
    return examples.shuffle(buffer, seed=seed)


def order_of_parts(parts: int, seed: Any) -> tf.Tensor:
    """Returns the order in which an epoch of a streamed shard takes its parts, int32 [parts]; a graph function.

    Args:
        parts: number of parts.
        seed: the epoch's `stream_seed`, as a number or a tensor.
    """
    keys = tf.random.stateless_uniform([parts], tf.stack([tf.cast(seed, tf.int64), tf.constant(parts, tf.int64)]))
    return tf.argsort(keys, stable=True)


def untouched(
    examples: int,
    seed: int,
    epoch: int,
    global_batch: int,
    stretches: Sequence[Stretch],
    edges: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the indices of the examples that an epoch has not seen yet, int64, ascending.

    Args:
        examples: number of examples in the split.
        seed: the run's seed.
        epoch: number of the epoch.
        global_batch: examples per step.
        stretches: the steps taken so far, in order.
        edges: those of the split's parts, if a streamed shard is read in parts; see `hvdkit.data.sources.edges_of`.
    """
    places = np.arange(examples)
    for rest, stretch in enumerate(stretches):
        seen = []
        taken = stretch.steps * (global_batch // stretch.shares)
        for share in range(stretch.shares):
            part = places[slice(*even_share(len(places), share, stretch.shares))]
            in_parts = None if edges is None or rest else within(edges, *even_share(examples, share, stretch.shares))
            seen.append(part[_order(len(part), seed, epoch, share, stretch, rest, in_parts)[:taken]])
        places = np.setdiff1d(places, np.concatenate(seen), assume_unique=True)
    return places


def within(edges: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Returns the edges, counted from `start`, of those parts that have the examples `start` to `stop`."""
    inside = edges[(edges > start) & (edges < stop)]
    return np.concatenate([[0], inside - start, [stop - start]])


def _order(
    size: int, seed: int, epoch: int, share: int, stretch: Stretch, rest: int, edges: np.ndarray | None
) -> np.ndarray:
    if stretch.buffers is None:
        return generator(seed, epoch, share, stretch.shares).permutation(size)
    buffer = stretch.buffers[share]
    epoch_seed = stream_seed(seed, epoch, share, stretch.shares, rest)
    places = np.arange(size)
    if edges is not None:
        parts = order_of_parts(len(edges) - 1, epoch_seed).numpy()
        places = np.concatenate([np.arange(edges[part], edges[part + 1]) for part in parts])
    seeds = tf.data.Dataset.from_tensors(tf.constant(epoch_seed, tf.int64))
    in_order = tf.data.Dataset.from_tensor_slices(places)
    order = seeds.flat_map(lambda s: shuffled(in_order, buffer, s)).batch(1 << 16)
    return np.concatenate([np.zeros(0, np.int64), *order.as_numpy_iterator()])

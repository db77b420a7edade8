"""The order in which an epoch sees a share's examples, and what is left of an epoch that other ranks began.

An order is a function of numbers alone: (seed, epoch, share, shares), and for a share that does not fit in memory the
size of its shuffle buffer. So the position in an epoch needs no more than the number of steps taken, and each rank can
tell which examples all of them have seen.

When another number of ranks takes over in the middle of an epoch, the examples not yet seen are divided over them:
neighbours in the split stay together, so that a rank still reads about its part of the files. The epoch is finished
on these rests, with the same global batch, and so in as many steps as it would have had; later epochs are as ever.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.shard import even_share

_REST = 7_777_777_777  # tells the seed of an epoch's rest from those of whole epochs


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Steps of one epoch that the same number of shares has taken.

    Attributes:
        shares: how many took part.
        steps: how many steps they took.
        buffers: examples in each share's shuffle buffer; None for shares in memory, which are permuted as a whole.
    """

    shares: int
    steps: int
    buffers: tuple[int, ...] | None

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Stretch":
        """Undoes `to_json`."""
        buffers = content["buffers"]
        return cls(content["shares"], content["steps"], None if buffers is None else tuple(buffers))

    def goes_on(self, shares: int, buffers: Sequence[int] | None) -> bool:
        """Whether such shares see the rest of it in the order in which it began."""
        return self.shares == shares and self.buffers == (None if buffers is None else tuple(buffers))


def generator(seed: int, epoch: int, share: int, shares: int) -> np.random.Generator:
    """What permutes a share in memory."""
    return np.random.default_rng([seed, epoch, share, shares])


def stream_seed(seed: int, epoch: Any, share: int, shares: int, rest: int = 0) -> Any:
    """What shuffles a share that is streamed; as many as (epoch, share) pairs, for any realistic number of shares.

    Args:
        seed: the run's.
        epoch: a number, or a scalar int64 tensor.
        share: number of the share.
        shares: how many there are.
        rest: how often the epoch has changed hands before.
    """
    return seed * 1_000_003 + epoch * shares + share + rest * _REST


def shuffled(examples: tf.data.Dataset, buffer: int, seed: Any) -> tf.data.Dataset:
    """Shuffles a stream; call it in a function that is being traced (`flat_map`).

    tf.data mixes the program's seed into a shuffle's, and fails where that is 0 and the shuffle's a tensor. This sets
    the seed of the function that is being traced, and of nothing else.
    """
    tf.random.set_seed(1)
    return examples.shuffle(buffer, seed=seed)


def untouched(examples: int, seed: int, epoch: int, global_batch: int, stretches: Sequence[Stretch]) -> np.ndarray:
    """The places of the examples that an epoch's stretches have not seen, int64, ascending.

    Args:
        examples: in the split.
        seed: the run's.
        epoch: its number.
        global_batch: examples a step.
        stretches: one after another.
    """
    places = np.arange(examples)
    for rest, stretch in enumerate(stretches):
        seen = []
        taken = stretch.steps * (global_batch // stretch.shares)
        for share in range(stretch.shares):
            part = places[slice(*even_share(len(places), share, stretch.shares))]
            seen.append(part[_order(len(part), seed, epoch, share, stretch, rest)[:taken]])
        places = np.setdiff1d(places, np.concatenate(seen), assume_unique=True)
    return places


def _order(size: int, seed: int, epoch: int, share: int, stretch: Stretch, rest: int) -> np.ndarray:
    if stretch.buffers is None:
        return generator(seed, epoch, share, stretch.shares).permutation(size)
    buffer = stretch.buffers[share]
    seeds = tf.data.Dataset.from_tensors(tf.constant(stream_seed(seed, epoch, share, stretch.shares, rest), tf.int64))
    order = seeds.flat_map(lambda s: shuffled(tf.data.Dataset.range(size), buffer, s)).batch(1 << 16)
    return np.concatenate([np.zeros(0, np.int64), *order.as_numpy_iterator()])

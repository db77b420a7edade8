"""Dividing examples over ranks: an even share each, and as many steps as everyone."""

import logging
import time

import tensorflow as tf

from hvdkit import world

_log = logging.getLogger(__name__)


def shard(dataset: tf.data.Dataset, rank: int | None = None, size: int | None = None) -> tf.data.Dataset:
    """Returns this rank's share of a data set: every `size`-th element, and as many as every other rank gets.

    A batched data set is divided by batches, so its batch size is the local batch. What does not divide evenly is left
    out at the end (at most `size - 1` elements), with a warning: a rank with a batch more would wait for ever for the
    others. Shuffle with a fixed seed before you shard, or without one after.

    Args:
        dataset: any finite or infinite `tf.data.Dataset`; one whose length TensorFlow does not know is read once.
        rank: which share; by default this rank's.
        size: number of shares; by default the number of ranks.

    Raises:
        ValueError: there are fewer elements than ranks.
    """
    size = world.size() if size is None else size
    rank = world.rank() if rank is None else rank
    if size == 1:
        return dataset
    length = int(dataset.cardinality())
    if length == tf.data.INFINITE_CARDINALITY:
        return dataset.shard(size, rank)
    if length == tf.data.UNKNOWN_CARDINALITY:
        length = _count(dataset)
    if length < size:
        raise ValueError(
            f"A data set of {length} element(s) cannot be divided over {size} ranks: each needs one. A batched "
            f"data set is divided by batches: use a smaller batch, or fewer ranks."
        )
    if length % size:
        _log.warning(
            "%d of %d elements are left out, so that all %d ranks take %d steps.",
            length % size, length, size, length // size,
        )  # fmt: skip
    return dataset.shard(size, rank).take(length // size)


def even_share(examples: int, share: int, shares: int) -> tuple[int, int]:
    """Returns the range `[start, stop)` of one of `shares` contiguous parts whose sizes differ by one at most."""
    return examples * share // shares, examples * (share + 1) // shares


def _count(dataset: tf.data.Dataset) -> int:
    _log.info("TensorFlow does not know the data set's length; counting it once ...")
    start = time.monotonic()
    length = int(dataset.reduce(tf.constant(0, tf.int64), lambda count, *_: count + 1))
    _log.info(
        "... %d elements in %.1f s; tf.data.experimental.assert_cardinality(%d) saves this.",
        length, time.monotonic() - start, length,
    )  # fmt: skip
    return length

"""Shards data over ranks: every rank gets an even shard and takes the same number of steps.

Elements that do not divide evenly are dropped, repeated, or joined with examples of weight 0; the caller chooses.
"""

import logging
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import world
from hvdkit.compat.data_batches import unit_of
from hvdkit.data import common_order
from hvdkit.data.loaders import divider_of
from hvdkit.data.rounds import counted, steps_of
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)

_POLICIES = ("drop", "pad", "join")
_UNSHUFFLED = (
    "With uneven='join', every epoch takes the %d examples in the order of the arrays, as fit does with shuffle=False. "
    "To shuffle, give tf.data.Dataset.from_tensor_slices(...).shuffle(examples, seed=0)."
)


def shard(
    dataset: Any,
    rank: int | None = None,
    size: int | None = None,
    uneven: str = "drop",
    batch_size: int | None = None,
) -> Any:
    """Returns this rank's shard of the data: every `size`-th element. All ranks get the same number of elements.

    The shard is of the kind of the data, so `fit` shuffles arrays, and the batches of a `PyDataset`, as it did. A
    batched data set is sharded by batches, so its batch size is the local batch. Its last batch may be smaller: `fit`
    then weighs the ranks by their examples, and so does `hvdkit.shard_loss`. A rank with one batch more than the others
    would wait for them forever. `uneven` says what to do with elements that do not divide evenly:

    - `"drop"` (the default) drops them at the end, at most `size - 1` elements, and logs a warning with their number.
    - `"pad"` fills the last round with elements from the beginning, at most `size - 1`, and logs a warning. These count
      twice in this epoch's gradients and metrics (as in PyTorch's `DistributedSampler`).
    - `"join"` takes every example exactly once. It returns batches of `batch_size` examples as `(x, y, weights)`. Ranks
      whose last batch is short fill it with examples of weight 0; larger weights of the other examples in that batch
      compensate. With a loss that divides by the batch (Keras' default reduction, `"sum_over_batch_size"`), the
      gradient of each step, also of the smaller last one, is that of one process with batch `size * batch_size`.
      Limits: BatchNormalization and `metrics=` see the fill examples (at most `size - 1` per epoch). The loss and
      `weighted_metrics=` do not, but they weigh the last step's examples by up to `size`. With the reduction `"sum"`,
      and with masks or labels to ignore, the last step is not exact.

    Horovod's own `hvd.join()` does not keep replicas equal under `fit`: a rank that has joined contributes zeros, but
    no longer updates its weights.

    Shuffle with a fixed seed before you shard, or without a seed afterwards: the data must have the same order on all
    ranks. That includes a `PyDataset` that shuffles in `on_epoch_end`.

    Args:
        dataset: a finite or infinite `tf.data.Dataset`. If TensorFlow does not know its length, it is read once. Or
            arrays or tensors [examples, ...] in tuples, lists or dicts, as `Model.fit` takes them; for `"join"` a pair
            `(x, y)`, or a triple with sample weights [examples, ...]. Or one of these, without `"join"`:

            - a `keras.utils.PyDataset`, whose shard keeps its workers and is told of epochs;
            - a generator or another iterator of batches, finite or not, which all ranks read as a whole. No length is
              needed: a rank yields its batch when it has read one for each rank;
            - a `torch.utils.data.DataLoader`, which loads only this rank's batches, unless it is of an
              `IterableDataset`. A sampler that has no generator draws with seed 0 on all ranks;
            - a `grain.MapDataset`; without `"pad"`, a `grain.IterDataset`, which each rank reads as a whole, or a
              `grain.DataLoader`, whose records are divided, so that its batch size is the local batch;
            - a Hugging Face `datasets.Dataset`, whose examples are divided.
        rank: index of the shard; by default this rank.
        size: number of shards; by default the number of ranks.
        uneven: `"drop"`, `"pad"` or `"join"`.
        batch_size: the local batch, for `"join"` only.

    Returns:
        Data of the kind that was given: for arrays, arrays in the same structure. With `"join"`, a `tf.data.Dataset`,
        which `fit` does not shuffle.

    Raises:
        ValueError: there are fewer elements than ranks (`"drop"`), or none.
        UsageError: an argument is wrong, the arrays differ in length, or this kind of data cannot be divided so.
        TypeError: the data are of no kind that can be sharded.
    """
    size = world.size() if size is None else size
    rank = world.rank() if rank is None else rank
    _check_policy(uneven, batch_size)
    if divide := divider_of(dataset):
        if uneven == "join":
            raise UsageError(
                f"uneven='join' puts examples into batches itself, but a {type(dataset).__name__} yields what it has "
                f"put together: use 'drop' or 'pad'. fit weighs the ranks by the sizes of their batches."
            )
        return dataset if size == 1 else divide(dataset, rank, size, uneven)
    if not isinstance(dataset, tf.data.Dataset):
        examples = array_length(dataset)
        if uneven != "join":
            length = steps_of(examples, size, uneven, "examples")
            return take_rows(dataset, (rank + size * np.arange(length)) % examples)
        _log.warning(_UNSHUFFLED, examples)
        dataset = tf.data.Dataset.from_tensor_slices(tuple(dataset))
    if uneven == "join":
        return _join(dataset, rank, size, int(batch_size or 1))
    return _divide(dataset, rank, size, uneven)


def even_share(examples: int, share: int, shares: int) -> tuple[int, int]:
    """Returns the range `[start, stop)` of one of `shares` contiguous parts whose sizes differ by at most one."""
    return examples * share // shares, examples * (share + 1) // shares


def length_of(dataset: tf.data.Dataset) -> int | None:
    """Returns the number of elements, None if infinite. Reads the data set once if TensorFlow does not know it."""
    length = int(dataset.cardinality())
    if length == tf.data.INFINITE_CARDINALITY:
        return None
    return _count(dataset) if length == tf.data.UNKNOWN_CARDINALITY else length


def array_length(arrays: Any) -> int:
    """Returns the common number of examples of arrays in tuples, lists or dicts.

    Raises:
        TypeError: one of them is not an array.
        UsageError: they differ in length.
    """
    leaves = [leaf for leaf in keras.tree.flatten(arrays) if leaf is not None]
    for leaf in leaves:
        if not isinstance(leaf, (np.ndarray, tf.Tensor)) or not leaf.ndim:
            raise TypeError(
                f"Only NumPy arrays and tensors of examples (in tuples, lists or dicts), a tf.data.Dataset, PyDataset, "
                f"generator, DataLoader of PyTorch or Grain, or datasets.Dataset can be divided over ranks, but "
                f"{type(leaf).__module__}.{type(leaf).__name__} was given. Convert it with numpy.asarray(...), or make "
                f"an iterator of its batches: hvd.data.shard(iter(batches))."
            )
    lengths = sorted({len(leaf) for leaf in leaves})
    if len(lengths) != 1:
        raise UsageError(
            f"The arrays have {' and '.join(map(str, lengths)) or 'no'} examples; one example needs a row in each. "
            f"Give arrays of the same length."
        )
    return lengths[0]


def take_rows(arrays: Any, rows: np.ndarray) -> Any:
    """Picks rows by index from arrays in tuples, lists or dicts; None stays None."""

    def pick(leaf: Any) -> Any:
        if leaf is None:
            return None
        return tf.gather(leaf, rows) if isinstance(leaf, tf.Tensor) else leaf[rows]

    return keras.tree.map_structure(pick, arrays)


def _check_policy(uneven: str, batch_size: int | None) -> None:
    if uneven not in _POLICIES:
        raise UsageError(f"uneven must be one of {', '.join(_POLICIES)}, but is {uneven!r}.")
    if uneven == "join" and (batch_size is None or batch_size < 1):
        raise UsageError(
            f"uneven='join' puts examples into batches itself, to weigh the last one, but batch_size is {batch_size}. "
            f"Give the local batch: shard(dataset, uneven='join', batch_size=16). If the data set is batched, pass "
            f"dataset.unbatch()."
        )
    if uneven != "join" and batch_size is not None:
        raise UsageError(f"batch_size is for uneven='join'; with {uneven!r}, write shard(dataset).batch({batch_size}).")


def _divide(dataset: tf.data.Dataset, rank: int, size: int, uneven: str) -> tf.data.Dataset:
    if size == 1:
        return dataset
    common_order.warn_if_differs(dataset)
    length = length_of(dataset)
    if length is None:
        return dataset.shard(size, rank)
    steps = steps_of(length, size, uneven, unit_of(dataset))
    if uneven == "pad":
        return _padded(dataset, length, rank, size)
    return dataset.shard(size, rank).take(steps)


def _padded(dataset: tf.data.Dataset, length: int, rank: int, size: int) -> tf.data.Dataset:
    """Returns this rank's elements, plus one from the beginning of the data set if the last round has none for it.

    All ranks read that element here, once. If only one rank read the beginning again at the end of an epoch, a data set
    that shuffles would give it a different order than the others.
    """
    missing = -length % size  # the last ranks lack one element each
    mine = dataset.shard(size, rank)
    head = list(dataset.take(missing)) if missing else []
    place = rank - (size - missing)
    if place < 0:
        return mine
    return mine.concatenate(tf.data.Dataset.from_tensors(head[place % length]))


def _join(dataset: tf.data.Dataset, rank: int, size: int, batch: int) -> tf.data.Dataset:
    """Returns batches of (x, y, weights). Example i belongs to rank `i % size` and to step `i // (size * batch)`."""
    spec = dataset.element_spec
    if not (isinstance(spec, tuple) and len(spec) in (2, 3)):
        raise UsageError(
            f"uneven='join' gives examples a weight, so it needs (x, y) or (x, y, weight), but an element of this data "
            f"set is {spec}."
        )
    common_order.warn_if_differs(dataset)
    length = length_of(dataset)
    if length == 0:
        raise ValueError("A data set of 0 examples cannot be divided.")
    mine = dataset.shard(size, rank) if length is None else _padded(dataset, length, rank, size)

    def weigh(places: tf.Tensor, element: tuple) -> tuple:
        if length is None:
            weights = tf.ones_like(places, tf.float32)
        else:
            numbers = rank + size * places  # indices in the full data set
            all_places = size * tf.size(places, tf.int64)
            examples = tf.minimum(all_places, length - size * places[0])  # in this step, over all ranks
            share = tf.cast(all_places, tf.float32) / tf.cast(examples, tf.float32)
            weights = tf.where(numbers < length, share, 0.0)
        if len(element) == 3:
            given = tf.cast(element[2], tf.float32)
            weights = given * tf.reshape(weights, [-1] + [1] * (given.shape.rank - 1))
        return (*element[:2], weights)

    return mine.enumerate().batch(batch).map(weigh)


def _count(dataset: tf.data.Dataset) -> int:
    unit = unit_of(dataset)
    _log.info("TensorFlow does not know the length of the data set; counting its %s once ...", unit)
    start = time.monotonic()
    length = int(dataset.reduce(tf.constant(0, tf.int64), lambda count, *_: count + 1))
    message = "... %s in %.1f s; use tf.data.experimental.assert_cardinality(%d) to avoid this."
    _log.info(message, counted(length, unit), time.monotonic() - start, length)
    return length

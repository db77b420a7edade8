"""From examples to batches: each share read once, shuffled per epoch, batched, and prefetched.

A *share* is one of N even parts of a split. A rank feeds its own share; a process that trains N replicas by itself
(`mirrored`, or `single` told to imitate N ranks) feeds all of them side by side, so that step t of every strategy sees
the same examples: the global batch is always the concatenation of the shares' local batches.

The order of a share is a function of (seed, epoch, share, number of shares), for a share in memory and, by another
function, for one that is read again each epoch; which of the two it is depends on its size and `cache_bytes` alone.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data import balance
from hvdkit.data.shard import even_share
from hvdkit.data.sources import Source
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)

Encode = Callable[[Any], tf.Tensor]

_READ_AT_ONCE = 1024  # examples
_SHUFFLE_BYTES = 256 << 20  # of encoded examples in the shuffle buffer of a share that does not fit


@dataclasses.dataclass(frozen=True)
class Share:
    """One of `shares` even parts of a split.

    Attributes:
        share: its number.
        shares: how many there are.
        start: place of its first example in the split.
        size: number of its examples.
        inputs: all inputs, decoded, [size, ...]; None if they do not fit in memory and are read again each epoch.
        labels: all labels, int64 [size]; None likewise.
        stream: the examples as (encoded input, label), in a fixed order.
        prepare: graph function from an encoded input to the model's input.
    """

    share: int
    shares: int
    start: int
    size: int
    inputs: np.ndarray | None
    labels: np.ndarray | None
    stream: tf.data.Dataset
    prepare: Encode


def read_share(
    source: Source, split: str, share: int, shares: int, *, encode: Encode | None = None, cache_bytes: float
) -> Share:
    """Reads a share of a split, decoded, into memory if it fits.

    Args:
        source: where the examples come from.
        split: `train` or `test`.
        share: number of the share.
        shares: number of shares.
        encode: graph function applied after decoding (texts to token numbers).
        cache_bytes: what a decoded share may take; the same for all, since it also decides how they are shuffled.

    Raises:
        UsageError: an example cannot be decoded, or has another shape.
    """
    start, stop = even_share(source.size(split), share, shares)
    stream = source.read(split, start, stop)

    def prepare(encoded: Any) -> tf.Tensor:
        decoded = source.decode(encoded)
        return decoded if encode is None else encode(decoded)

    largest = -(-source.size(split) // shares)
    spec = stream.map(lambda x, _: prepare(x)).element_spec
    inputs = labels = None
    where = "read again each epoch"
    if largest * spec.shape.num_elements() * spec.dtype.size <= cache_bytes:
        began = time.monotonic()
        inputs, labels = _read_all(stream, prepare, spec, split, start, stop - start)
        where = f"{inputs.nbytes / 1e6:.0f} MB in memory, read in {time.monotonic() - began:.1f} s"
    _log.info("%s: share %d of %d, %d examples, %s", split, share, shares, stop - start, where)
    return Share(share, shares, start, stop - start, inputs, labels, stream, prepare)


def _read_all(
    stream: tf.data.Dataset, prepare: Encode, spec: tf.TensorSpec, split: str, start: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    inputs, labels, done = np.empty([size, *spec.shape], spec.dtype.as_numpy_dtype), np.empty([size], np.int64), 0
    prepared = stream.map(lambda x, y: (prepare(x), y), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    try:
        for x, y in prepared.batch(_READ_AT_ONCE).as_numpy_iterator():
            inputs[done : done + len(y)], labels[done : done + len(y)] = x, y
            done += len(y)
    except tf.errors.InvalidArgumentError as error:
        raise unreadable(split, start + done, start + min(done + _READ_AT_ONCE, size), error) from error
    return inputs, labels


def unreadable(split: str, start: int, stop: int, error: Exception) -> UsageError:
    """What to say of examples that TensorFlow cannot decode, or that have another shape than the others."""
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).split("[Op:")[0]
    return UsageError(
        f"An example of split {split!r}, between number {start} and {stop}, cannot be read ({reason.strip()[:200]}). "
        f"Repair or remove it; images of differing size need --image_size."
    )


def training_batches(
    shares: Sequence[Share],
    *,
    local_batch: int,
    steps_per_epoch: int,
    seed: int,
    sampling: balance.Sampling,
    class_weights: np.ndarray | None = None,
    start_epoch: int = 0,
) -> tf.data.Dataset:
    """Endless training batches, epoch after epoch; each of `len(shares) * local_batch` examples.

    Args:
        shares: the shares that this process feeds, side by side.
        local_batch: examples of each share in a batch.
        steps_per_epoch: batches an epoch; what is left over of an epoch's order is not seen in that epoch.
        seed: changes the order.
        sampling: how often an example of each class is drawn.
        class_weights: weight of each class, float [classes]; becomes the batch's sample weights.
        start_epoch: the first epoch's number.

    Returns:
        A data set of (inputs, labels) or (inputs, labels, sample weights). Images are float32, 0 to 255.
    """
    streams = [
        _resident_batches(share, local_batch, steps_per_epoch, seed, sampling, start_epoch)
        if share.inputs is not None
        else _streamed_batches(share, local_batch, steps_per_epoch, seed, sampling, start_epoch)
        for share in shares
    ]
    batches = streams[0]
    if len(streams) > 1:
        batches = tf.data.Dataset.zip(*streams).map(
            lambda *parts: tuple(tf.concat(part, axis=0) for part in zip(*parts, strict=True))
        )
    return _finish(batches.map(_as_input), class_weights)


def evaluation_batches(share: Share, batch: int) -> tf.data.Dataset:
    """All examples of a share, once, in order; the last batch may be smaller."""
    if share.inputs is not None:
        batches = tf.data.Dataset.from_tensor_slices((share.inputs, share.labels)).batch(batch)
    else:
        decoded = share.stream.map(lambda x, y: (share.prepare(x), y), num_parallel_calls=tf.data.AUTOTUNE)
        batches = decoded.batch(batch)
    return _finish(batches.map(_as_input), None)


def _resident_batches(
    share: Share, local_batch: int, steps: int, seed: int, sampling: balance.Sampling, start_epoch: int
) -> tf.data.Dataset:
    """Batches gathered by index from a share in memory: no work an example, only one a batch."""

    def orders() -> Iterator[np.ndarray]:
        for epoch in itertools.count(start_epoch):
            order = sampling.order(share.labels, _generator(seed, epoch, share))  # type: ignore[arg-type]
            yield order[: steps * local_batch].reshape(steps, local_batch)

    with tf.device("CPU:0"):  # the input pipeline's place: a GPU's memory is for the model
        inputs, labels = tf.constant(share.inputs), tf.constant(share.labels)
    indices = tf.data.Dataset.from_generator(
        orders, output_signature=tf.TensorSpec([steps, local_batch], tf.int64)
    ).unbatch()
    return indices.map(lambda places: (tf.gather(inputs, places), tf.gather(labels, places)))


def _streamed_batches(
    share: Share, local_batch: int, steps: int, seed: int, sampling: balance.Sampling, start_epoch: int
) -> tf.data.Dataset:
    """Batches of a share that is read again each epoch: shuffled while encoded, decoded after."""
    first = next(iter(share.stream.take(1)))[0]
    size = max(1, len(first.numpy()) if first.dtype == tf.string else first.numpy().nbytes)
    buffer = int(min(share.size, max(1000, _SHUFFLE_BYTES // size)))

    def epoch_batches(epoch: tf.Tensor) -> tf.data.Dataset:
        # As many seeds as there are (epoch, share) pairs, without a clash for any realistic number of shares.
        epoch_seed = seed * 1_000_003 + epoch * share.shares + share.share
        # tf.data mixes the program's seed into a shuffle's, and fails where that is 0 and the shuffle's a tensor. This
        # sets the seed of the function that is being traced, and of nothing else.
        tf.random.set_seed(1)
        examples = sampling.resample(share.stream, epoch_seed).shuffle(buffer, seed=epoch_seed)
        prepared = examples.map(
            lambda x, y: (share.prepare(x), y), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )
        batches = prepared.batch(local_batch, drop_remainder=True)
        return batches.take(steps) if sampling.mode == "none" else batches

    return tf.data.Dataset.range(start_epoch, tf.int64.max).flat_map(epoch_batches)


def _generator(seed: int, epoch: int, share: Share) -> np.random.Generator:
    return np.random.default_rng([seed, epoch, share.share, share.shares])


def _as_input(inputs: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return (tf.cast(inputs, tf.float32) if inputs.dtype == tf.uint8 else inputs), labels


def _finish(batches: tf.data.Dataset, class_weights: np.ndarray | None) -> tf.data.Dataset:
    if class_weights is not None:
        weights = tf.constant(class_weights, tf.float32)
        batches = batches.map(lambda x, y: (x, y, tf.gather(weights, y)))
    options = tf.data.Options()
    # Every rank has its own share already; MirroredStrategy must not divide it again.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    options.deterministic = True
    return batches.with_options(options).prefetch(tf.data.AUTOTUNE)

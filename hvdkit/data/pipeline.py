"""From examples to batches: each share read once, shuffled per epoch, batched, and prefetched.

A *share* is one of N even parts of a split. A rank feeds its own share; a process that trains N replicas by itself
(`mirrored`, or `single` told to imitate N ranks) feeds all of them side by side, so that step t of every strategy sees
the same examples: the global batch is always the concatenation of the shares' local batches.

The order of a share is a function of (seed, epoch, share, number of shares), for a share in memory and, by another
function, for one that is read again each epoch (see `hvdkit.data.epoch_order`); which of the two it is depends on its
size and `cache_bytes` alone. Batches can begin at any step of any epoch.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data import balance
from hvdkit.data.epoch_order import Stretch, generator, shuffled, stream_seed, untouched
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
        labels: all labels, int64 [size], or of windows of tokens int32 [size, sequence_length]; None likewise.
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

    def buffer(self) -> int | None:
        """Examples in the shuffle buffer of a share that is streamed; None for one in memory."""
        if self.inputs is not None:
            return None
        first = next(iter(self.stream.take(1)))[0]
        size = max(1, len(first.numpy()) if first.dtype == tf.string else first.numpy().nbytes)
        return int(min(self.size, max(1000, _SHUFFLE_BYTES // size)))


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
    prepare = _prepare(source, encode)
    largest = -(-source.size(split) // shares)
    specs = stream.map(lambda x, y: (prepare(x), y)).element_spec
    inputs = labels = None
    where = "read again each epoch"
    if largest * specs[0].shape.num_elements() * specs[0].dtype.size <= cache_bytes:
        began = time.monotonic()
        inputs, labels = _read_all(stream, prepare, specs, split, start, stop - start)
        where = f"{inputs.nbytes / 1e6:.0f} MB in memory, read in {time.monotonic() - began:.1f} s"
    _log.info("%s: share %d of %d, %d examples, %s", split, share, shares, stop - start, where)
    return Share(share, shares, start, stop - start, inputs, labels, stream, prepare)


def read_rest(
    source: Source, split: str, places: np.ndarray, share: int, shares: int, *, encode: Encode | None = None
) -> Share:
    """One of `shares` even parts of some examples of a split, to be streamed once.

    Args:
        source: where the examples come from.
        split: `train` or `test`.
        places: which examples, ascending.
        share: number of the part.
        shares: number of parts.
        encode: as in `read_share`.
    """
    mine = places[slice(*even_share(len(places), share, shares))]
    start, stop = (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)
    wanted = np.zeros(stop - start, bool)
    wanted[mine - start] = True
    stream = source.read(split, start, stop).enumerate().filter(lambda place, _: tf.gather(wanted, place))
    return Share(
        share, shares, start, len(mine), None, None, stream.map(lambda _, example: example), _prepare(source, encode)
    )


def _prepare(source: Source, encode: Encode | None) -> Encode:
    def prepare(encoded: Any) -> tf.Tensor:
        decoded = source.decode(encoded)
        return decoded if encode is None else encode(decoded)

    return prepare


def _read_all(
    stream: tf.data.Dataset, prepare: Encode, specs: tuple[tf.TensorSpec, ...], split: str, start: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = (np.empty([size, *spec.shape], spec.dtype.as_numpy_dtype) for spec in specs)
    done = 0
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


@dataclasses.dataclass(frozen=True)
class Start:
    """Where training batches begin.

    Attributes:
        epoch: number of the first epoch.
        step: the first step that is taken of its shares' order.
        rest: if other shares began that epoch, parts of what they left, which are used up in it; `step` is of these.
        rest_steps: steps, from the rest's first, to the epoch's end.
        handovers: how often the epoch has changed hands.
    """

    epoch: int = 0
    step: int = 0
    rest: Sequence[Share] = ()
    rest_steps: int = 0
    handovers: int = 0


def start_of(
    epoch: int,
    stretches: Sequence[Stretch],
    source: Source,
    shares: Sequence[Share],
    buffers: Sequence[int] | None,
    *,
    seed: int,
    global_batch: int,
    steps_per_epoch: int,
    encode: Encode | None = None,
) -> tuple[Start, list[Stretch]]:
    """Where batches go on in an epoch that was interrupted, perhaps with another number of shares.

    Args:
        epoch: the epoch's number.
        stretches: what was taken of it, in order.
        source: of the training examples.
        shares: those that this process feeds now.
        buffers: shuffle buffers of all shares that there are now, in order; None if they are in memory.
        seed: the run's.
        global_batch: examples a step, before and now.
        steps_per_epoch: likewise.
        encode: as in `read_share`.

    Returns:
        The start, and the stretches that came before its order began: those of other shares.
    """
    number = shares[0].shares
    before, step = list(stretches), 0
    if before and before[-1].shares == number and (len(before) > 1 or before[-1].goes_on(number, buffers)):
        step = before.pop().steps  # the order that was left is gone on with
    if not before:
        return Start(epoch, step), []
    places = untouched(source.size("train"), seed, epoch, global_batch, before)
    rest = [read_rest(source, "train", places, share.share, number, encode=encode) for share in shares]
    steps = steps_per_epoch - sum(stretch.steps for stretch in before)
    return Start(epoch, step, rest, steps, len(before)), before


def training_batches(
    shares: Sequence[Share],
    *,
    local_batch: int,
    steps_per_epoch: int,
    seed: int,
    sampling: balance.Sampling,
    class_weights: np.ndarray | None = None,
    start: Start | None = None,
) -> tf.data.Dataset:
    """Endless training batches, epoch after epoch; each of `len(shares) * local_batch` examples.

    Args:
        shares: the shares that this process feeds, side by side.
        local_batch: examples of each share in a batch.
        steps_per_epoch: batches an epoch; what is left over of an epoch's order is not seen in that epoch.
        seed: changes the order.
        sampling: how often an example of each class is drawn.
        class_weights: weight of each class, float [classes]; becomes the batch's sample weights.
        start: where to begin; by default at the first step of the first epoch.

    Returns:
        A data set of (inputs, labels) or (inputs, labels, sample weights). Images are float32, 0 to 255.
    """
    start = start or Start()
    whole = Start(start.epoch + 1) if start.rest else start
    batches = _side_by_side(
        _resident_batches(share, local_batch, steps_per_epoch, seed, sampling, whole)
        if share.inputs is not None
        else _streamed_batches(share, local_batch, steps_per_epoch, seed, sampling, whole)
        for share in shares
    )
    if start.rest:
        rests = (_rest_batches(share, local_batch, seed, start) for share in start.rest)
        batches = _side_by_side(rests).concatenate(batches)
    return _finish(batches.map(_as_input), class_weights)


def _side_by_side(streams: Iterable[tf.data.Dataset]) -> tf.data.Dataset:
    """Each share's batch, one behind the other."""
    streams = list(streams)
    if len(streams) == 1:
        return streams[0]
    return tf.data.Dataset.zip(*streams).map(
        lambda *parts: tuple(tf.concat(part, axis=0) for part in zip(*parts, strict=True))
    )


def evaluation_batches(share: Share, batch: int) -> tf.data.Dataset:
    """All examples of a share, once, in order; the last batch may be smaller."""
    if share.inputs is not None:
        batches = tf.data.Dataset.from_tensor_slices((share.inputs, share.labels)).batch(batch)
    else:
        decoded = share.stream.map(lambda x, y: (share.prepare(x), y), num_parallel_calls=tf.data.AUTOTUNE)
        batches = decoded.batch(batch)
    return _finish(batches.map(_as_input), None)


def _resident_batches(
    share: Share, local_batch: int, steps: int, seed: int, sampling: balance.Sampling, start: Start
) -> tf.data.Dataset:
    """Batches gathered by index from a share in memory: no work an example, only one a batch."""

    def orders() -> Iterator[np.ndarray]:
        for epoch in itertools.count(start.epoch):
            order = sampling.order(share.labels, generator(seed, epoch, share.share, share.shares))  # type: ignore[arg-type]
            batches = order[: steps * local_batch].reshape(steps, local_batch)
            yield batches[start.step :] if epoch == start.epoch else batches

    with tf.device("CPU:0"):  # the input pipeline's place: a GPU's memory is for the model
        inputs, labels = tf.constant(share.inputs), tf.constant(share.labels)
    indices = tf.data.Dataset.from_generator(
        orders, output_signature=tf.TensorSpec([None, local_batch], tf.int64)
    ).unbatch()
    return indices.map(lambda places: (tf.gather(inputs, places), tf.gather(labels, places)))


def _streamed_batches(
    share: Share, local_batch: int, steps: int, seed: int, sampling: balance.Sampling, start: Start
) -> tf.data.Dataset:
    """Batches of a share that is read again each epoch: shuffled while encoded, decoded after."""
    buffer = share.buffer() or 1
    counted = sampling.mode == "none"  # otherwise an epoch has as many batches as were drawn, not `steps`

    def epoch_batches(epoch: tf.Tensor) -> tf.data.Dataset:
        epoch_seed = stream_seed(seed, epoch, share.share, share.shares)
        examples = shuffled(sampling.resample(share.stream, epoch_seed), buffer, epoch_seed)
        if not counted:
            return _decoded(examples, share, local_batch)
        first = tf.where(epoch == start.epoch, tf.constant(start.step, tf.int64), tf.constant(0, tf.int64))
        return _decoded(examples.skip(first * local_batch), share, local_batch).take(steps - first)

    first_epoch = start.epoch if counted else 0
    batches = tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch_batches)
    return batches if counted else batches.skip(start.epoch * steps + start.step)


def _rest_batches(share: Share, local_batch: int, seed: int, start: Start) -> tf.data.Dataset:
    """Batches of what others have left of an epoch."""
    buffer = share.buffer() or 1

    def batches(rest_seed: tf.Tensor) -> tf.data.Dataset:
        examples = shuffled(share.stream, buffer, rest_seed).skip(start.step * local_batch)
        return _decoded(examples, share, local_batch).take(start.rest_steps - start.step)

    rest_seed = stream_seed(seed, start.epoch, share.share, share.shares, start.handovers)
    return tf.data.Dataset.from_tensors(tf.constant(rest_seed, tf.int64)).flat_map(batches)


def _decoded(examples: tf.data.Dataset, share: Share, local_batch: int) -> tf.data.Dataset:
    prepared = examples.map(lambda x, y: (share.prepare(x), y), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return prepared.batch(local_batch, drop_remainder=True)


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

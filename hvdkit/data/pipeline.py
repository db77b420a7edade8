"""From examples to batches: read each shard, shuffle it in every epoch, batch it, and prefetch.

A shard (class `Share`) is one of N even parts of a split. A rank feeds its own shard. A process that trains N replicas
by itself (`mirrored`, or `single` when it emulates N ranks) feeds all shards side by side. So step t sees the same
examples under every strategy: the global batch is always the concatenation of the shards' local batches.

A shard stays in memory if it fits into `cache_bytes`; otherwise it is streamed, that is, read again in each epoch. Its
order is a function of (seed, epoch, share, number of shares) in both cases, but not the same function (see
`hvdkit.data.epoch_order`). Batches can begin at any step of any epoch.
"""

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data import balance
from hvdkit.data.augmentation import Augmentation
from hvdkit.data.epoch_order import Stretch, generator, order_of_parts, shuffled, stream_seed, untouched
from hvdkit.data.shard import even_share
from hvdkit.data.sources import Parted, Source, edges_of, images
from hvdkit.data.sources.structure import batched
from hvdkit.errors import UnreadableExampleError, UsageError

_log = logging.getLogger(__name__)

Encode = Callable[[Any], tf.Tensor]

_READ_AT_ONCE = 1024  # examples
_IN_INPUT = "IteratorGetNext"  # the operation that an error of the input pipeline names
_MOST_NAMED = 20  # examples that cannot be read
STRUCTURES = ("arrays", "stream")  # kinds of sources whose labels are what `fit` takes beside the inputs
_SHUFFLE_BYTES = 256 << 20  # size of a streamed shard's shuffle buffer, in bytes of encoded examples


@dataclasses.dataclass(frozen=True)
class Share:
    """A shard: one of `shares` even parts of a split.

    Attributes:
        source: where the examples come from.
        split: `train` or `test`.
        share: its index.
        shares: number of shards.
        start: index of its first example in the split.
        size: number of its examples.
        stream: the examples as (encoded input, label), in a fixed order.
        prepare: graph function from an encoded input to the model's input.
        inputs: all decoded inputs, [size, ...], in the source's structure; None for a streamed shard.
        labels: all labels, int64 [size], or int32 [size, sequence_length] for token windows, or in the source's
            structure; None for a streamed shard.
        numbered: the examples as ((index in the split, encoded input), label), if they are not consecutive.
    """

    source: Source
    split: str
    share: int
    shares: int
    start: int
    size: int
    stream: tf.data.Dataset
    prepare: Encode
    inputs: Any = None
    labels: Any = None
    numbered: tf.data.Dataset | None = None

    def with_numbers(self) -> tf.data.Dataset:
        """Returns the examples as ((index in the split, encoded input), label)."""
        return self.numbered or self.stream.enumerate(self.start).map(_number)

    def in_epoch(self, seed: tf.Tensor, *, with_numbers: bool = False) -> tf.data.Dataset:
        """Returns the examples in the order in which an epoch reads them: its parts, if there are any, at random.

        Args:
            seed: the epoch's `stream_seed`, int64.
            with_numbers: whether to return them as `with_numbers` does.
        """
        edges = edges_of(self.source, self.split)
        if edges is None or not isinstance(self.source, Parted):
            return self.with_numbers() if with_numbers else self.stream
        source, stop = self.source, self.start + self.size
        first = np.searchsorted(edges, self.start, side="right") - 1
        last = np.searchsorted(edges, stop, side="left")
        begins, ends = edges[first:last], edges[first + 1 : last + 1]
        skipped = np.maximum(self.start - begins, 0)
        taken = np.minimum(stop, ends) - np.maximum(self.start, begins)

        def examples_of(part: tf.Tensor) -> tf.data.Dataset:
            examples = source.read_part(self.split, tf.cast(part, tf.int64) + first)
            if with_numbers:
                examples = examples.enumerate(tf.gather(begins, part)).map(_number)
            return examples.skip(tf.gather(skipped, part)).take(tf.gather(taken, part))

        return tf.data.Dataset.from_tensor_slices(order_of_parts(len(begins), seed)).flat_map(examples_of)

    def buffer(self) -> int | None:
        """Returns the size of a streamed shard's shuffle buffer in examples; None for a shard in memory."""
        if self.inputs is not None:
            return None
        first = tf.nest.flatten(next(iter(self.stream.take(1)))[0], expand_composites=True)
        size = max(1, sum(map(_size_of, first)))
        return int(min(self.size, max(1000, _SHUFFLE_BYTES // size)))


def _number(number: tf.Tensor, example: Any) -> Any:
    encoded, label = example
    return (number, encoded), label


def _size_of(leaf: tf.Tensor) -> int:
    """Returns the size of an encoded input in bytes."""
    value = leaf.numpy()
    return len(value) if isinstance(value, bytes) else value.nbytes


def read_share(
    source: Source, split: str, share: int, shares: int, *, encode: Encode | None = None, cache_bytes: float
) -> Share:
    """Reads a shard of a split and keeps it in memory, decoded, if it fits.

    Arrays of any structure stay in memory, where they are already. Streams of any structure are read again in each
    epoch, because they may augment examples.

    Args:
        source: where the examples come from.
        split: `train` or `test`.
        share: index of the shard.
        shares: number of shards.
        encode: graph function to apply after decoding (texts to token numbers).
        cache_bytes: memory limit of a decoded shard. Pass the same value on all ranks: it also decides how shards are
            shuffled.

    Raises:
        UsageError: an example cannot be decoded, or has a different shape.
    """
    start, stop = even_share(source.size(split), share, shares)
    stream = source.read(split, start, stop)
    prepare = _prepare(source, encode)
    found = Share(source, split, share, shares, start, stop - start, stream, prepare)
    largest = -(-source.size(split) // shares)
    specs = stream.map(lambda x, y: (prepare(x), y)).element_spec
    where = "read again each epoch"
    if source.kind == "arrays":
        inputs, labels = batched(stream, found.size).get_single_element()
        found = dataclasses.replace(found, inputs=inputs, labels=labels)
        where = "in memory"
    elif source.kind != "stream" and largest * specs[0].shape.num_elements() * specs[0].dtype.size <= cache_bytes:
        began = time.monotonic()
        inputs, labels = _read_all(found, specs)
        found = dataclasses.replace(found, inputs=inputs, labels=labels)
        where = f"{inputs.nbytes / 1e6:.0f} MB in memory, read in {time.monotonic() - began:.1f} s"
    _log.info("%s: share %d of %d, %d examples, %s", split, share, shares, found.size, where)
    return found


def read_rest(
    source: Source, split: str, places: np.ndarray, share: int, shares: int, *, encode: Encode | None = None
) -> Share:
    """Returns one of `shares` even parts of the given examples of a split, to be streamed once.

    Args:
        source: where the examples come from.
        split: `train` or `test`.
        places: indices of the examples, ascending.
        share: index of the part.
        shares: number of parts.
        encode: as in `read_share`.
    """
    mine = places[slice(*even_share(len(places), share, shares))]
    start, stop = (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)
    wanted = np.zeros(stop - start, bool)
    wanted[mine - start] = True
    stream = source.read(split, start, stop).enumerate().filter(lambda place, _: tf.gather(wanted, place))
    examples = stream.map(lambda _, example: example)
    numbered = stream.map(lambda place, example: _number(start + place, example))
    return Share(source, split, share, shares, start, len(mine), examples, _prepare(source, encode), numbered=numbered)


def _prepare(source: Source, encode: Encode | None) -> Encode:
    def prepare(encoded: Any) -> tf.Tensor:
        decoded = source.decode(encoded)
        return decoded if encode is None else encode(decoded)

    return prepare


def _read_all(share: Share, specs: tuple[tf.TensorSpec, ...]) -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = (np.empty([share.size, *spec.shape], spec.dtype.as_numpy_dtype) for spec in specs)
    done = 0
    prepared = share.stream.map(
        lambda x, y: (share.prepare(x), y), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    try:
        for x, y in prepared.batch(_READ_AT_ONCE).as_numpy_iterator():
            inputs[done : done + len(y)], labels[done : done + len(y)] = x, y
            done += len(y)
    except tf.errors.OpError as error:
        raise unreadable(share, error, share.size) from error
    return inputs, labels


def unreadable(share: Share, error: tf.errors.OpError, examples: int) -> UsageError:
    """Returns the error for examples that cannot be read, or whose shape differs from the others.

    Args:
        share: the shard.
        error: what was raised when they were read together.
        examples: number of examples, from the first one of the shard, to read one by one, to name each that is wrong.
    """
    wrong = _wrong_ones(share, examples)
    if not wrong:  # as when it is another one each time
        wrong = [f"one of the examples {share.start} to {share.start + examples - 1} ({images.first_line(error)})"]
    return UsageError(_sentence(share, wrong))


@contextlib.contextmanager
def naming_unreadable(shares: Iterable[Share]) -> Iterator[None]:
    """Names the example, if the block ends because one of a streamed shard cannot be read.

    Args:
        shares: the shards that this process reads in the block.

    Raises:
        UnreadableExampleError: it was found, by reading the shards once more, one example after the other.
    """
    try:
        yield
    except tf.errors.OpError as error:
        streamed = [share for share in shares if share.inputs is None] if _IN_INPUT in str(error) else []
        for share in streamed:
            if wrong := _wrong_ones(share, share.size):
                raise UnreadableExampleError(_sentence(share, wrong)) from error
        raise


def _wrong_ones(share: Share, examples: int) -> list[str]:
    """Returns the first examples of a shard that cannot be read, each with the reason."""
    wrong = []
    index = share.start
    try:
        for encoded, _ in share.stream.take(examples):
            if reason := _reason_of(share, encoded):
                wrong.append(f"{share.source.locate(share.split, index)} ({reason})")
            index += 1
    except tf.errors.OpError as reason:  # the next one cannot be read at all, and none after it
        wrong.append(f"{share.source.locate(share.split, index)} ({images.first_line(reason)})")
    return wrong


def _sentence(share: Share, wrong: list[str]) -> str:
    more = f"; and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
    return (
        f"{share.source.name}: {len(wrong)} example(s) of split {share.split!r} cannot be read: "
        f"{'; '.join(wrong[:_MOST_NAMED])}{more}. Repair or remove them; images of differing size need --image-size."
    )


def _reason_of(share: Share, encoded: tf.Tensor) -> str:
    """Returns why an example cannot be prepared; empty if it can."""
    try:
        share.prepare(encoded)
    except (tf.errors.OpError, ValueError) as reason:
        return images.first_line(reason)
    return ""


@dataclasses.dataclass(frozen=True)
class Start:
    """Where training batches begin.

    Attributes:
        epoch: number of the first epoch.
        step: the first step to take, counted in the order of the shards, or of `rest` if there is one.
        rest: shards of the examples that an epoch has not seen yet, if it began with other shards; used in this epoch
            only.
        rest_steps: steps from the first one of the rest to the end of the epoch.
        handovers: how often the number of ranks has changed in this epoch.
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
    """Returns where batches resume in an interrupted epoch, perhaps with a different number of shards.

    Args:
        epoch: number of the epoch.
        stretches: the steps taken in it so far, in order.
        source: source of the training examples.
        shares: the shards that this process feeds now.
        buffers: shuffle buffer sizes of all current shards, in order; None if the shards are in memory.
        seed: the run's seed.
        global_batch: examples per step, before and now.
        steps_per_epoch: steps per epoch, before and now.
        encode: as in `read_share`.

    Returns:
        The start, and the stretches that other shards took before the current order began.
    """
    number = shares[0].shares
    before, step = list(stretches), 0
    if before and before[-1].shares == number and (len(before) > 1 or before[-1].goes_on(number, buffers)):
        step = before.pop().steps  # continue in the same order
    if not before:
        return Start(epoch, step), []
    places = untouched(source.size("train"), seed, epoch, global_batch, before, edges_of(source, "train"))
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
    augmentation: Augmentation | None = None,
    one_hot: int = 0,
) -> tf.data.Dataset:
    """Returns an infinite data set of training batches, each of `len(shares) * local_batch` examples.

    Args:
        shares: the shards that this process feeds, side by side.
        local_batch: examples of each shard in a batch.
        steps_per_epoch: batches per epoch. An epoch does not see the examples after these.
        seed: changes the order.
        sampling: how often an example of each class is drawn.
        class_weights: weight of each class, float [classes]; becomes the batch's sample weights.
        start: where to begin; by default at the first step of the first epoch.
        augmentation: changes the images.
        one_hot: number of classes, if labels are to become their probabilities, float32 [examples, classes].

    Returns:
        A data set of (inputs, labels) or (inputs, labels, sample weights). Images are float32, 0 to 255.
    """
    start = start or Start()
    whole = Start(start.epoch + 1) if start.rest else start
    form = _Form(local_batch, augmentation, one_hot)
    batches = _side_by_side(
        _resident_batches(share, form, steps_per_epoch, seed, sampling, whole)
        if share.inputs is not None
        else _streamed_batches(share, form, steps_per_epoch, seed, sampling, whole)
        for share in shares
    )
    if start.rest:
        rests = (_rest_batches(share, form, seed, start) for share in start.rest)
        batches = _side_by_side(rests).concatenate(batches)
    return _finish(batches.map(_form_of(shares[0])), class_weights)


def _side_by_side(streams: Iterable[tf.data.Dataset]) -> tf.data.Dataset:
    """Concatenates the batches of all shards."""
    streams = list(streams)
    if len(streams) == 1:
        return streams[0]
    return tf.data.Dataset.zip(*streams).map(
        lambda *parts: tf.nest.map_structure(lambda *leaves: tf.concat(leaves, axis=0), *parts)
    )


def evaluation_batches(share: Share, batch: int, one_hot: int = 0) -> tf.data.Dataset:
    """Returns all examples of a shard once, in order; the last batch may be smaller. `one_hot` as in training."""
    if share.inputs is not None:
        batches = tf.data.Dataset.from_tensor_slices((share.inputs, share.labels)).batch(batch)
    else:
        decoded = share.stream.map(lambda x, y: (share.prepare(x), y), num_parallel_calls=tf.data.AUTOTUNE)
        batches = batched(decoded, batch)
    if one_hot:
        batches = batches.map(lambda x, y: (x, tf.one_hot(y, one_hot)))
    return _finish(batches.map(_form_of(share)), None)


def first_batch(share: Share, examples: int = 2) -> tuple:
    """Returns the first examples of a shard as a batch, as `fit` takes it."""
    pairs = batched(share.stream.map(lambda x, y: (share.prepare(x), y)), min(examples, share.size))
    return next(iter(pairs.map(_form_of(share))))


@dataclasses.dataclass(frozen=True)
class _Form:
    """What becomes of a shard's examples.

    Attributes:
        size: examples in a local batch.
        augmentation: changes the images; None if nothing does.
        one_hot: number of classes, if labels become their probabilities; otherwise 0.
    """

    size: int
    augmentation: Augmentation | None = None
    one_hot: int = 0

    def batches(self, examples: tf.data.Dataset, prepare: Encode, epoch: Any) -> tf.data.Dataset:
        """Decodes a stream of examples, which have numbers if they are to be augmented, and forms batches."""
        augmentation = self.augmentation

        def changed(numbered: Any, label: tf.Tensor) -> tuple[tf.Tensor, ...]:
            number, encoded = numbered
            key = augmentation.key(epoch, number)  # type: ignore[union-attr]
            return augmentation.image(prepare(encoded), key), self.label(label), key  # type: ignore[union-attr]

        def unchanged(encoded: Any, label: tf.Tensor) -> tuple[Any, tf.Tensor]:
            return prepare(encoded), self.label(label)

        form = changed if augmentation else unchanged
        prepared = examples.map(form, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        batches = batched(prepared, self.size, drop_remainder=True)
        return batches.map(augmentation.mix) if augmentation else batches

    def label(self, label: tf.Tensor) -> tf.Tensor:
        """Returns the label, or labels, as the model takes them."""
        return tf.one_hot(label, self.one_hot) if self.one_hot else label


def _resident_batches(
    share: Share, form: _Form, steps: int, seed: int, sampling: balance.Sampling, start: Start
) -> tf.data.Dataset:
    """Gathers batches by index from a shard in memory: one operation per batch, none per example."""
    local_batch = form.size

    def orders() -> Iterator[np.ndarray]:
        for epoch in itertools.count(start.epoch):
            draw = generator(seed, epoch, share.share, share.shares)
            order = draw.permutation(share.size) if sampling.mode == "none" else sampling.order(share.labels, draw)
            batches = order[: steps * local_batch].reshape(steps, local_batch)
            yield batches[start.step :] if epoch == start.epoch else batches

    with tf.device("CPU:0"):  # the input pipeline runs here, and GPU memory is for the model
        examples = tf.nest.map_structure(_held, (share.inputs, share.labels))
    if form.augmentation:
        return _augmented_batches(share, form, orders, examples, start.epoch)
    indices = tf.data.Dataset.from_generator(
        orders, output_signature=tf.TensorSpec([None, local_batch], tf.int64)
    ).unbatch()
    batches = indices.map(lambda places: tf.nest.map_structure(lambda leaf: tf.gather(leaf, places), examples))
    return batches.map(lambda inputs, labels: (inputs, form.label(labels))) if form.one_hot else batches


def _augmented_batches(
    share: Share, form: _Form, orders: Callable[[], Iterator[np.ndarray]], examples: tuple[Any, Any], first_epoch: int
) -> tf.data.Dataset:
    """Takes examples one by one from a shard in memory, and augments them.

    Args:
        share: the shard.
        form: what becomes of the examples.
        orders: gives the batches of each epoch, from the first one on, as indices [steps, examples].
        examples: all inputs and labels.
        first_epoch: number of the first epoch.
    """

    def numbered() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for epoch, places in enumerate(map(np.ravel, orders()), first_epoch):
            yield epoch, places, share.start + places + _copies(places) * share.source.size(share.split)

    def epoch_batches(epoch: tf.Tensor, places: tf.Tensor, numbers: tf.Tensor) -> tf.data.Dataset:
        def example(place: tf.Tensor, number: tf.Tensor) -> tuple[tuple[tf.Tensor, tf.Tensor], tf.Tensor]:
            inputs, label = (tf.gather(part, place) for part in examples)
            return (number, inputs), label

        return form.batches(tf.data.Dataset.from_tensor_slices((places, numbers)).map(example), lambda x: x, epoch)

    specs = (tf.TensorSpec([], tf.int64), tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.int64))
    return tf.data.Dataset.from_generator(numbered, output_signature=specs).flat_map(epoch_batches)


def _copies(places: np.ndarray) -> np.ndarray:
    """Returns for each place how often it was there before, int64."""
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    firsts = np.searchsorted(ordered, ordered)
    copies = np.empty(len(places), np.int64)
    copies[order] = np.arange(len(places)) - firsts
    return copies


def _held(leaf: Any) -> Any:
    return tf.constant(leaf) if isinstance(leaf, np.ndarray) else leaf


def _streamed_batches(
    share: Share, form: _Form, steps: int, seed: int, sampling: balance.Sampling, start: Start
) -> tf.data.Dataset:
    """Returns batches of a shard that is read again in each epoch. Shuffles encoded examples, then decodes them."""
    is_numbered = form.augmentation is not None
    copies = share.source.size(share.split) if is_numbered else 0
    buffer = share.buffer() or 1
    counted = sampling.mode == "none"  # otherwise the draw decides how many batches an epoch has, not `steps`

    def epoch_batches(epoch: tf.Tensor) -> tf.data.Dataset:
        epoch_seed = stream_seed(seed, epoch, share.share, share.shares)
        in_order = share.in_epoch(epoch_seed, with_numbers=is_numbered)
        examples = shuffled(sampling.resample(in_order, epoch_seed, copies), buffer, epoch_seed)
        if not counted:
            return form.batches(examples, share.prepare, epoch)
        first = tf.where(epoch == start.epoch, tf.constant(start.step, tf.int64), tf.constant(0, tf.int64))
        return form.batches(examples.skip(first * form.size), share.prepare, epoch).take(steps - first)

    first_epoch = start.epoch if counted else 0
    batches = tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch_batches)
    return batches if counted else batches.skip(start.epoch * steps + start.step)


def _rest_batches(share: Share, form: _Form, seed: int, start: Start) -> tf.data.Dataset:
    """Returns batches of the examples that an epoch has not seen before the number of ranks changed."""
    buffer = share.buffer() or 1

    def batches(rest_seed: tf.Tensor) -> tf.data.Dataset:
        stream = share.with_numbers() if form.augmentation else share.stream
        examples = shuffled(stream, buffer, rest_seed).skip(start.step * form.size)
        return form.batches(examples, share.prepare, start.epoch).take(start.rest_steps - start.step)

    rest_seed = stream_seed(seed, start.epoch, share.share, share.shares, start.handovers)
    return tf.data.Dataset.from_tensors(tf.constant(rest_seed, tf.int64)).flat_map(batches)


def _form_of(share: Share) -> Callable[[Any, Any], tuple]:
    """Returns the function from a batch of pairs to what `fit` takes."""
    return (lambda inputs, label: (inputs, *label)) if share.source.kind in STRUCTURES else _as_input


def _as_input(inputs: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return (tf.cast(inputs, tf.float32) if inputs.dtype == tf.uint8 else inputs), labels


def _finish(batches: tf.data.Dataset, class_weights: np.ndarray | None) -> tf.data.Dataset:
    if class_weights is not None:
        weights = tf.constant(class_weights, tf.float32)
        batches = batches.map(lambda x, y: (x, y, _weights_of(y, weights)))
    options = tf.data.Options()
    # Every rank has its own shard already: MirroredStrategy must not shard it again.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    options.deterministic = True
    return batches.with_options(options).prefetch(tf.data.AUTOTUNE)


def _weights_of(labels: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Returns the weight of each example's class, or that of the classes that it is mixed of."""
    return tf.linalg.matvec(labels, weights) if labels.dtype.is_floating else tf.gather(weights, labels)

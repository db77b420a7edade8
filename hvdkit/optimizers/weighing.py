"""Weighs the ranks' losses by what each rank counts, so that N ranks train the model of one process.

One process that sees the global batch divides the sum of all losses by what it counts: elements, unmasked elements, or
the sum of the sample weights. A rank r divides its own sum S_r by its own count D_r, and averaging the ranks' gradients
gives the mean of these means. It is another number where counts differ: with masks, with labels to ignore, with batches
of different sizes. So each rank's loss is multiplied, before the backward pass, by

    w_r = N D_r / Σ D        for then        1/N Σ w_r S_r / D_r = Σ S_r / Σ D

A loss that is summed, not averaged, is multiplied by N. Where the count depends on the data (a mask, or weights that
divide), the ranks sum it in a small allreduce. Where it is the number of elements, `batch_sizes` knows whether they
have to; if not, w_r is exactly 1. What comes after the loss (loss scale, accumulation, compression, allreduce) stays
as it is, and so do losses that layers add.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.compat.losses import Elements
from hvdkit.errors import UsageError
from hvdkit.optimizers import batch_sizes, heartbeat

_log = logging.getLogger(__name__)


class _State(threading.local):
    """What is being computed in this thread."""

    def __init__(self) -> None:
        self.scope: Scope | None = None
        self.calls: list[tuple[Any, Any]] = []  # losses that are being called, with their predictions
        self.unweighed = ""  # of a loss called outside of a scope since the last `warn_of_unweighed`: what is wrong
        self.weighed = False  # whether a loss was weighed since then
        self.has_sharded = False  # whether a `ShardedLoss` was ever called


_state = _State()
_warned: set[str] = set()


class Scope:
    """Says what happens to the losses that are computed while it is entered. This one leaves them as they are."""

    def __enter__(self) -> "Scope":
        self._outer, _state.scope = _state.scope, self
        return self

    def __exit__(self, *error: object) -> None:
        _state.scope = self._outer

    def weigh(self, elements: Elements, value: tf.Tensor) -> tf.Tensor:
        """Returns the loss to use in place of `value`, to which Keras has reduced `elements`."""
        return value


class Weighing(Scope):
    """Weighs losses by what the ranks of a process set count.

    Args:
        name: prefix of the names of the collectives.
        process_set: the ranks whose batches are parts of one global batch.
        averages: whether their gradients are averaged, not summed.
        shows_share: whether the value is multiplied by w_r like the gradient, so that its mean over ranks is the loss
            of one process. If not, its mean is so if each rank counts by its examples, as Keras averages losses.
    """

    def __init__(self, name: str, process_set: Any, averages: bool = True, shows_share: bool = False) -> None:
        self.name, self.process_set = name, process_set
        self.parts = process_set.size()  # of a global batch
        self._averages, self._shows_share = averages, shows_share

    def weigh(self, elements: Elements, value: tf.Tensor) -> tf.Tensor:
        """Multiplies the value and its gradient."""
        _state.weighed = True
        if is_sum(elements):
            factor = float(self.parts) if self._averages else 1.0
            is_shown_as_mean = value.shape.rank != 0  # Keras trains with the sum of what is not reduced
            return _multiplied(value, 1.0 if is_shown_as_mean else self.shown_of_sum(), factor)
        if elements.is_reduced and (elements.mask is not None or elements.weights is not None):
            _warn(
                f"The loss {_name()} returns one number, so hvdkit cannot see what it counts: it is taken for the mean "
                f"over the examples, also where masks or sample weights apply. Return a value for each element."
            )
        if not depends_on_data(elements):
            factor = self.factor_by_size()
            return _multiplied(value, factor if self._shows_share else 1.0, factor)
        with self.after(value):
            mine = tf.identity(counts(elements))
        total = self.total_count(mine, elements)
        factor = tf.math.divide_no_nan(self.parts * mine[0], total[0])
        shown = factor if self._shows_share else factor * tf.math.divide_no_nan(total[1], self.parts * mine[1])
        return _multiplied(value, shown, factor)

    def after(self, value: tf.Tensor) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which operations wait for the loss and the last step: collectives keep an order."""
        return tf.control_dependencies([value, heartbeat.current().received()])

    def shown_of_sum(self) -> Any:
        """Returns the factor with which a sum is shown: its mean over ranks, by examples, is then the whole sum."""
        return (
            float(self.parts) if self._shows_share else tf.math.divide_no_nan(1.0 * self.parts, self.factor_by_size())
        )

    def factor_by_size(self) -> Any:
        """Returns the factor of a loss that counts all elements, so that the sizes of the batches decide."""
        return batch_sizes.current().factor(examples_of_call(), self.process_set.size(), self.sum)

    def total_count(self, mine: tf.Tensor, elements: Elements) -> tf.Tensor:
        """Returns the sum over ranks of what they count: denominator and examples, [2]."""
        return self.sum(mine)

    def sum(self, counts: tf.Tensor) -> tf.Tensor:
        """Returns the sum over ranks."""
        op = world.horovod().Sum
        return collectives.reduce_dense([counts], f"{self.name}.loss", op=op, process_set=self.process_set)[0]


class Counting(Scope):
    """Collects what losses count, of micro-batches whose predictions are not known yet."""

    def __init__(self) -> None:
        self.found: list[Elements] = []
        self.counts: list[tf.Tensor] = []  # denominator and examples, [2] each
        self.examples: list[tf.Tensor] = []

    def weigh(self, elements: Elements, value: tf.Tensor) -> tf.Tensor:
        """Notes what is counted.

        Raises:
            UsageError: the loss makes a mask of predictions.
        """
        loss, _ = _state.calls[0]
        if elements.mask is not None and getattr(loss, "ignore_class", None) is None:
            raise UsageError(
                f"The loss {_name()} counts the elements that its own mask selects, and a pipeline must know their "
                f"number before it has predictions. Use a loss without a mask, or give sample weights."
            )
        self.found.append(elements)
        self.counts.append(counts(elements))
        self.examples.append(examples_of_call())
        return value


class MicroBatchWeighing(Weighing):
    """Weighs the losses of micro-batches of equal size, of which each rank of a process set has several.

    Args:
        name: as for `Weighing`.
        process_set: as for `Weighing`; their gradients are averaged.
        counting: what they count. Each must call one loss.
    """

    def __init__(self, name: str, process_set: Any, counting: Counting) -> None:
        super().__init__(name, process_set)
        ranks, self._is_masked = process_set.size(), counting.found[0].mask is not None
        self.parts = ranks * len(counting.counts)
        with tf.control_dependencies([heartbeat.current().received()]):
            counts, examples = tf.add_n(counting.counts), tf.add_n(counting.examples)
        self._factor: Any = 1.0
        self._total = counts
        if ranks > 1 and depends_on_data(counting.found[0]):
            self._total = self.sum(counts)
        elif ranks > 1 and not is_sum(counting.found[0]):
            self._factor = batch_sizes.current().factor(examples, ranks, self.sum, notes=False)

    def factor_by_size(self) -> Any:
        """Returns the same factor for all micro-batches."""
        return self._factor

    def total_count(self, mine: tf.Tensor, elements: Elements) -> tf.Tensor:
        """Returns the sum over all micro-batches of all ranks.

        Raises:
            UsageError: a mask reaches the loss, which was not known before the first micro-batch.
        """
        if self._is_masked != (elements.mask is not None):
            raise UsageError(
                f"A mask of the model reaches the loss {_name()}, and a pipeline must know how many elements count "
                f"before it has predictions. Give the mask as sample weights, with the loss's "
                f"reduction='mean_with_sample_weight'."
            )
        return self._total


class Unweighable(Scope):
    """Warns of losses that need weights in training that cannot use them.

    Args:
        why: a sentence that says why the ranks' losses cannot be weighed.
    """

    def __init__(self, why: str) -> None:
        self._why = why

    def weigh(self, elements: Elements, value: tf.Tensor) -> tf.Tensor:
        """Warns if the loss needs weights, and returns the value."""
        if _needs_weights(elements):
            _warn(f"The loss {_name()} {_what_it_does(elements)}. {self._why}")
        return value


class ShardedLoss:
    """A loss for a training loop of your own, weighed so that N ranks train as one process does; see `shard_loss`."""

    def __init__(self, loss: keras.losses.Loss, process_set: Any = None) -> None:
        if not isinstance(loss, keras.losses.Loss):
            raise UsageError(
                f"hvd.shard_loss needs a keras.losses.Loss, which returns a value for each element, but was given "
                f"{loss!r}. Write keras.losses.MeanSquaredError(), or a subclass of keras.losses.Loss."
            )
        if loss.reduction in ("none", None):
            raise UsageError(
                f"hvd.shard_loss weighs what a loss divides by, but {loss.name!r} has no reduction. Give it "
                f"reduction='sum_over_batch_size' and leave out the mean of your own."
            )
        self.loss, self.name, self._process_set = loss, loss.name, process_set

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        """Returns this rank's loss, scalar; the arguments are those of `keras.losses.Loss`.

        Raises:
            UsageError: `Model.compile` was given this loss, or it returns one number instead of a value per element.
        """
        if world.size() == 1:
            return self.loss(y_true, y_pred, sample_weight)
        if _state.scope is not None:
            raise UsageError(
                f"compile was given hvd.shard_loss({self.name}), but fit weighs losses by itself: give it the loss "
                f"without hvd.shard_loss."
            )
        process_set = self._process_set or world.horovod().global_process_set
        if not collectives.takes_part(process_set):
            return self.loss(y_true, y_pred, sample_weight)
        _state.has_sharded = True
        with Weighing("hvdkit.shard_loss", process_set, shows_share=True):
            return self.loss(y_true, y_pred, sample_weight)


def shard_loss(loss: keras.losses.Loss, process_set: Any = None) -> ShardedLoss:
    """Returns a loss whose gradients, averaged over the ranks, are those of one process with the global batch.

    For training loops of your own, with `DistributedGradientTape` or `DistributedOptimizer`, where masks, labels to
    ignore, sample weights or batches of different sizes make the ranks count different amounts, or where the loss's
    reduction is `"sum"`. `Model.fit` needs no such call. Each call of the loss is a collective: a small allreduce. So
    all ranks must call it in the same steps; evaluate with the loss that you gave.

    Args:
        loss: a Keras loss with any reduction but None.
        process_set: the ranks whose gradients are averaged; by default all.

    Returns:
        A function of `(y_true, y_pred, sample_weight=None)`. Its values, averaged over the ranks, are the loss of one
        process.

    Raises:
        UsageError: `loss` is something else, such as a function, or has no reduction.

    Example:
        loss = hvd.shard_loss(keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255))
        with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
            value = loss(labels, model(images, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
    """
    return ShardedLoss(loss, process_set)


# ---- In Keras -------------------------------------------------------------------------------------------------------


def is_active() -> bool:
    """Returns whether a scope is entered."""
    return _state.scope is not None


def watch_calls(keras_call: Callable) -> Callable:
    """Returns a replacement for `keras.losses.Loss.__call__`, which lets `reduce` know what is called."""

    @functools.wraps(keras_call)
    def call(self: Any, y_true: Any, y_pred: Any, *args: Any, **kwargs: Any) -> Any:
        _state.calls.append((self, y_pred))
        try:
            return keras_call(self, y_true, y_pred, *args, **kwargs)
        finally:
            _state.calls.pop()

    return call


def reduce(elements: Elements, keras_result: Callable[[], Any]) -> Any:
    """Reduces a loss as Keras does, and weighs it; a replacement for Keras' own function."""
    value = keras_result()
    if len(_state.calls) != 1:  # a loss that another one calls: what that one returns is weighed
        return value
    if _state.scope is not None:
        return _state.scope.weigh(elements, value)
    if _needs_weights(elements):
        _state.unweighed = f"The loss {_name()} {_what_it_does(elements)}."
    return value


def has_sharded_losses() -> bool:
    """Returns whether this process has called a loss that `shard_loss` made."""
    return _state.has_sharded


def forget_unweighed() -> None:
    """Forgets which losses were called so far, so that nothing is said of them."""
    _state.unweighed, _state.weighed = "", False


def warn_of_unweighed() -> None:
    """Warns of a loss that was called since the last call of this function, if it needs weights and has none."""
    if _state.unweighed and not _state.weighed:
        _warn(
            f"{_state.unweighed} In this training loop hvdkit does not weigh the ranks by it, so they do not train as "
            f"one process does. If it is trained on, wrap it: loss = hvd.shard_loss(loss)."
        )
    forget_unweighed()


def examples_of_call() -> tf.Tensor:
    """Returns the number of examples of the batch whose loss is being called, float32."""
    _, predictions = _state.calls[0]
    shape = tf.shape(keras.tree.flatten(predictions)[0])
    return tf.cast(shape[0], tf.float32) if shape.shape[0] != 0 else tf.ones([])  # a single number is one example


def examples_are_static() -> bool:
    """Returns whether the graph is traced for batches of one size, that of the batch whose loss is being called."""
    _, predictions = _state.calls[0]
    shape = keras.tree.flatten(predictions)[0].shape
    return len(shape) > 0 and shape[0] is not None


def counts(elements: Elements) -> tf.Tensor:
    """Returns what this rank counts: the denominator, and the examples of its batch, [2]."""
    count = tf.cast(tf.size(elements.values), tf.float32) if elements.is_reduced else elements.denominator()
    count = count if count.dtype == tf.float64 else tf.cast(count, tf.float32)
    return tf.stack([count, tf.cast(examples_of_call(), count.dtype)])


def is_sum(elements: Elements) -> bool:
    """Returns whether a loss is summed over the batch, so that nothing divides it."""
    return elements.is_summed and not elements.is_reduced


def depends_on_data(elements: Elements) -> bool:
    """Returns whether equal numbers of examples may count different amounts."""
    if elements.is_reduced:
        return False
    shape = elements.values.shape
    return elements.counts_some or shape.rank is None or None in shape.as_list()[1:]


def _needs_weights(elements: Elements) -> bool:
    return not elements.is_reduced and (elements.counts_some or elements.is_summed)


def _what_it_does(elements: Elements) -> str:
    if elements.is_summed:
        return "is a sum over this rank's batch, not a mean"
    return "is a mean over what its mask or its weights count on this rank, which is another number on each rank"


def _multiplied(value: tf.Tensor, shown: Any, factor: Any) -> tf.Tensor:
    """Returns `shown * value`, with the gradient of `factor * value`."""

    @tf.custom_gradient
    def multiplied(value: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        scaled = tf.identity(value) if isinstance(shown, float) and shown == 1 else value * tf.cast(shown, value.dtype)
        return scaled, lambda upstream: upstream * tf.cast(factor, upstream.dtype)

    return multiplied(value)


def _name() -> str:
    loss, _ = _state.calls[0]
    return repr(loss.name)


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _log.warning("%s", message)

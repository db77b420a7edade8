"""What losses count in each batch of an evaluation, where the means of the ranks' batches do not combine by themselves.

Batch k of an evaluation in one process is the batches k of all ranks. Its loss is Σ_r S_rk / Σ_r D_rk: the sum of what
the ranks' losses add up to, over the sum of what they count. Keras averages these by the number of examples. A rank's
metric averages its own S_rk / D_rk. The sum of the ranks' metrics is another number with masks, with weights that
divide, and where a loss is a sum. For such losses, and no others, the ranks note S, D and the examples of each batch in
the graph, and exchange them once, when the evaluation ends.
"""

import contextlib
import itertools
import weakref
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives
from hvdkit.compat import call_stack
from hvdkit.compat.keras3 import compiled_losses, loss_tracker
from hvdkit.compat.losses import Elements
from hvdkit.optimizers import weighing

_ROOM = 1024  # batches; it grows


class _Rows(NamedTuple):
    """One loss of a model.

    Attributes:
        variable: [room, 4]: for each batch the sum, the denominator, the examples, and 1 if their number is static.
            Keras weighs a batch by it in the metric of one of several losses only if it is.
        is_sum: whether nothing divides the sum.
    """

    variable: tf.Variable
    is_sum: bool


class BatchLosses:
    """What the losses of one model have counted since `begin`, batch by batch, on this rank."""

    def __init__(self) -> None:
        self._rows: dict[int, _Rows] = {}  # by the loss's place in a call of `compute_loss`
        self._room = _ROOM
        with tf.init_scope():  # the function that evaluates, where this may be made, cannot create variables
            self._notes = tf.Variable(False, trainable=False, name="notes_batch_losses")
            self._batches = tf.Variable(0, trainable=False, dtype=tf.int64, name="noted_batches")
            self._most = tf.Variable(_ROOM, trainable=False, dtype=tf.int64, name="room_for_batches")

    def begin(self) -> None:
        """Forgets all batches, and notes what is counted from now on."""
        self._batches.assign(0)
        self._notes.assign(True)

    def make_room(self, batches: int) -> None:
        """Makes room for a number of batches. XLA compiles no variable that grows, so this happens between steps."""
        if batches <= self._room:
            return
        self._room = max(batches, 2 * self._room)
        self._most.assign(self._room)
        for variable, _ in self._rows.values():
            rows = variable.numpy()
            variable.assign(np.pad(rows, [(0, self._room - len(rows)), (0, 0)]))

    def end(self) -> int:
        """Notes nothing more, and returns the number of losses of which something was noted."""
        self._notes.assign(False)
        return len(self._rows) if int(self._batches.numpy()) else 0

    def note(self, place: int, is_sum: bool, row: list[tf.Tensor]) -> None:
        """Notes what a loss counts in the current batch, if `begin` was called. Part of the evaluation's graph."""
        if place not in self._rows:
            with tf.init_scope():
                variable = tf.Variable(
                    np.zeros([self._room, len(row)]), trainable=False, shape=[None, len(row)], name="batch_losses"
                )
            self._rows[place] = _Rows(variable, is_sum)
        variable = self._rows[place].variable

        def noted() -> tf.Tensor:
            values = tf.stack([tf.cast(value, variable.dtype) for value in row])
            variable.scatter_nd_update(self._batches.read_value()[None, None], values[None])
            return tf.constant(0)

        # There is no room if an evaluation was interrupted, and only test_on_batch has run since.
        notes = self._notes.read_value() & (self._batches.read_value() < self._most.read_value())
        tf.cond(notes, noted, lambda: tf.constant(0))

    def next_batch(self, loss: tf.Tensor) -> None:
        """Ends a batch, if it has a loss: the step that finds the data at their end has none. Part of the graph."""
        with tf.control_dependencies([loss]):
            self._batches.assign_add(tf.cast(self._notes.read_value(), tf.int64))

    def corrections(self, model: keras.Model, ranks: Any) -> dict[int, float]:
        """Returns what the sums of the ranks' metrics lack of those of one process. A collective call.

        Args:
            model: the model that was evaluated.
            ranks: the process set whose batches are parts of global batches.

        Returns:
            By the `id` of a metric's variable, a number to add to the sum of the ranks' values.
        """
        batches = int(self._batches.numpy())
        mine = {place: (rows.is_sum, rows.variable.numpy()[:batches]) for place, rows in self._rows.items()}
        everyone = collectives.allgather_object(mine if batches else {}, name="batch_losses", process_set=ranks)
        found: dict[int, float] = {}
        for place, (weight, metric) in enumerate(compiled_losses(model)):
            parts = [part[place] for part in everyone if place in part]
            if not parts:
                continue
            of_whole, of_loss = missing([rows for _, rows in parts], is_sum=parts[0][0])
            total = id(loss_tracker(model).total)
            found[total] = found.get(total, 0.0) + weight * of_whole
            if metric is not None:
                found[id(metric.total)] = of_loss
        return found


def missing(parts: list[np.ndarray], is_sum: bool) -> tuple[float, float]:
    """Returns what the ranks' totals lack of those of one process with their batches together.

    Args:
        parts: for each rank [batches, 4], as in `_Rows`; ranks may have different numbers of batches.
        is_sum: whether nothing divides the sum.

    Returns:
        The difference in the total of the whole loss, before its loss weight, and of this loss.
    """
    rows = np.array(list(itertools.zip_longest(*parts, fillvalue=np.zeros(4))))  # [batches, ranks, 4]
    sums, counts, examples, is_static = np.moveaxis(rows, -1, 0)

    def loss(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return sums if is_sum else np.divide(sums, counts, out=np.zeros_like(sums), where=counts != 0)

    together, own = loss(sums.sum(axis=1), counts.sum(axis=1)), loss(sums, counts)
    of_whole = (examples.sum(axis=1) * together).sum() - (examples * own).sum()
    weights = np.where(is_static, examples, examples > 0)
    weights_together = np.where(is_static.any(axis=1), examples.sum(axis=1), 1)
    of_loss = np.average(together, weights=weights_together) * weights.sum() - (weights * own).sum()
    return float(of_whole), float(of_loss)


class Noting(weighing.Scope):
    """Notes what the losses of a batch count, and leaves them as they are.

    Args:
        losses: where to note it.
        x: the inputs of the batch.
    """

    def __init__(self, losses: BatchLosses, x: Any) -> None:
        self._losses, self._x = losses, x
        self._place = 0
        self._noted: tf.Tensor | None = None  # the last loss

    def weigh(self, elements: Elements, value: tf.Tensor) -> tf.Tensor:
        """Notes what is counted, unless sums of the metrics know it already; returns the value."""
        place, self._place = self._place, self._place + 1
        is_sum = weighing.is_sum(elements)
        if value.shape.rank == 0 and (is_sum or weighing.depends_on_data(elements)):
            self._noted = value = tf.convert_to_tensor(value)
            count = tf.ones([], tf.float64) if is_sum else tf.cast(weighing.counts(elements)[0], tf.float64)
            examples = tf.shape(next(leaf for leaf in keras.tree.flatten(self._x) if leaf is not None))[0]
            is_static = tf.constant(weighing.examples_are_static())
            self._losses.note(place, is_sum, [tf.cast(value, tf.float64) * count, count, examples, is_static])
        return value

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._noted is not None and error[0] is None:
            self._losses.next_batch(self._noted)


_of_models: weakref.WeakKeyDictionary[keras.Model, BatchLosses] = weakref.WeakKeyDictionary()


def of(model: keras.Model) -> BatchLosses:
    """Returns what is noted of a model."""
    if model not in _of_models:
        _of_models[model] = BatchLosses()
    return _of_models[model]


def noting(model: keras.Model, x: Any) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which Keras' own evaluation of a batch computes losses.

    A `test_step` or `compute_loss` of one's own may show anything under the name of the loss: nothing is noted there.
    """
    own = any(
        name in vars(model) or getattr(type(model), name) is not getattr(keras.Model, name)
        for name in ("test_step", "compute_loss")
    )
    if own or x is None or not call_stack.is_running("test_step", model):
        return weighing.Scope()
    return Noting(of(model), x)

"""`evaluate` and `predict` on all ranks together: each rank takes some of the batches, all get the whole result.

The ranks divide whole batches, the same ones that a single process would form. So a loss that is normalized by the
batch (with masks, for example) is the same, and the sums of the metrics' states are exact.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.callbacks import AverageStateCallback, MetricAverageCallback
from hvdkit.callbacks.average_state import average_state
from hvdkit.collectives.agreement import together
from hvdkit.collectives.mesh import copies_of, mesh_of
from hvdkit.compat.keras3 import results_in_order
from hvdkit.data.shard import array_length, even_share, length_of, take_rows
from hvdkit.errors import UsageError


def evaluate(
    model: keras.Model,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    verbose: int | str = 0,
    sample_weight: Any = None,
    steps: int | None = None,
    callbacks: Any = None,
    return_dict: bool = False,
) -> Any:
    """Evaluates a compiled model on all ranks together, with the result of `Model.evaluate` in one process.

    Call it on all ranks, each with *all* of the data, not sharded and in the same order. Float non-trainable weights
    (BatchNormalization's statistics) are averaged over the ranks first. Metrics are combined by summing their states,
    as documented in `callbacks.MetricAverageCallback`.

    Args:
        model: a compiled model, with the same weights on all ranks.
        x: arrays [examples, ...] in any structure that the model takes, or a batched `tf.data.Dataset` with the labels.
        y: labels, for arrays.
        batch_size: examples per batch, for arrays; a rank processes one batch at a time. 32 by default.
        verbose: as in Keras, for rank 0, whose progress bar shows its own part. 0 by default.
        sample_weight: weights, for arrays.
        steps: number of batches over all ranks; by default all.
        callbacks: see `Model.evaluate`; they receive the results of all ranks when the test ends.
        return_dict: return a dict by name, not a list.

    Returns:
        The result of `Model.evaluate`, the same on all ranks.

    Raises:
        UsageError: on all ranks, if they were given different amounts of data, or none.
    """
    part = _Part(x, y, sample_weight, batch_size, steps, "evaluate", copies_of(model))
    results = evaluate_part(
        model,
        *part.arguments,
        counts=part.counts,
        whole_batches=True,
        verbose=verbose if world.rank() == 0 else 0,
        callbacks=keras.tree.flatten(callbacks),
        **part.options,
    )
    return results if return_dict else results_in_order(model, results)


def evaluate_part(
    model: keras.Model,
    *arguments: Any,
    counts: bool = True,
    whole_batches: bool = False,
    callbacks: Any = (),
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a model on data that differ between ranks in any amount, and returns the results over all ranks.

    Args:
        model: a compiled model.
        *arguments: this rank's own arguments for `Model.evaluate`.
        counts: whether this rank's data count; data are needed even if not, to create the metrics' state.
        whole_batches: whether each rank has batches of its own; if not, those of one number form a global batch.
        callbacks: the caller's callbacks.
        **options: options for `Model.evaluate`.
    """
    average = MetricAverageCallback()
    average.batches_are_whole = whole_batches
    ours = [AverageStateCallback(), *([] if counts else [_CountNothing()]), average]
    others = [
        c for c in callbacks if c is not None and not isinstance(c, (AverageStateCallback, MetricAverageCallback))
    ]
    last = _KeepResults()
    model.evaluate(*arguments, callbacks=[*ours, *others, last], **{"verbose": 0, **options})
    _wait_for_other_parts(model)
    return last.results


def predict(
    model: keras.Model,
    x: Any,
    batch_size: int | None = None,
    verbose: int | str = 0,
    steps: int | None = None,
    callbacks: Any = None,
) -> Any:
    """Predicts on all ranks together; every rank gets all predictions, in the order of the examples.

    Call it on all ranks, each with *all* of the data, not sharded and in the same order. Float non-trainable weights
    (BatchNormalization's statistics) are averaged over the ranks first.

    Args:
        model: a model with the same weights on all ranks.
        x: arrays [examples, ...] in any structure that the model takes, or a batched `tf.data.Dataset`.
        batch_size: examples per batch, for arrays; a rank processes one batch at a time. 32 by default.
        verbose: as in Keras, for rank 0. 0 by default.
        steps: number of batches over all ranks; by default all.
        callbacks: see `Model.predict`; they see this rank's part.

    Returns:
        Arrays [examples, ...] in the structure of the model's output.

    Raises:
        UsageError: on all ranks, if they were given different amounts of data, or none; or if the output is ragged.
    """
    copies = copies_of(model)
    part = _Part(x, None, None, batch_size, steps, "predict", copies)
    average_state(model)
    shown = verbose if world.rank() == 0 else 0
    outputs = model.predict(*part.arguments[:1], verbose=shown, callbacks=callbacks, **part.options)
    leaves = keras.tree.flatten(outputs)
    gathered = [_gather(rows if part.counts else rows[:0], place, copies) for place, rows in enumerate(leaves)]
    _wait_for_other_parts(model)
    return keras.tree.pack_sequence_as(outputs, gathered)


def _wait_for_other_parts(model: keras.Model) -> None:
    """Waits for ranks with other parts of a sharded model: no collective does, and the first to exit would end them."""
    if mesh_of(model.weights) is not None:
        collectives.barrier(name="evaluated")


class _Part:
    """This rank's batches: a contiguous range of those that one process would form.

    Ranks that hold one model together have the same batches.

    Attributes:
        arguments: x, y and sample weights, or only a dataset.
        options: options for Keras: the batch size, if the data are arrays.
        counts: False on a rank without a batch of its own; it gets the first one, for the shapes.
    """

    def __init__(
        self, x: Any, y: Any, weights: Any, batch_size: int | None, steps: int | None, what: str, copies: Any
    ) -> None:
        batch = batch_size or 32
        with together():
            whole = _Whole(x, y, weights, batch, steps)
        _check_alike(whole, what)
        start, stop = even_share(whole.batches, copies.rank(), copies.size())
        self.counts = stop > start
        if not self.counts:
            start, stop = 0, 1
        self.arguments: tuple = ()
        self.options: dict[str, Any] = {}
        if isinstance(x, tf.data.Dataset):
            self.arguments = (x.skip(start).take(stop - start),)
        else:
            rows = np.arange(start * batch, min(stop * batch, whole.size))
            self.arguments = tuple(take_rows(part, rows) for part in (x, y))
            self.options = {"batch_size": batch}
            if weights is not None:
                self.options["sample_weight"] = take_rows(weights, rows)


class _Whole:
    """The amount of data: `size` examples (arrays) or batches (a dataset), and the number of `batches` to use."""

    def __init__(self, x: Any, y: Any, weights: Any, batch: int, steps: int | None) -> None:
        if isinstance(x, tf.data.Dataset):
            if y is not None or weights is not None:
                raise UsageError(
                    "y and sample_weight go with arrays; a tf.data.Dataset has its own. Leave them out, or put them "
                    "into the data set: (x, y) or (x, y, sample_weight)."
                )
            self.unit = "batches"
            size = length_of(x)
            if size is None and steps is None:
                raise UsageError("The data set is infinite. Give steps=..., or dataset.take(...).")
            self.size = steps or 0 if size is None else size
            self.batches = self.size
        else:
            self.unit = "examples"
            self.size = array_length((x, y, weights))
            self.batches = -(-self.size // batch)
        if steps is not None:
            self.batches = min(self.batches, steps)
        if not self.batches:
            raise UsageError(f"There is nothing to work on: {self.size} {self.unit}, steps={steps}. Give one at least.")


def _check_alike(whole: _Whole, what: str) -> None:
    everyone = collectives.allgather_object((whole.size, whole.unit, whole.batches), name="evaluation")
    other = next((rank for rank, amount in enumerate(everyone) if amount != everyone[0]), None)
    if other is not None:
        shown = [f"rank {rank} {size} {unit} ({batches} steps)" for rank, (size, unit, batches) in enumerate(everyone)]
        raise UsageError(
            f"hvd.{what} divides the data over the ranks itself, so each must give all of them; but there are on "
            f"{shown[0]} and on {shown[other]}. Give the data as they were before hvd.data.shard."
        )


def _gather(rows: Any, place: int, copies: Any) -> np.ndarray:
    if copies.size() == 1:
        return rows
    if not isinstance(rows, np.ndarray):
        raise UsageError(
            f"Output {place} of the model is a {type(rows).__name__}: only outputs with a row for each example, of one "
            f"shape, can be gathered. Make it dense (to_tensor), or predict with model.predict on each rank."
        )
    if rows.dtype.kind in "OSU":  # strings
        return np.concatenate(collectives.allgather_object(rows, name=f"predict.{place}", process_set=copies))
    shapes = collectives.allgather_object(rows.shape[1:], name=f"predict.{place}.shape", process_set=copies)
    if len(set(shapes)) > 1:
        raise UsageError(
            f"Output {place} of the model has rows of different shapes on the ranks: {', '.join(map(str, shapes))}. "
            f"Pad the batches to one length, or predict with model.predict on each rank."
        )
    return collectives.gather_rows(tf.convert_to_tensor(rows), f"hvdkit.predict.{place}", copies).numpy()


class _CountNothing(keras.callbacks.Callback):
    """Resets this rank's metrics before they are summed over ranks; states that are not summed remain."""

    def on_test_end(self, logs: dict | None = None) -> None:
        for variable in [v for metric in self.model.metrics for v in metric.variables]:
            if getattr(variable, "aggregation", "sum") not in ("mean", "only_first_replica"):
                variable.assign(np.zeros(variable.shape))


class _KeepResults(keras.callbacks.Callback):
    """Keeps the results that the callbacks before it have produced."""

    results: dict[str, Any]

    def on_test_end(self, logs: dict | None = None) -> None:
        self.results = dict(logs or {})

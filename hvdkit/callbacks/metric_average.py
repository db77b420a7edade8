"""`MetricAverageCallback`: gives callbacks the exact metrics over all ranks."""

from typing import Any

import keras
import numpy as np

from hvdkit import collectives, world
from hvdkit.callbacks import batch_losses, own_metrics
from hvdkit.collectives.mesh import copies_of
from hvdkit.compat import fit_loop


class MetricAverageCallback(keras.callbacks.Callback):
    """Replaces the epoch's metrics by their exact values over all ranks.

    An average of the ranks' results is wrong if ranks saw different numbers of examples, or for metrics that are not
    means, such as AUC. So this callback sums the *states* of the metrics (totals, counts, confusion matrices) and
    computes the result from the sum. It averages logged values that have no metric in the model (logs of a custom
    `train_step`).

    In an evaluation, the ranks' batches of one number are parts of one global batch. With masks, or weights that
    divide, the loss is the one of these batches, in one process (see `batch_losses`).

    Put it before callbacks that act on metrics, such as `EarlyStopping` and `ReduceLROnPlateau`: then all ranks make
    the same decision.

    Args:
        device: ignored; accepted because Horovod's callback has it.
    """

    batches_are_whole = False  # whether each rank evaluates batches of its own, not parts of global batches

    def __init__(self, device: str = "") -> None:
        super().__init__()
        self.device = device
        self._in_epoch = False
        self._train: dict[str, float] | None = None
        self._validation: dict[str, float] = {}

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Discards the values of the last epoch."""
        self._in_epoch = True
        self._train, self._validation = None, {}

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Stores the training metrics, because a validation pass inside `fit` is about to reset them."""
        if self._in_epoch:
            self._train = exact_metrics(self.model)
        if self._notes():
            batch_losses.of(self.model).begin()

    def on_test_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Makes room for what the losses of the next batches count."""
        if self._notes():
            batch_losses.of(self.model).make_room(batch + self.model.steps_per_execution)

    def on_test_end(self, logs: dict | None = None) -> None:
        """Stores the validation metrics, and writes them into the logs, for later callbacks and `evaluate`'s result."""
        results = exact_metrics(self.model, evaluated=self._notes())
        if self._in_epoch:
            self._validation = {f"val_{name}": value for name, value in results.items()}
        if logs is not None:
            exact = _complete(logs, results)
            logs.update(exact)
            fit_loop.logs_of_evaluation(self.model).update(exact)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes the exact values into the epoch's logs."""
        train = exact_metrics(self.model) if self._train is None else self._train
        if logs is not None:
            logs.update(_complete(logs, {**train, **self._validation}))
        self._in_epoch = False

    def _notes(self) -> bool:
        """Returns whether an evaluation notes what losses count in each batch."""
        return not self.batches_are_whole and world.size() > 1


def exact_metrics(model: keras.Model, evaluated: bool = False) -> dict[str, Any]:
    """Sums the states of the model's metrics over all ranks and returns the results.

    Every Keras metric is a function of sums over the examples. In a metric of your own, a variable's `aggregation`
    decides: "sum" (Keras' default for metrics) sums over ranks, "mean" averages, "only_first_replica" takes the value
    of rank 0. Other states, for example a maximum, are not supported; a warning names them (see `own_metrics`).

    Afterwards the metrics have the global state on every rank, until `reset_metrics`.

    Args:
        model: a compiled model.
        evaluated: whether an evaluation has ended in which `batch_losses` were noted.

    Returns:
        For each name a float, or an array if the metric has several values (`F1Score(average=None)`).
    """
    variables = [v for metric in model.metrics for v in metric.variables]
    copies = copies_of(model) if world.size() > 1 else None
    noted = batch_losses.of(model).end() if evaluated else 0
    if copies is not None and copies.size() > 1 and variables:
        # In float64: float32 values of the ranks are represented exactly, and only the sum is rounded.
        own_metrics.warn_of_assignments(model.metrics)
        values = [_contribution(v, copies) for v in variables]
        in_python = own_metrics.without_variables(model.metrics)
        shown = [own_metrics.result_of(metric) for metric in in_python]
        state = np.concatenate([*(v.ravel() for v in values), shown, [noted]])
        *parts, shown_by_all, noted_by_all = np.split(
            collectives.allreduce_sum(state, "metrics", copies), np.cumsum([*(v.size for v in values), len(shown)])
        )
        for metric, mine, total in zip(in_python, shown, shown_by_all, strict=True):
            own_metrics.warn_if_differs(metric, mine, total, copies.size())
        lacking = batch_losses.of(model).corrections(model, copies) if noted_by_all else {}
        for variable, part, value in zip(variables, parts, values, strict=True):
            variable.assign(part.reshape(value.shape) + lacking.get(id(variable), 0.0))
    return {name: _as_python(value) for name, value in model.get_metrics_result().items()}


def _contribution(variable: Any, copies: Any) -> np.ndarray:
    value = np.asarray(keras.ops.convert_to_numpy(variable), np.float64)
    aggregation = getattr(variable, "aggregation", "sum")
    if aggregation == "mean":
        return value / copies.size()
    return np.zeros_like(value) if aggregation == "only_first_replica" and copies.rank() else value


def _complete(logs: dict[str, Any], exact: dict[str, float]) -> dict[str, float]:
    others = sorted(name for name, value in logs.items() if name not in exact and np.isscalar(value))
    if others and world.size() > 1:
        total = collectives.allreduce_sum(np.asarray([logs[name] for name in others], np.float64), name="logs")
        exact = {**exact, **dict(zip(others, (total / world.size()).tolist(), strict=True))}
    return {name: exact[name] for name in logs if name in exact}


def _as_python(value: Any) -> Any:
    array = keras.ops.convert_to_numpy(value)
    return array if array.ndim else float(array)

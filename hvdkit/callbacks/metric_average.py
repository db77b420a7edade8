"""`MetricAverageCallback`: the metrics that callbacks see are those of all ranks together, exactly."""

from typing import Any

import keras
import numpy as np

from hvdkit import collectives, world
from hvdkit.collectives.mesh import copies_of


class MetricAverageCallback(keras.callbacks.Callback):
    """Replaces the epoch's metrics by their exact values over all ranks.

    Averaging results is wrong where ranks saw different numbers of examples, and for metrics such as AUC that are not
    means. So the *states* of the metrics are added up (totals, counts, confusion matrices), and the result is
    computed from the sum. Values behind which the model has no metric (logs of a custom `train_step`) are averaged.

    Put it before callbacks that decide by metrics, such as `EarlyStopping` and `ReduceLROnPlateau`: then all ranks
    decide alike.

    Args:
        device: accepted for Horovod's sake.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()
        self.device = device
        self._in_epoch = False
        self._train: dict[str, float] | None = None
        self._validation: dict[str, float] = {}

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Forgets the last epoch."""
        self._in_epoch = True
        self._train, self._validation = None, {}

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Takes the training metrics: a validation pass inside of `fit` is about to reset them."""
        if self._in_epoch:
            self._train = exact_metrics(self.model)

    def on_test_end(self, logs: dict | None = None) -> None:
        """Takes the validation metrics, and puts them into the logs that later callbacks get."""
        results = exact_metrics(self.model)
        if self._in_epoch:
            self._validation = {f"val_{name}": value for name, value in results.items()}
        if logs is not None:
            logs.update(_complete(logs, results))

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Puts the exact values into the epoch's logs."""
        train = exact_metrics(self.model) if self._train is None else self._train
        if logs is not None:
            logs.update(_complete(logs, {**train, **self._validation}))
        self._in_epoch = False


def exact_metrics(model: keras.Model) -> dict[str, Any]:
    """Adds up the states of the model's metrics over all ranks and returns the results.

    Every metric that Keras has is a function of sums over the examples. A state of a metric of your own is treated as
    its variable's `aggregation` says: summed (Keras' default for metrics), "mean" averaged, "only_first_replica" taken
    from rank 0. A maximum, for example, cannot be had in this way.

    Afterwards the metrics hold the common state on every rank, until `reset_metrics`.

    Returns:
        By name a float, or an array where the metric has several values (`F1Score(average=None)`).
    """
    variables = [v for metric in model.metrics for v in metric.variables]
    copies = copies_of(model) if world.size() > 1 else None
    if copies is not None and copies.size() > 1 and variables:
        # In float64: a rank's float32 counts are exact, and stay so until the sum is rounded once.
        values = [_contribution(v, copies) for v in variables]
        flat = collectives.allreduce_sum(np.concatenate([v.ravel() for v in values]), "metrics", copies)
        parts = np.split(flat, np.cumsum([v.size for v in values])[:-1])
        for variable, part, value in zip(variables, parts, values, strict=True):
            variable.assign(part.reshape(value.shape))
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

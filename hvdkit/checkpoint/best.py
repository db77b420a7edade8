"""Which epochs are among the best of a run: of these checkpoints are kept, also where no checkpoint is due."""

from collections.abc import Mapping, Sequence

import keras

from hvdkit import collectives, world
from hvdkit.compat.keras3 import less_is_better


class Best:
    """Judges epochs by a metric.

    Args:
        model: the model that is trained.
        count: how many epochs are kept; with 0 none is judged.
        monitor: the name of the metric in the logs.
        mode: "min" or "max"; if Keras knows better, and `infer` is true, then what Keras says.
        infer: whether `mode` is only a guess.
        there: the metrics of the checkpoints that there are, on rank 0.
    """

    def __init__(
        self, model: keras.Model, count: int, monitor: str, mode: str, infer: bool, there: Sequence[Mapping[str, float]]
    ) -> None:
        self.mode = mode
        self._model, self._count, self._monitor, self._infer = model, count, monitor, infer
        self._values = [metrics[monitor] for metrics in there if monitor in metrics]

    def takes(self, metrics: Mapping[str, float]) -> bool:
        """Returns whether an epoch with these metrics is among the best so far, and counts it. A collective call."""
        if not self._count:
            return False
        return collectives.broadcast_object(world.rank() == 0 and self._takes(metrics), name="checkpoint.best")

    def _takes(self, metrics: Mapping[str, float]) -> bool:
        if self._infer:  # only now: metrics are built in the first epoch
            less = less_is_better(self._model, self._monitor)
            self.mode = self.mode if less is None else "min" if less else "max"
            self._infer = False
        value = metrics.get(self._monitor, float("nan"))
        if value != value:  # NaN
            return False
        ordered = sorted(self._values, reverse=self.mode == "max")
        self._values = [*ordered[: self._count], value]
        return len(ordered) < self._count or (value - ordered[self._count - 1]) * (-1 if self.mode == "max" else 1) < 0

"""`EvaluationCallback`: judges a model by what needs all examples at once, such as mean average precision."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import keras

from hvdkit import collectives, world
from hvdkit.compat import fit_loop


class Evaluator(Protocol):
    """Computes metrics that are no sums over batches, such as mean average precision.

    Attributes:
        metrics: their names.
    """

    metrics: Sequence[str]

    def measure(self, inputs: Any, targets: Any, outputs: Any) -> Iterable[Any]:
        """Returns what is to be kept of each example of a batch: an object that can be pickled."""

    def summarize(self, measured: Sequence[Any]) -> dict[str, float]:
        """Returns metrics by name, of what was kept of all examples."""


class EvaluationCallback(keras.callbacks.Callback):
    """Adds an evaluator's metrics to those of each evaluation: exact, over the examples of all ranks.

    After each evaluation the model predicts the batches once more. What the evaluator keeps of their examples is
    gathered from all ranks, so that each of them computes the same metrics. In `fit`, they are logged as `val_NAME`.
    Put it before callbacks that act on these metrics.

    Args:
        evaluator: what measures and summarizes.
        batches: this rank's batches, (inputs, targets) or (inputs, targets, weights), each example on one rank.
        share: identifies the examples of this rank; ranks with the same ones, which share a divided model, give the
            same number. By default, this rank's.
    """

    def __init__(self, evaluator: Evaluator, batches: Iterable[Any], share: int | None = None) -> None:
        super().__init__()
        self._evaluator, self._batches, self._share = evaluator, batches, share

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Predicts, gathers and summarizes."""
        found = judge(self.model, self._evaluator, self._batches, self._share)
        if logs is not None:
            logs.update(found)
            fit_loop.logs_of_evaluation(self.model).update(found)


def judge(
    model: keras.Model, evaluator: Evaluator, batches: Iterable[Any], share: int | None = None
) -> dict[str, float]:
    """Returns an evaluator's metrics of a model, over the examples of all ranks. A collective call.

    Args: see `EvaluationCallback`.
    """
    kept: list[Any] = []
    for inputs, targets, *_ in batches:
        kept += evaluator.measure(inputs, targets, model.predict_on_batch(inputs))
    mine = (world.rank() if share is None else share, kept)
    gathered = dict(collectives.allgather_object(mine, name="evaluation"))
    return evaluator.summarize([one for number in sorted(gathered) for one in gathered[number]])

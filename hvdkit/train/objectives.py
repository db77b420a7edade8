"""What a model is trained and judged by, for each task: its loss, its metrics, and how a message gives them."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from hvdkit.data.sources import CLASSIFICATION, MULTILABEL, REGRESSION
from hvdkit.train.build import ends_in

# What a model's output has one value of, in messages.
OUTPUTS = {CLASSIFICATION: "classes", REGRESSION: "measured values", MULTILABEL: "labels"}
LABELS = {
    CLASSIFICATION: "numbers of classes",
    REGRESSION: "measured values",
    MULTILABEL: "0 or 1 for each label",
}

_BARELY_POSITIVE = 1e-7  # a logit; some versions of Keras refuse 0 as a threshold
_FAR_FROM_0 = 100.0  # square of a mean, in multiples of the variance


def loss_for(task: str, model: keras.Model) -> keras.losses.Loss:
    """Returns the loss of a model that its function did not compile."""
    if task == REGRESSION:
        return keras.losses.MeanSquaredError()
    if task == MULTILABEL:
        return keras.losses.BinaryCrossentropy(from_logits=not ends_in(model, keras.activations.sigmoid))
    return keras.losses.SparseCategoricalCrossentropy(from_logits=not ends_in(model, keras.activations.softmax))


def metrics_for(
    task: str, model: keras.Model, label_mean: Sequence[float] = (), label_variance: Sequence[float] = ()
) -> list[keras.metrics.Metric]:
    """Returns the metrics of a model that its function did not compile.

    Args:
        task: see `hvdkit.data.sources.Schema`.
        model: the model.
        label_mean: for regression, the mean of each measured value.
        label_variance: the variance of each.
    """
    if task == REGRESSION:
        error = keras.metrics.MeanAbsoluteError(name="mean_absolute_error")
        # Keras' R2Score adds up squares in float32. So it is wrong for values that are far from 0, such as years.
        is_exact = all(m * m <= _FAR_FROM_0 * v for m, v in zip(label_mean, label_variance, strict=True))
        return [error, *([keras.metrics.R2Score(name="r2_score")] if is_exact else [])]
    if task == MULTILABEL:
        is_probability = ends_in(model, keras.activations.sigmoid)
        threshold = 0.5 if is_probability else _BARELY_POSITIVE
        accuracy = keras.metrics.BinaryAccuracy(name="accuracy", threshold=threshold)
        return [accuracy, keras.metrics.AUC(name="auc", from_logits=not is_probability)]
    return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]


def results_of(task: str, split: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Returns what `result.json` says of a split: its metrics and its loss, by `SPLIT_NAME`.

    For classes and labels that includes an accuracy, None if the model's function compiled it without one.
    """
    shown: dict[str, Any] = {} if task == REGRESSION else {"accuracy": metrics.get("accuracy")}
    shown |= {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
    shown["loss"] = shown.pop("loss")  # comes last
    return {f"{split}_{name}": value for name, value in shown.items()}


def describe(task: str, result: Mapping[str, Any]) -> str:
    """Returns the main metric of the test split as a message gives it."""
    if task == REGRESSION:
        error = result.get("test_mean_absolute_error")
        return f"test mean absolute error {'unknown' if error is None else f'{error:.5g}'}"
    accuracy = result["test_accuracy"]
    return f"test accuracy {'unknown' if accuracy is None else f'{accuracy:.2%}'}"

"""What a model is trained and judged by, for each task: its loss, its metrics, and how a message gives them."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit.compat.keras3 import less_is_better
from hvdkit.data.sources import CLASSIFICATION, MULTILABEL, REGRESSION
from hvdkit.errors import UsageError
from hvdkit.train.build import ends_in

# What a model's output has one value of, in messages.
OUTPUTS = {CLASSIFICATION: "classes", REGRESSION: "measured values", MULTILABEL: "labels"}
LABELS = {
    CLASSIFICATION: "numbers of classes",
    REGRESSION: "measured values",
    MULTILABEL: "0 or 1 for each label",
}

_MAIN = {CLASSIFICATION: "accuracy", MULTILABEL: "accuracy", REGRESSION: "mean_absolute_error"}
_LESS_IS_BETTER = ("loss", "error", "mse", "mae", "mape", "entropy")  # in the names of metrics
_MORE_IS_BETTER = ("acc", "auc", "f1", "precision", "recall", "iou", "r2", "map")
_BARELY_POSITIVE = 1e-7  # a logit; some versions of Keras refuse 0 as a threshold
_FAR_FROM_0 = 100.0  # square of a mean, in multiples of the variance


def loss_for(task: str, model: keras.Model, *, one_hot: bool = False, focal: float | None = None) -> keras.losses.Loss:
    """Returns the loss of a model that its function did not compile.

    Args:
        task: see `hvdkit.data.sources.Schema`.
        model: the model.
        one_hot: whether labels are probabilities of classes.
        focal: gamma of the focal loss, for such labels: T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollár, "Focal
            Loss for Dense Object Detection", 2017. None for the cross-entropy.
    """
    is_logits = not ends_in(model, keras.activations.softmax)
    if focal is not None:
        return keras.losses.CategoricalFocalCrossentropy(alpha=1.0, gamma=focal, from_logits=is_logits)
    if one_hot:
        return keras.losses.CategoricalCrossentropy(from_logits=is_logits)
    if task == REGRESSION:
        return keras.losses.MeanSquaredError()
    if task == MULTILABEL:
        return keras.losses.BinaryCrossentropy(from_logits=not ends_in(model, keras.activations.sigmoid))
    return keras.losses.SparseCategoricalCrossentropy(from_logits=is_logits)


def metrics_for(
    task: str,
    model: keras.Model,
    label_mean: Sequence[float] = (),
    label_variance: Sequence[float] = (),
    *,
    one_hot: bool = False,
) -> list[keras.metrics.Metric]:
    """Returns the metrics of a model that its function did not compile.

    Args:
        task: see `hvdkit.data.sources.Schema`.
        model: the model.
        label_mean: for regression, the mean of each measured value.
        label_variance: the variance of each.
        one_hot: whether labels are probabilities of classes.
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
    kind = keras.metrics.CategoricalAccuracy if one_hot else keras.metrics.SparseCategoricalAccuracy
    return [kind(name="accuracy")]


def results_of(task: str, split: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Returns what `result.json` says of a split: its metrics and its loss, by `SPLIT_NAME`.

    For classes and labels that includes an accuracy, None if the model's function compiled it without one.
    """
    shown: dict[str, Any] = {"accuracy": metrics.get("accuracy")} if _MAIN.get(task) == "accuracy" else {}
    shown |= {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
    shown["loss"] = shown.pop("loss")  # comes last
    return {f"{split}_{name}": value for name, value in shown.items()}


def confusion(model: keras.Model, batches: tf.data.Dataset, classes: int) -> np.ndarray | None:
    """Counts how often an example of each class is taken for each class.

    Args:
        model: the model.
        batches: batches of inputs, and numbers or probabilities of classes.
        classes: number of classes.

    Returns:
        int64 [true class, predicted class]; None if the model does not give a number for each class.
    """
    counts = np.zeros([classes, classes], np.int64)
    for inputs, labels in batches:
        outputs = model.predict_on_batch(inputs)
        if np.ndim(outputs) != 2 or outputs.shape[1] != classes:
            return None
        true = labels.numpy() if labels.ndim == 1 else labels.numpy().argmax(axis=1)
        np.add.at(counts, (true, outputs.argmax(axis=1)), 1)
    return counts


def results_by_class(counts: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Returns what `result.json` says of the classes of the test split.

    The balanced accuracy is the mean recall of the classes that have examples: K. H. Brodersen et al., "The Balanced
    Accuracy and Its Posterior Distribution", 2010, as in scikit-learn.

    Args:
        counts: see `confusion`.
        names: the names of the classes.
    """
    hits, there, taken = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    recall = [float(hit / number) if number else None for hit, number in zip(hits, there, strict=True)]
    precision = [float(hit / number) if number else None for hit, number in zip(hits, taken, strict=True)]
    by_class = {
        name: {"examples": int(there[c]), "recall": recall[c], "precision": precision[c]}
        for c, name in enumerate(names)
    }
    known = [value for value in recall if value is not None]
    return {"test_balanced_accuracy": float(np.mean(known)), "test_classes": by_class}


def main_metric(task: str, monitor: str | None, metrics: Sequence[str]) -> str:
    """Returns the name of the metric that messages and tables show: the monitored one, or the task's.

    Args:
        task: see `hvdkit.data.sources.Schema`.
        monitor: the metric that the user monitors, if any.
        metrics: names of the model's metrics and its losses, in its order.
    """
    own = (name for name in metrics if not name.endswith("loss"))
    return monitor or _MAIN.get(task) or next(own, "loss")


def describe(name: str, value: float | None) -> str:
    """Returns a metric of the test split as a message gives it."""
    shown = name.replace("_", " ")
    if value is None:
        return f"test {shown} unknown"
    return f"test {shown} {value:.2%}" if name == "accuracy" else f"test {shown} {value:.5g}"


def check_monitor(
    model: keras.Model,
    monitor: str,
    mode: str,
    metrics: Sequence[keras.metrics.Metric],
    evaluated: Sequence[str] = (),
) -> str:
    """Checks that a model has the metric that is to be monitored; returns "min" or "max", which of them is better.

    Args:
        model: the model. If it is compiled, its metrics have been computed once.
        monitor: the metric's name.
        mode: "min", "max" or "auto".
        metrics: the metrics of a model that is not compiled yet.
        evaluated: names of the metrics of the model's evaluator.

    Raises:
        UsageError: it has no such metric, or it cannot be known whether less is better.
    """
    names = list(model.get_metrics_result()) if model.compiled else ["loss", *(metric.name for metric in metrics)]
    names += evaluated
    if monitor not in names:
        raise UsageError(
            f"--monitor={monitor} is no metric of the model, which has {', '.join(names)}. Name one of these, or "
            f"compile the model with that metric."
        )
    if mode != "auto":
        return mode
    less = less_is_better(model, monitor) if model.compiled and monitor not in evaluated else None
    if less is not None:
        return "min" if less else "max"
    for found, parts in (("min", _LESS_IS_BETTER), ("max", _MORE_IS_BETTER)):
        if any(part in monitor for part in parts):  # Keras does not know the names of metrics of several outputs
            return found
    raise UsageError(
        f"--monitor={monitor}: it cannot be known whether less or more of it is better. Give --monitor-mode=min or "
        f"--monitor-mode=max."
    )

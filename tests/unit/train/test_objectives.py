"""Losses, metrics and results of each task."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdkit.errors import UsageError
from hvdkit.train import flags as train_flags
from hvdkit.train import objectives
from hvdkit.train.build import check_batch
from tests.unit.train.small_models import small, two_outputs


def parse(*flags):
    return train_flags.parse(["train", *flags])


def test_what_each_task_is_trained_and_judged_by():
    logits = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(3)])
    sigmoid = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(3, activation="sigmoid")])
    wanted = np.float32([[1, 0, 1], [0, 0, 1]])
    given = np.float32([[2, -1, -3], [-2, -2, 1]])
    found = {}
    for model, outputs in ((logits, given), (sigmoid, 1 / (1 + np.exp(-given)))):
        accuracy, auc = objectives.metrics_for("multilabel", model)
        accuracy.update_state(wanted, outputs)
        auc.update_state(wanted, outputs)
        assert float(accuracy.result()) == pytest.approx(5 / 6)
        found[model] = float(objectives.loss_for("multilabel", model)(wanted, outputs)), float(auc.result())
    assert found[logits] == pytest.approx(found[sigmoid], rel=1e-3)
    values, near = np.float32([[1.0], [2.0], [5.0]]), np.float32([[1.5], [2.0], [4.0]])
    error, r2_score = objectives.metrics_for("regression", logits, [2.0], [3.0])
    for metric in (error, r2_score):
        metric.update_state(values, near)
    assert float(error.result()) == pytest.approx(0.5)
    assert float(r2_score.result()) == pytest.approx(1 - 1.25 / np.square(values - values.mean()).sum(), rel=1e-6)
    assert float(objectives.loss_for("regression", logits)(values, near)) == pytest.approx(1.25 / 3)
    of_years = objectives.metrics_for("regression", logits, [2000.0], [3.0])
    assert [metric.name for metric in of_years] == ["mean_absolute_error"], "R2Score would lose their variance"


def test_results_of_each_task_by_name():
    metrics = {"loss": 2.0, "mean_absolute_error": 1.5, "r2_score": 0.5}
    found = objectives.results_of("regression", "test", metrics)
    assert list(found.items()) == [("test_mean_absolute_error", 1.5), ("test_r2_score", 0.5), ("test_loss", 2.0)]
    main = objectives.main_metric("regression", None, list(metrics))
    assert objectives.describe(main, found[f"test_{main}"]) == "test mean absolute error 1.5"
    found = objectives.results_of("classification", "test", {"loss": np.float32(2.0), "f1": np.zeros(3)})
    assert found == {"test_accuracy": None, "test_loss": 2.0}
    assert objectives.describe("accuracy", found["test_accuracy"]) == "test accuracy unknown"
    assert objectives.describe("accuracy", 0.5) == "test accuracy 50.00%"
    assert objectives.results_of("compiled", "test", {"loss": 2.0, "iou": 0.5}) == {"test_iou": 0.5, "test_loss": 2.0}
    assert objectives.main_metric("multilabel", None, ["loss", "auc"]) == "accuracy"
    assert objectives.main_metric("compiled", None, ["loss", "box_loss", "iou", "mae"]) == "iou"
    assert objectives.main_metric("compiled", None, ["loss", "box_loss"]) == "loss"
    assert objectives.main_metric("compiled", "mae", ["loss", "iou", "mae"]) == "mae"


def test_a_metric_to_monitor_must_be_there_and_say_what_is_better():
    def dice(y_true, y_pred):
        return keras.ops.mean(y_true * y_pred)

    model = small("mean_squared_error", [dice, "mae"])
    check_batch(model, (np.zeros([2, 4]), np.zeros([2, 3])), "mine", "mine:data")
    assert objectives.check_monitor(model, "mae", "auto", []) == "min"
    assert objectives.check_monitor(model, "dice", "max", []) == "max"
    metrics = [keras.metrics.AUC(name="auc")]
    assert objectives.check_monitor(two_outputs(), "auc", "auto", metrics) == "max"
    with pytest.raises(UsageError, match="--monitor=auc is no metric of the model, which has loss, dice, mae"):
        objectives.check_monitor(model, "auc", "auto", [])
    with pytest.raises(UsageError, match="--monitor=dice: it cannot be known whether less or more of it is better"):
        objectives.check_monitor(model, "dice", "auto", [])
    with pytest.raises(UsageError, match="Write --monitor=auc"):
        parse("--monitor=val_auc")


def test_the_focal_loss_and_results_by_class():
    from sklearn.metrics import balanced_accuracy_score, precision_score

    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=[50, 4]).astype("float32"), generator.integers(3, size=50)
    model = keras.Sequential([keras.layers.Input([4]), keras.layers.Identity()])
    one_hot = np.eye(4, dtype="float32")[labels]
    right = np.exp(logits)[np.arange(50), labels] / np.exp(logits).sum(axis=1)
    for gamma in (0.0, 2.0):
        loss = objectives.loss_for("classification", model, one_hot=True, focal=gamma)
        assert float(loss(one_hot, logits)) == pytest.approx((-np.log(right) * (1 - right) ** gamma).mean(), rel=1e-4)
    loss = objectives.loss_for("classification", model, one_hot=True)
    assert float(loss(one_hot, logits)) == pytest.approx(-np.log(right).mean(), rel=1e-5)

    batches = tf.data.Dataset.from_tensor_slices((logits, labels)).batch(16)
    counts = objectives.confusion(model, batches, 4)
    taken = logits.argmax(axis=1)
    assert counts.sum() == 50
    assert counts[1, 2] == ((labels == 1) & (taken == 2)).sum()
    found = objectives.results_by_class(counts, list("abcd"))
    assert found["test_balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, taken))
    precision = precision_score(labels, taken, labels=range(4), average=None, zero_division=0)
    assert [found["test_classes"][name]["precision"] for name in "abc"] == pytest.approx(precision[:3].tolist())
    assert found["test_classes"]["d"] == {"examples": 0, "recall": None, "precision": 0.0}
    assert objectives.confusion(model, batches, 3) is None, "another number of outputs"

"""The detector: which cell learns which box, its losses, and COCO's average precision."""

import keras
import numpy as np
import pytest
from hvdkit_models import boxes, detector

from hvdkit.data.sources import open_source

BOXES = np.array([[[2, 2, 22, 26, 1], [40, 40, 56, 56, 0]], [[0, 0, 64, 64, 2], [-1] * 5]], "float32")


def outputs_for(labels, classes=3, size=64):
    """What a model would return that knows the labels: the smallest box around each cell, and its class."""
    centers = detector._centers(size, size)
    chosen, sees = (np.asarray(part) for part in detector._assigned(labels, centers))
    distances = np.concatenate([centers - chosen[..., :2], chosen[..., 2:4] - centers], axis=-1)
    logits = np.where((np.arange(classes) == chosen[..., 4:]) & (sees[..., None] > 0), 20.0, -20.0)
    return np.concatenate([np.where(sees[..., None] > 0, distances, 1.0), logits], axis=-1).astype("float32")


def test_the_cells_around_a_center_learn_its_box():
    chosen, sees = (np.asarray(part) for part in detector._assigned(BOXES, detector._centers(64, 64)))
    cells = sees[0].reshape(8, 8) > 0
    assert np.argwhere(cells[:4]).tolist() == [[row, column] for row in range(3) for column in range(3)]
    assert np.argwhere(cells[4:]).tolist() == [[1, 5], [1, 6], [2, 5], [2, 6]]
    assert chosen[0].reshape(8, 8, 5)[1, 1].tolist() == [2, 2, 22, 26, 1]
    assert chosen[0].reshape(8, 8, 5)[5, 6].tolist() == [40, 40, 56, 56, 0]
    assert sees[1].sum() == 4, "a large box: the four cells around its center"
    _, none = detector._assigned(np.full([1, 2, 5], -1.0, "float32"), detector._centers(64, 64))
    assert not np.asarray(none).any()


def test_a_small_box_in_a_large_one_is_learned_by_its_cells():
    both = np.array([[[0, 0, 64, 64, 0], [26, 26, 38, 38, 1]]], "float32")
    chosen, sees = (np.asarray(part) for part in detector._assigned(both, detector._centers(64, 64)))
    assert sorted(chosen[0][sees[0] > 0][:, 4].tolist()) == [1, 1, 1, 1]


def test_the_loss_is_that_of_the_papers():
    right = outputs_for(BOXES)
    loss = detector.loss((64, 64, 1))
    assert np.asarray(loss.call(BOXES, right)).max() < 1e-4
    wrong = right.copy()
    wrong[..., :4] *= 1.5
    off = np.asarray(loss.call(BOXES, wrong))
    giou = np.asarray(detector._giou(np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 0, 3, 2]])))
    assert giou == pytest.approx(1 / 3, abs=1e-6), "the hull is the union"
    far = np.asarray(detector._giou(np.array([[0.0, 0, 1, 1]]), np.array([[3.0, 0, 4, 1]])))
    assert far == pytest.approx(-0.5)
    assert (off > 0.3).all()
    wanted, logits = np.array([[1.0, 0.0, 0.0]], "float32"), np.array([[0.3, -1.0, 2.0]], "float32")
    keras_focal = keras.losses.BinaryFocalCrossentropy(
        apply_class_balancing=True, alpha=0.25, gamma=2.0, from_logits=True
    )
    assert np.mean(np.asarray(detector._focal(wanted, logits))) == pytest.approx(
        float(keras_focal(wanted, logits)), 1e-5
    )


def test_an_image_without_boxes_has_a_loss_and_gradients():
    empty = np.full([2, 2, 5], -1.0, "float32")
    found = np.asarray(detector.loss((64, 64, 1)).call(empty, outputs_for(BOXES)))
    assert np.isfinite(found).all()
    assert (found > 0).all()


def test_the_loss_and_the_model_are_saved(tmp_path):
    model = detector.build((16, 24, 1), 3, width=4)
    assert model.output_shape == (None, 6, 7)
    model.compile("sgd", loss=detector.loss((16, 24, 1)))
    model.save(tmp_path / "detector.keras")
    again = keras.models.load_model(tmp_path / "detector.keras")
    images, labels = np.zeros([2, 16, 24, 1], "uint8"), np.array([[[0, 0, 9, 9, 2]]] * 2, "float32")
    assert again.evaluate(images, labels, verbose=0) == model.evaluate(images, labels, verbose=0)
    with pytest.raises(ValueError, match="give multiples of 8"):
        detector._centers(60, 64)


def test_of_overlapping_boxes_the_best_is_kept():
    found = np.array(
        [[0, 0, 10, 10, 1, 0.5], [1, 0, 10, 10, 1, 0.9], [0, 0, 10, 10, 2, 0.4], [20, 20, 30, 30, 1, 0.3]], "float32"
    )
    assert boxes.suppressed(found)[:, 4:].tolist() == found[[1, 2, 3], 4:].tolist()
    assert boxes.suppressed(found[:0]).shape == (0, 6)


def test_average_precision_is_cocos():
    pytest.importorskip("pycocotools")
    source, evaluator = open_source("digit_scenes"), detector.Evaluator()
    images, labels = source.read("test", 0, 40).batch(40).get_single_element()
    right = outputs_for(labels.numpy(), classes=10)
    measured = list(evaluator.measure(images, labels, right))
    assert evaluator.summarize(measured) == {"map": 1.0, "map_50": 1.0}
    wrong = [(found, np.zeros([0, 6], "float32")) for found, _ in measured[:20]] + measured[20:]
    half = evaluator.summarize(wrong)["map_50"]
    assert 0.3 < half < 0.7
    shifted = [(found, got + np.array([2, 0, 2, 0, 0, 0], "float32")) for found, got in measured]
    assert 0.2 < evaluator.summarize(shifted)["map"] < evaluator.summarize(shifted)["map_50"]
    assert evaluator.summarize([(labels[0].numpy()[:1], np.zeros([0, 6]))]) == {"map": 0.0, "map_50": 0.0}

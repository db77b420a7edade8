"""A single-stage, anchor-free object detector: FCOS on one feature map.

    launch/local.sh -np 2 --model=detector                                        scenes of digits, embedded
    launch/local.sh -np 2 --model=detector --dataset=COCO_FOLDER --image-size=256

Each cell of the feature map, of 8 by 8 pixels, says what class of object it sees and how far the sides of its box are.
Only the cells near an object's center learn it. There is no normalization over batches, so that ranks train what one
process trains.

Z. Tian et al., "FCOS: Fully convolutional one-stage object detection", 2019, https://arxiv.org/abs/1904.01355;
T.-Y. Lin et al., "Focal loss for dense object detection", 2017, https://arxiv.org/abs/1708.02002;
H. Rezatofighi et al., "Generalized intersection over union", 2019, https://arxiv.org/abs/1902.09630.
"""

import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from .boxes import average_precision, suppressed
from .recipe import Recipe

KIND = "boxes"
RECIPES = (
    Recipe(
        "digit_scenes",
        global_batch=32,
        optimizer="adam",
        learning_rate=2e-3,
        lr_schedule="cosine",
        epochs=10,
        metrics={"map_50": 0.9},
    ),
)

_STRIDE = 8  # pixels of a cell
_RADIUS = 1.5  # cells around an object's center that learn it
_RARE = 0.01  # share of cells that a new model takes for objects of a class
_ALPHA, _GAMMA = 0.25, 2.0  # of the focal loss
_SIDES = 4
_LEAST_SCORE, _MOST_BOXES = 0.02, 100  # of an image's detections


def build(input_shape: tuple[int, int, int], num_classes: int, width: int = 24) -> keras.Model:
    """Returns the model from pixels (0 to 255, [batch, height, width, channels]) to [batch, cells, 4 + num_classes].

    Of each cell, row by row: the distances in pixels from its center to the left, upper, right and lower side of a box,
    and a logit for each class.

    Args:
        input_shape: height and width, which are multiples of 8, and channels.
        num_classes: number of classes.
        width: filters of the first layer; deeper ones have two and four times as many.
    """
    image = layers.Input(input_shape)
    x = layers.Rescaling(1 / 127.5, offset=-1.0)(image)
    for filters in (width, 2 * width, 4 * width):
        x = _conv(_conv(x, filters, strides=2), filters)
    boxes = layers.Conv2D(_SIDES, 3, padding="same", bias_initializer="ones")(_conv(x, 2 * width))
    boxes = layers.Rescaling(float(_STRIDE))(layers.Activation("softplus", dtype="float32")(boxes))
    rare = keras.initializers.Constant(-math.log((1 - _RARE) / _RARE))
    classes = layers.Conv2D(num_classes, 3, padding="same", bias_initializer=rare, dtype="float32")(_conv(x, 4 * width))
    outputs = layers.Concatenate(dtype="float32")([boxes, classes])
    return keras.Model(image, layers.Reshape([-1, _SIDES + num_classes])(outputs), name="detector")


def _conv(x: keras.KerasTensor, filters: int, strides: int = 1) -> keras.KerasTensor:
    return layers.Conv2D(filters, 3, strides, padding="same", activation="relu", kernel_initializer="he_normal")(x)


def loss(input_shape: tuple[int, int, int]) -> keras.losses.Loss:
    """Returns the loss of the model for images of this shape."""
    return DetectionLoss(*input_shape[:2])


@keras.saving.register_keras_serializable("hvdkit_models")
class DetectionLoss(keras.losses.Loss):
    """Focal loss of all cells' classes, and generalized IoU loss of the boxes of cells that see an object.

    Both are divided by the number of such cells in the image. So the loss of a batch is the mean of its images' losses.

    Args:
        height: of the images, in pixels.
        width: of the images, in pixels.
        name: the loss's name.
        **options: those of `keras.losses.Loss`.
    """

    def __init__(self, height: int, width: int, name: str = "detection_loss", **options: Any) -> None:
        super().__init__(name=name, **options)
        self.height, self.width = height, width

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns a loss for each image.

        Args:
            y_true: [batch, boxes, 5]: left, upper, right and lower side in pixels, and class; class -1 for no box.
            y_pred: what the model returns.
        """
        centers = ops.convert_to_tensor(_centers(self.height, self.width))
        distances, logits = y_pred[..., :_SIDES], y_pred[..., _SIDES:]
        chosen, sees = _assigned(y_true, centers)
        number = ops.maximum(ops.sum(sees, axis=1), 1.0)
        classes = ops.cast(chosen[..., _SIDES], "int32")  # -1, without a box, is no class: a row of zeros
        wanted = ops.one_hot(classes, logits.shape[-1]) * sees[..., None]
        focal = ops.sum(_focal(wanted, logits), axis=[1, 2])
        outside = ops.sum(sees * (1 - _giou(chosen[..., :_SIDES], _boxes(distances, centers))), axis=1)
        return (focal + outside) / number

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "height": self.height, "width": self.width}


def _centers(height: int, width: int) -> np.ndarray:
    """Returns the centers of the cells, x and y in pixels: [cells, 2]."""
    if height % _STRIDE or width % _STRIDE:
        raise ValueError(f"images of {height}x{width} pixels; give multiples of {_STRIDE}, with --image-size")
    y, x = np.mgrid[0:height:_STRIDE, 0:width:_STRIDE]
    return np.stack([x, y], axis=-1).reshape(-1, 2).astype("float32") + _STRIDE / 2


def _assigned(y_true: Any, centers: Any) -> tuple[Any, Any]:
    """Returns the box of each cell [batch, cells, 5], and whether it has one [batch, cells]: the smallest around it."""
    boxes = y_true[:, None]  # [batch, 1, boxes, 5]
    x, y = centers[:, None, 0], centers[:, None, 1]
    left, upper, right, lower = (boxes[..., side] for side in range(_SIDES))
    inside = ops.minimum(ops.minimum(x - left, right - x), ops.minimum(y - upper, lower - y)) > 0
    off = ops.maximum(ops.abs(x - (left + right) / 2), ops.abs(y - (upper + lower) / 2))
    fits = ops.logical_and(inside, off < _RADIUS * _STRIDE)
    fits = ops.logical_and(fits, boxes[..., _SIDES] >= 0)
    area = ops.where(fits, (right - left) * (lower - upper), np.inf)
    best = ops.argmin(area, axis=-1)
    sees = ops.cast(ops.any(fits, axis=-1), "float32")
    return ops.take_along_axis(y_true, ops.cast(best, "int32")[..., None], axis=1), sees


def _boxes(distances: Any, centers: Any) -> Any:
    """Returns boxes by their sides, of distances from the centers of the cells."""
    return ops.concatenate([centers - distances[..., :2], centers + distances[..., 2:]], axis=-1)


def _focal(wanted: Any, logits: Any) -> Any:
    probability = ops.sigmoid(logits)
    missed = wanted * (1 - probability) + (1 - wanted) * probability
    weight = wanted * _ALPHA + (1 - wanted) * (1 - _ALPHA)
    entropy = ops.maximum(logits, 0.0) - logits * wanted + ops.log1p(ops.exp(-ops.abs(logits)))
    return weight * missed**_GAMMA * entropy


def _giou(one: Any, other: Any) -> Any:
    """Returns the generalized intersection over union of boxes by their sides, [..., 4]: from -1 to 1."""
    inner = ops.maximum(_sides(ops.maximum(one, other), ops.minimum(one, other)), 0.0)
    outer = _sides(ops.minimum(one, other), ops.maximum(one, other))
    both = ops.prod(inner, axis=-1)
    union = ops.prod(_sides(one, one), axis=-1) + ops.prod(_sides(other, other), axis=-1) - both
    hull = ops.prod(outer, axis=-1)
    return both / ops.maximum(union, 1e-7) - (hull - union) / ops.maximum(hull, 1e-7)


def _sides(start: Any, stop: Any) -> Any:
    """Returns widths and heights from the upper left corners of some boxes to the lower right ones of others."""
    return stop[..., 2:] - start[..., :2]


class Evaluator:
    """Mean average precision, as COCO defines it: of all images together, so that it is the same on any ranks.

    Raises:
        ImportError: pycocotools is not installed.
    """

    metrics = ("map", "map_50")

    def __init__(self) -> None:
        importlib.import_module("pycocotools.cocoeval")  # now, rather than at the end of a training

    def measure(self, images: Any, targets: Any, outputs: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields, for each image of a batch, its boxes [boxes, 5] and the detected ones [boxes, 6], with scores last.

        Args:
            images: a batch of images.
            targets: what the loss is given.
            outputs: what the model returns for the images.
        """
        centers = _centers(*images.shape[1:3])
        for boxes, output in zip(np.asarray(targets), np.asarray(outputs), strict=True):
            sides = np.concatenate([centers - output[:, :2], centers + output[:, 2:_SIDES]], axis=-1)
            scores = 1 / (1 + np.exp(-output[:, _SIDES:]))
            cells, classes = np.nonzero(scores >= _LEAST_SCORE)
            found = np.concatenate(
                [sides[cells], classes[:, None], scores[cells, classes][:, None]], axis=1, dtype="float32"
            )
            yield boxes[boxes[:, _SIDES] >= 0], suppressed(found)[:_MOST_BOXES]

    def summarize(self, measured: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        """Returns `map`, the mean over IoU thresholds from 0.5 to 0.95, and `map_50` at 0.5, from 0 to 1."""
        return average_precision(measured)

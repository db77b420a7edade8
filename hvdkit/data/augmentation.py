"""Augmentation of images by Keras' own layers, with random numbers that do not depend on who augments them.

What happens to an image is a function of (seed, epoch, example): the same on any number of ranks, and again when a run
resumes. Mixing takes a partner from the same local batch; it is a function of the batch's examples.
"""

from typing import Any

import keras
import tensorflow as tf

EACH = ("flip", "crop", "rand")
MIXING = ("mixup", "cutmix")
_CROP = 8  # the part of the height and the width by which `crop` pads on each side
_MIXED, _CHOSEN = 101, 102  # numbers that no layer has

Example = tuple[tf.Tensor, tf.Tensor, tf.Tensor]


class _Seeds(keras.random.SeedGenerator):
    """Gives a layer the seeds of one example: always the same ones for it."""

    def __init__(self) -> None:  # Keras' own makes a variable, which each draw would change
        self.name = "seeds"

    def begin(self, key: tf.Tensor) -> None:
        """Begins with the seeds that follow from a key."""
        self._key, self._drawn = key, 0

    def next(self, ordered: bool = True) -> tf.Tensor:
        """Returns the next seed."""
        self._drawn += 1
        return tf.random.experimental.stateless_fold_in(self._key, self._drawn)


class Augmentation:
    """Augments images in an input pipeline; all methods are graph functions.

    Args:
        names: of `EACH`, applied to each image in this order, and of `MIXING`, of which each batch gets one.
        shape: height, width and channels of an image.
        seed: the run's seed.
    """

    def __init__(self, names: tuple[str, ...], shape: tuple[int, ...], seed: int) -> None:
        self._seed = seed
        height, width, _ = shape
        self._margins = [(height + _CROP - 1) // _CROP, (width + _CROP - 1) // _CROP]
        made = {
            "flip": lambda: keras.layers.RandomFlip("horizontal", dtype="float32"),
            "crop": lambda: keras.layers.RandomCrop(height, width, dtype="float32"),
            "rand": lambda: keras.layers.RandAugment(value_range=(0, 255), dtype="float32"),
            "mixup": lambda: keras.layers.MixUp(dtype="float32"),
            "cutmix": lambda: keras.layers.CutMix(dtype="float32"),
        }
        self._seeds = _Seeds()
        self._layers = {name: layer() for name, layer in made.items() if name in names}
        for layer in self._layers.values():
            layer.generator = self._seeds
        self.mixes = any(name in MIXING for name in names)

    def key(self, epoch: Any, example: Any) -> tf.Tensor:
        """Returns the key of an example in an epoch, int32 [2].

        Args:
            epoch: its number, a scalar int64.
            example: the example's index in the split, a scalar int64; another number for each copy of it in the epoch.
        """
        key = tf.constant([self._seed % 2**31, self._seed >> 31], tf.int32)
        for number in (epoch, example):
            key = tf.random.experimental.stateless_fold_in(key, tf.cast(number, tf.int64))
        return key

    def image(self, image: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
        """Augments an image, [height, width, channels] of 0 to 255, into float32."""
        images = tf.cast(image, tf.float32)[tf.newaxis]
        for place, (name, layer) in enumerate(self._layers.items()):
            if name in MIXING:
                continue
            if name == "crop":
                (high, wide) = self._margins
                images = tf.pad(images, [[0, 0], [high, high], [wide, wide], [0, 0]])
            self._seeds.begin(tf.random.experimental.stateless_fold_in(key, place))
            images = layer.transform_images(images, layer.get_random_transformation(images))
        return tf.ensure_shape(images[0], image.shape)

    def mix(self, images: tf.Tensor, labels: tf.Tensor, keys: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Mixes a local batch, if it is to be mixed.

        Args:
            images: float32 [examples, height, width, channels].
            labels: probabilities of classes, float32 [examples, classes].
            keys: of the examples, int32 [examples, 2].
        """
        layers = [layer for name, layer in self._layers.items() if name in MIXING]
        if not layers:
            return images, labels
        key = tf.random.experimental.stateless_fold_in(keys[0], _MIXED)
        shape, classes = images.shape, labels.shape

        def mixed(layer: Any) -> tuple[tf.Tensor, tf.Tensor]:
            self._seeds.begin(key)
            change = layer.get_random_transformation(images)
            both = layer.transform_images(images, change), layer.transform_labels(labels, change)
            return tf.ensure_shape(both[0], shape), tf.ensure_shape(tf.cast(both[1], labels.dtype), classes)

        if len(layers) == 1:
            return mixed(layers[0])
        chance = tf.random.stateless_uniform([], tf.random.experimental.stateless_fold_in(keys[0], _CHOSEN))
        return tf.cond(chance < 0.5, lambda: mixed(layers[0]), lambda: mixed(layers[1]))

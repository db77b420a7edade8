"""Synthetic images that a model learns from. Needs NumPy alone: `hvdkit.bench` also runs it without hvdkit."""

import numpy as np

_STYLES = 16  # patterns of each class
_PATCH = 4  # pixels: height and width of a patch of one brightness
_MISLABELED = 0.1  # fraction of examples with a random label, so the loss and its gradients do not vanish


def images(
    shape: tuple[int, int, int], classes: int, examples: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images of some patterns per class, with noise, and their labels.

    As in images of digits, about half of the pixels of a pattern are 0. So a network keeps learning, and about as many
    of its gradients are 0 as with real images. From noise alone it learns nothing, and soon nearly all are 0.

    Args:
        shape: height, width and channels.
        classes: number of classes.
        examples: number of images.
        generator: selects patterns, labels and noise. The patterns are always the same.

    Returns:
        uint8 [examples, *shape] and int64 [examples].
    """
    of_pattern = generator.integers(classes * _STYLES, size=examples)
    found = np.empty([examples, *shape], np.uint8)
    for number in np.unique(of_pattern):
        places, pattern = np.flatnonzero(of_pattern == number), _pattern(shape, int(number))
        noise = generator.standard_normal([len(places), *shape], np.float32) * 48
        found[places] = np.clip(pattern + noise * (pattern > 0), 0, 255)
    mislabeled = generator.random(examples) < _MISLABELED
    return found, np.where(mislabeled, generator.integers(classes, size=examples), of_pattern % classes)


def _pattern(shape: tuple[int, int, int], number: int) -> np.ndarray:
    height, width, channels = shape
    patches = np.random.default_rng(number).normal(0, 96, [-(-height // _PATCH), -(-width // _PATCH), channels])
    return patches.repeat(_PATCH, axis=0).repeat(_PATCH, axis=1)[:height, :width].astype(np.float32)

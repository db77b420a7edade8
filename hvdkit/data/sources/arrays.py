"""Sources in memory: scikit-learn's digits and breast cancer, synthetic images, and rows of a table."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.sources.schema import CLASSIFICATION
from hvdkit.data.sources.synthetic import images
from hvdkit.errors import UsageError

_HELD_OUT = 0.2  # fraction of the examples to use as the test split if a source has none


class ArraySource:
    """Examples in NumPy arrays; see `Source` for the attributes.

    Args:
        name: the name that the user gave.
        kind: `image`, `text` or `features`.
        label_names: a name for each class, label or measured value.
        splits: inputs (uint8 images, strings, or float32 features) and labels of each split.
        task: what the labels are; see `Schema`.
        feature_names: for `features`, a name for each number of a vector.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        label_names: list[str],
        splits: dict[str, tuple[np.ndarray, np.ndarray]],
        *,
        task: str = CLASSIFICATION,
        feature_names: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.kind = kind
        self.task = task
        self.label_names = label_names
        self.feature_names = list(feature_names)
        self.splits = tuple(splits)
        self.shape = splits["train"][0].shape[1:] if kind in ("image", "features") else None
        self._splits = splits

    def size(self, split: str) -> int:
        """Number of examples in a split."""
        return len(self._splits[split][1])

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split."""
        inputs, labels = self._splits[split]
        dtype = np.int64 if self.task == CLASSIFICATION else np.float32
        return tf.data.Dataset.from_tensor_slices((inputs[start:stop], labels[start:stop].astype(dtype)))

    def locate(self, split: str, index: int) -> str:
        """The index of an example."""
        return f"example {index}"

    def decode(self, encoded: Any) -> tf.Tensor:
        """Returns its input: nothing is encoded."""
        return encoded


def load_digits() -> ArraySource:
    """Loads the 1,797 handwritten digits (8×8, 10 classes) that come with scikit-learn; 20 % are the test split.

    Source: E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998; pixel values
    0 to 16 are scaled to 0 to 255.
    """
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return ArraySource("digits", "image", [str(d) for d in range(10)], hold_out(pixels, labels))


def load_breast_cancer() -> ArraySource:
    """Loads 569 tumors with 30 measurements each, benign or malignant, that come with scikit-learn; 20 % are for tests.

    Source: W. H. Wolberg, O. L. Mangasarian and W. N. Street, "Breast cancer Wisconsin (diagnostic)", UCI repository,
    1995.
    """
    from sklearn.datasets import load_breast_cancer as load

    found = load()
    splits = hold_out(found.data.astype(np.float32), found.target)
    names = [str(name) for name in found.feature_names]
    return ArraySource("breast_cancer", "features", [str(n) for n in found.target_names], splits, feature_names=names)


def synthetic(spec: str) -> ArraySource:
    """Makes synthetic images (see `images`). The test split is a fifth as large.

    Args:
        spec: `synthetic:HxWxC:CLASSES:EXAMPLES`. You may omit parts from the end; they default to 28x28x1, 10 and 4096.
    """
    match = re.fullmatch(r"synthetic(?::(\d+)x(\d+)x(\d+))?(?::(\d+))?(?::(\d+))?", spec)
    if not match or "0" in match.groups():
        raise UsageError(
            f"The data set {spec!r} is not of the form synthetic:HEIGHTxWIDTHxCHANNELS:CLASSES:EXAMPLES, "
            f"for example synthetic:224x224x3:1000:512."
        )
    height, width, channels, classes, examples = (
        int(given or default) for given, default in zip(match.groups(), (28, 28, 1, 10, 4096), strict=True)
    )
    generator = np.random.default_rng(0)
    splits = {
        split: images((height, width, channels), classes, count, generator)
        for split, count in (("train", examples), ("test", max(1, examples // 5)))
    }
    return ArraySource(spec, "image", [str(c) for c in range(classes)], splits)


def hold_out(inputs: np.ndarray, labels: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Splits examples into `train` and `test`, always in the same way, stratified by class if possible.

    Args:
        inputs: inputs of any kind, or the indices of examples, [examples, ...].
        labels: integer classes [examples], or labels of another kind [examples, ...].

    Raises:
        UsageError: there are fewer than two examples.
    """
    if len(labels) < 2:
        raise UsageError(f"{len(labels)} example(s) cannot be split into a train and a test part. Give more.")
    from sklearn.model_selection import train_test_split

    places = np.arange(len(labels))
    train, test = train_test_split(
        places, test_size=_HELD_OUT, random_state=0, shuffle=True, stratify=labels if _stratifies(labels) else None
    )
    return {"train": (inputs[train], labels[train]), "test": (inputs[test], labels[test])}


def _stratifies(labels: np.ndarray) -> bool:
    """Returns whether each class can be in both splits."""
    if labels.ndim > 1 or labels.dtype.kind not in "iu":
        return False
    counts = np.bincount(labels)
    return bool(counts[counts > 0].min() >= 2 and len(labels) * _HELD_OUT >= (counts > 0).sum())

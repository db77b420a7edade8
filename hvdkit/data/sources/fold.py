"""Cross-validation: one fold of a source's training examples becomes the test split, the others the train split."""

from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.sources.base import Source
from hvdkit.errors import UsageError


class FoldSource:
    """A source whose test split is one fold of another source's training examples, and whose train split is the rest.

    The folds are disjoint, cover all training examples, and are the same in every run. Of each `folds` neighbours in
    the source's order, every fold gets one at random. So the sizes of the folds differ by at most one, and examples of
    a class that stand together are spread evenly, even if the order is periodic. The source's own test split is never
    read: a choice that you make with these folds cannot depend on it. See `Source` for the attributes.

    Args:
        source: the source whose training examples are divided.
        fold: index of the fold to test on, from 0.
        folds: number of folds, at least 2.

    Raises:
        UsageError: there are fewer examples than folds.
    """

    def __init__(self, source: Source, fold: int, folds: int) -> None:
        size = source.size("train")
        if size < folds:
            raise UsageError(
                f"{source.name} has {size} training examples, fewer than {folds} folds. Use fewer folds: "
                f"--fold={min(fold, size - 1)}/{size}."
            )
        self.name = source.name
        self.kind = source.kind
        self.label_names = source.label_names
        self.shape = source.shape
        self._source = source
        held_out = assign(size, folds) == fold
        self._places = {"train": np.flatnonzero(~held_out), "test": np.flatnonzero(held_out)}

    def size(self, split: str) -> int:
        """Number of examples in split `train` or `test`."""
        return len(self._places[split])

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split, in the source's order; skips the others without decoding them."""
        mine = self._places[split][start:stop]
        first, last = (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)
        wanted = np.zeros(last - first, bool)
        wanted[mine - first] = True
        stream = self._source.read("train", first, last).enumerate()
        return stream.filter(lambda place, _: tf.gather(wanted, place)).map(lambda _, example: example)

    def locate(self, split: str, index: int) -> str:
        """What the source calls an example."""
        return self._source.locate("train", int(self._places[split][index]))

    def decode(self, encoded: Any) -> tf.Tensor:
        """Decodes an input as the source does."""
        return self._source.decode(encoded)


def assign(size: int, folds: int) -> np.ndarray:
    """Returns the fold of each of `size` examples, int64 [size]; of each `folds` neighbours, every fold gets one."""
    blocks = np.tile(np.arange(folds), (-(-size // folds), 1))
    return np.random.default_rng(0).permuted(blocks, axis=1).reshape(-1)[:size]

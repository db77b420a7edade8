"""Cross-validation: one fold of a source's training examples becomes its test split, the others stay to train on."""

from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.sources.base import Source
from hvdkit.errors import UsageError


class FoldSource:
    """A source that trains on all but one fold of another's training examples, and tests on that fold.

    The folds are disjoint, hold all training examples together, and are the same at every run: of each `folds`
    neighbours in the source's order every fold gets one, by lot. So their sizes differ by one at most, classes that lie
    together are spread evenly, and an order that repeats itself does no harm. The source's own test split is not read:
    it stays unseen by what is chosen with these folds. See `Source` for the attributes.

    Args:
        source: whose training examples are divided.
        fold: the fold to test on, from 0.
        folds: how many there are, at least 2.

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
        """Examples `start` to `stop` of a split, in the source's order; what lies between is passed over undecoded."""
        mine = self._places[split][start:stop]
        first, last = (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)
        wanted = np.zeros(last - first, bool)
        wanted[mine - first] = True
        stream = self._source.read("train", first, last).enumerate()
        return stream.filter(lambda place, _: tf.gather(wanted, place)).map(lambda _, example: example)

    def decode(self, encoded: Any) -> tf.Tensor:
        """As the source does."""
        return self._source.decode(encoded)


def assign(size: int, folds: int) -> np.ndarray:
    """The fold of each of `size` examples, int64 [size]: each `folds` neighbours are dealt out to all folds."""
    blocks = np.tile(np.arange(folds), (-(-size // folds), 1))
    return np.random.default_rng(0).permuted(blocks, axis=1).reshape(-1)[:size]

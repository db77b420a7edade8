"""Chosen training examples of a source: a fold, a share that is held out to choose models by, or a long tail."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.sources.base import Parted, Source, edges_of
from hvdkit.data.sources.tokens import TokenSource
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)


class Selection:
    """A source whose splits are chosen examples of another source; see `Source` for the attributes.

    Args:
        source: the other source.
        places: for each split, the split of the source that it is taken from, and the indices of its examples there,
            ascending; None for all.
    """

    def __init__(self, source: Source, places: Mapping[str, tuple[str, np.ndarray | None]]) -> None:
        self.name = source.name
        self.kind = source.kind
        self.task = source.task
        self.label_names = source.label_names
        self.feature_names = source.feature_names
        self.shape = source.shape
        self.splits = tuple(places)
        self._source = source
        self._places = places

    def size(self, split: str) -> int:
        """Number of examples in a split."""
        origin, places = self._places[split]
        return self._source.size(origin) if places is None else len(places)

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split, in the source's order; skips the others without decoding them."""
        origin, places = self._places[split]
        if places is None:
            return self._source.read(origin, start, stop)
        mine = places[start:stop]
        first, last = (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)
        wanted = np.zeros(last - first, bool)
        wanted[mine - first] = True
        stream = self._source.read(origin, first, last).enumerate()
        return stream.filter(lambda place, _: tf.gather(wanted, place)).map(lambda _, example: example)

    def edges(self, split: str) -> np.ndarray | None:
        """Edges of the parts of a split, if the source has parts: a part has those of its examples that are chosen."""
        origin, places = self._places[split]
        edges = edges_of(self._source, origin)
        return edges if edges is None or places is None else np.searchsorted(places, edges)

    def read_part(self, split: str, part: tf.Tensor) -> tf.data.Dataset:
        """The chosen examples of a part of the source."""
        parted: Parted = self._source  # type: ignore[assignment]
        origin, places = self._places[split]
        examples = parted.read_part(origin, part)
        if places is None:
            return examples
        wanted = np.zeros(self._source.size(origin), bool)
        wanted[places] = True
        first = tf.gather(parted.edges(origin), part)
        chosen = examples.enumerate().filter(lambda place, _: tf.gather(wanted, first + place))
        return chosen.map(lambda _, example: example)

    def locate(self, split: str, index: int) -> str:
        """What the source calls an example."""
        origin, places = self._places[split]
        return self._source.locate(origin, index if places is None else int(places[index]))

    def decode(self, encoded: Any) -> tf.Tensor:
        """Decodes an input as the source does."""
        return self._source.decode(encoded)


class FoldSource(Selection):
    """A source whose test split is one fold of another source's training examples, and whose train split is the rest.

    The folds are disjoint, cover all training examples, and are the same in every run. Of each `folds` neighbours in
    the source's order, every fold gets one at random. So the sizes of the folds differ by at most one, and examples of
    a class that stand together are spread evenly, even if the order is periodic. The source's own test split is never
    read: a choice that you make with these folds cannot depend on it.

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
        held_out = assign(size, folds) == fold
        places = {"train": ("train", np.flatnonzero(~held_out)), "test": ("train", np.flatnonzero(held_out))}
        super().__init__(source, places)


def with_validation(source: Source, share: float | None) -> Source:
    """Returns a source with a validation split, on which models are compared: the test split is for the end.

    Args:
        source: the source.
        share: the share of the training examples to hold out, the same ones in every run: of a text its end, otherwise
            examples that are spread evenly over the source's order. None for the source's own validation split or, if
            it has none, for a tenth.

    Raises:
        UsageError: there are too few training examples.
    """
    if share is None and "validation" in source.splits:
        return source
    if "validation" in source.splits:
        _log.info("%s: its own validation split is left out, since --validation=%g was given", source.name, share)
    share = 0.1 if share is None else share
    if isinstance(source, TokenSource):
        return source.hold_out(share)
    size = source.size("train")
    held_out = spread(size, round(size * share))
    if not 0 < len(held_out) < size:
        raise UsageError(
            f"{source.name} has {size} training examples, too few to hold out a share of {share:g}. Give more, or a "
            f"larger --validation=SHARE, or --validation=no."
        )
    rest = np.setdiff1d(np.arange(size), held_out, assume_unique=True)
    return Selection(source, {"train": ("train", rest), "validation": ("train", held_out), "test": ("test", None)})


def long_tailed(source: Source, labels: np.ndarray, ratio: float) -> Source:
    """Returns a source whose training examples are fewer in each class than in the one before, exponentially.

    Of C classes, class c keeps `n * ratio ** (-c / (C - 1))` examples, where n is the size of the smallest class, so
    that classes that differed before do not change the ratio. They are the same ones in every run, and spread evenly
    over the source's order.

    Y. Cui, M. Jia, T.-Y. Lin, Y. Song, S. Belongie, "Class-Balanced Loss Based on Effective Number of Samples", 2019,
    section 5.1.

    Args:
        source: a source with two classes or more; its other splits stay as they are.
        labels: the classes of its training examples, int64 [examples].
        ratio: how many times as many examples the first class has as the last one.

    Raises:
        UsageError: the last class would have no example.
    """
    classes = len(source.label_names)
    smallest = int(np.bincount(labels, minlength=classes).min())
    numbers = np.round(smallest * ratio ** -np.linspace(0, 1, classes)).astype(int)
    if numbers[-1] < 1:
        raise UsageError(
            f"--long-tail={ratio:g} would leave no training example of the last class: {source.name} has {smallest} of "
            f"its smallest class. Use at most --long-tail={max(1, smallest)}, or leave it out."
        )
    kept = [np.flatnonzero(labels == c) for c in range(classes)]
    kept = [places[spread(len(places), number)] for places, number in zip(kept, numbers, strict=True)]
    rest = {split: (split, None) for split in source.splits if split != "train"}
    return Selection(source, {"train": ("train", np.sort(np.concatenate(kept))), **rest})


def assign(size: int, folds: int) -> np.ndarray:
    """Returns the fold of each of `size` examples, int64 [size]; of each `folds` neighbours, every fold gets one."""
    blocks = np.tile(np.arange(folds), (-(-size // folds), 1))
    return np.random.default_rng(0).permuted(blocks, axis=1).reshape(-1)[:size]


def spread(size: int, number: int) -> np.ndarray:
    """Returns `number` of `size` indices, ascending, int64: a random one of each of `number` even ranges."""
    edges = size * np.arange(number + 1) // max(1, number)
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])

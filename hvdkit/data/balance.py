"""Imbalanced classes: how many examples each has, weights against it, and sampling against it."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

MODES = ("none", "over", "under")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How often an example of each class is drawn in an epoch.

    Attributes:
        mode: `none`, each example once; `over`, examples of small classes are drawn again until all classes are as
            large as the largest; `under`, large classes are cut to the size of the smallest, by another draw an epoch.
        counts: examples of each class in the whole split, int64 [classes].
    """

    mode: str
    counts: np.ndarray

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"sampling must be one of {', '.join(MODES)}, but is {self.mode!r}.")

    def target(self, counts: np.ndarray) -> int:
        """Examples that every class has after sampling, given how many it had before."""
        there = counts[counts > 0]
        return int(there.max() if self.mode == "over" else there.min())

    def size(self, counts: np.ndarray) -> int:
        """Examples an epoch, for a share with these class counts."""
        return int(counts.sum()) if self.mode == "none" else self.target(counts) * int((counts > 0).sum())

    def order(self, labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The places of a share's examples in the order in which an epoch sees them, int64."""
        if self.mode == "none":
            return generator.permutation(len(labels))
        target = self.target(np.bincount(labels))
        drawn = [_draw(np.flatnonzero(labels == c), target, generator) for c in np.unique(labels)]
        return generator.permutation(np.concatenate(drawn))

    def resample(self, examples: tf.data.Dataset, seed: Any) -> tf.data.Dataset:
        """The same for a stream: each example is repeated `target / count` times, on average."""
        if self.mode == "none":
            return examples
        ratio = tf.constant(self.target(self.counts) / np.maximum(self.counts, 1), tf.float32)

        def repeat(place: tf.Tensor, example: tuple[tf.Tensor, tf.Tensor]) -> tf.data.Dataset:
            chance = tf.random.stateless_uniform([], seed=tf.stack([tf.cast(seed, tf.int64), place]))
            times = tf.floor(tf.gather(ratio, example[1]) + chance)
            return tf.data.Dataset.from_tensors(example).repeat(tf.cast(times, tf.int64))

        return examples.enumerate().flat_map(repeat)


def class_weights(counts: np.ndarray) -> np.ndarray:
    """Weights that make every class count alike: `examples / (classes * count)`, float64 [classes].

    The heuristic of G. King and L. Zeng, "Logistic regression in rare events data", 2001, as in scikit-learn's
    `class_weight="balanced"`. A class without examples gets 0.
    """
    present = counts > 0
    return np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 0.0)


def describe(counts: np.ndarray, names: list[str], most: int = 12) -> str:
    """The class counts in a line, the rarest and the most frequent where there are many."""
    order = np.argsort(counts, kind="stable")
    shown = order if len(order) <= most else np.concatenate([order[: most // 2], order[-most // 2 :]])
    parts = [f"{names[c]} {counts[c]:,}" for c in sorted(shown)]
    return ", ".join(parts) + (
        "" if len(order) <= most else f" (of {len(order)} classes, the rarest and most frequent)"
    )


def _draw(places: np.ndarray, target: int, generator: np.random.Generator) -> np.ndarray:
    """`target` places: all of them as often as possible, and a random choice, without repetition, of the rest."""
    whole, rest = divmod(target, len(places))
    return np.concatenate([np.tile(places, whole), generator.permutation(places)[:rest]])

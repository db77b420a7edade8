"""Imbalanced classes: count the examples of each class, weight the loss, or resample."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

MODES = ("none", "over", "under")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How often an epoch draws an example of each class.

    Attributes:
        mode: `none`: each example once. `over`: examples of small classes repeat until every class is as large as the
            largest. `under`: large classes are cut to the size of the smallest, with a new draw in each epoch.
        counts: number of examples per class in the full split, int64 [classes].
    """

    mode: str
    counts: np.ndarray

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"sampling must be one of {', '.join(MODES)}, but is {self.mode!r}.")

    def target(self, counts: np.ndarray) -> int:
        """Returns the number of examples per class after sampling, given the counts before."""
        there = counts[counts > 0]
        return int(there.max() if self.mode == "over" else there.min())

    def size(self, counts: np.ndarray) -> int:
        """Returns the number of examples per epoch for a shard with these class counts."""
        return int(counts.sum()) if self.mode == "none" else self.target(counts) * int((counts > 0).sum())

    def order(self, labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Returns the indices of a shard's examples in the order of one epoch, int64."""
        if self.mode == "none":
            return generator.permutation(len(labels))
        target = self.target(np.bincount(labels))
        drawn = [_draw(np.flatnonzero(labels == c), target, generator) for c in np.unique(labels)]
        return generator.permutation(np.concatenate(drawn))

    def resample(self, examples: tf.data.Dataset, seed: Any, numbered: int = 0) -> tf.data.Dataset:
        """Resamples a stream: repeats each example `target / count` times on average.

        Args:
            examples: pairs of an input and a label; if numbered, the input is a pair, too, that begins with a number.
            seed: decides which examples are drawn.
            numbered: what to add to the number for each further copy of an example; 0 if there are no numbers.
        """
        if self.mode == "none":
            return examples
        ratio = tf.constant(self.target(self.counts) / np.maximum(self.counts, 1), tf.float32)

        def repeat(place: tf.Tensor, example: tuple[tf.Tensor, tf.Tensor]) -> tf.data.Dataset:
            chance = tf.random.stateless_uniform([], seed=tf.stack([tf.cast(seed, tf.int64), place]))
            times = tf.floor(tf.gather(ratio, example[1]) + chance)
            copies = tf.data.Dataset.from_tensors(example).repeat(tf.cast(times, tf.int64))
            return copies.enumerate().map(_with_own_number) if numbered else copies

        def _with_own_number(copy: tf.Tensor, example: Any) -> Any:
            (number, encoded), label = example
            return (number + copy * numbered, encoded), label

        return examples.enumerate().flat_map(repeat)


def class_weights(counts: np.ndarray) -> np.ndarray:
    """Returns weights that give every class equal total weight: `examples / (classes * count)`, float64 [classes].

    The heuristic of G. King and L. Zeng, "Logistic regression in rare events data", 2001, as in scikit-learn's
    `class_weight="balanced"`. A class without examples gets 0.
    """
    present = counts > 0
    return np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 0.0)


def effective_weights(counts: np.ndarray, beta: float) -> np.ndarray:
    """Returns class weights by the effective number of examples, `(1 - beta) / (1 - beta ** count)`, float64 [classes].

    They are scaled so that an example has the weight 1 on average. A class without examples gets 0. With beta 0 all
    classes weigh alike; near 1 they approach `class_weights`.

    Y. Cui, M. Jia, T.-Y. Lin, Y. Song, S. Belongie, "Class-Balanced Loss Based on Effective Number of Samples", 2019,
    equation (2).
    """
    present = counts > 0
    weights = np.where(present, (1 - beta) / (1 - np.power(beta, np.maximum(counts, 1))), 0.0)
    return weights * counts.sum() / (weights * counts).sum()


def describe(counts: np.ndarray, names: list[str], most: int = 12) -> str:
    """Returns the class counts in one line; with more than `most` classes, only the rarest and the most frequent."""
    order = np.argsort(counts, kind="stable")
    shown = order if len(order) <= most else np.concatenate([order[: most // 2], order[-most // 2 :]])
    parts = [f"{names[c]} {counts[c]:,}" for c in sorted(shown)]
    return ", ".join(parts) + (
        "" if len(order) <= most else f" (of {len(order)} classes, the rarest and most frequent)"
    )


def _draw(places: np.ndarray, target: int, generator: np.random.Generator) -> np.ndarray:
    """Returns `target` indices: each one equally often, and the remainder at random without repetition."""
    whole, rest = divmod(target, len(places))
    return np.concatenate([np.tile(places, whole), generator.permutation(places)[:rest]])

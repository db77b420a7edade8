"""Means and variances of data that do not fit into memory, or that several ranks divide."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from hvdkit.errors import UsageError


class Moments:
    """Count, mean and sum of squared deviations of some values, float64, which can be added to those of others.

    T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979, equation (2.1).
    """

    def __init__(self, count: int = 0, mean: Any = 0.0, deviations: Any = 0.0) -> None:
        self.count, self.mean, self.deviations = count, mean, deviations

    @classmethod
    def of(cls, values: np.ndarray, axes: tuple[int, ...]) -> "Moments":
        """Returns the moments over some axes; without any, each value is one of a mean over batches, as in Keras."""
        values = values.astype(np.float64)
        mean = values.mean(axis=axes, keepdims=True)
        deviations = np.square(values - mean).sum(axis=axes)
        return cls(int(np.prod([values.shape[axis] for axis in axes])), mean.squeeze(axis=axes), deviations)

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        if np.shape(self.mean) != np.shape(other.mean):
            raise UsageError(f"Batches of one shape are needed, but there are {_shapes(self)} and {_shapes(other)}.")
        apart = other.mean - self.mean
        deviations = self.deviations + other.deviations + np.square(apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), deviations)


def standardization(moments: Iterable[Moments]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the variance of each number in vectors, as a `keras.layers.Normalization` takes them.

    A number that is always the same gets the variance 1, so that another value of it does no harm later.

    Args:
        moments: those of batches of vectors, in order.
    """
    total = sum(moments, Moments())
    variance = np.asarray(total.deviations / total.count)
    constant = variance <= np.square(np.finfo(np.float32).eps * np.asarray(total.mean))
    return tuple(total.mean.tolist()), tuple(np.where(constant, 1.0, variance).tolist())


def _shapes(moments: Moments) -> str:
    return f"some whose statistics have shape {np.shape(moments.mean)}"

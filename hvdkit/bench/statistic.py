"""Statistics of repeated measurements on a noisy machine."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

NOISY = 0.25  # interquartile range divided by the median, above which a result is unreliable


def median_and_quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the lower and the upper quartile."""
    low, middle, high = np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)


def is_noisy(values: Sequence[float]) -> bool:
    """Return whether the interquartile range exceeds `NOISY` times the median."""
    middle, low, high = median_and_quartiles(values)
    return bool((high - low) > NOISY * abs(middle))


def confidence_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return a percentile bootstrap interval of the median (B. Efron, 1979); minimum and maximum below three values."""
    if len(values) < 3:
        return min(values), max(values)
    found = stats.bootstrap(
        (np.asarray(values, float),),
        np.median,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Summarize the ratios of paired measurements, each pair taken back to back so that noise affects both alike."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "median": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "noisy": is_noisy(ratios),
    }

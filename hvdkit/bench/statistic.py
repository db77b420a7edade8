"""What may be concluded from repeated measurements on a machine that is never quiet."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

NOISY = 0.25  # spread over median from which on a result says nothing


def median_and_quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, middle, high = np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)


def is_noisy(values: Sequence[float]) -> bool:
    """Whether the values lie too far apart: half of them beyond a quarter of the median."""
    middle, low, high = median_and_quartiles(values)
    return bool((high - low) > NOISY * abs(middle))


def confidence_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Of the median, by the bootstrap (percentiles; B. Efron, 1979); the extremes where there are fewer than three."""
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
    """Of measurements that were taken in pairs, one after the other: what the machine did at that time hits both."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "median": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "noisy": is_noisy(ratios),
    }

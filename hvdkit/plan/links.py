"""Fit a link's α, β and γ (see `cost`) to measured collectives."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdkit.errors import UsageError
from hvdkit.plan.cost import Link

_UNITS = {"bit/s": 1 / 8, "byte/s": 1.0}
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


def read(path: str) -> tuple[Link, dict[str, Any]]:
    """Read the file that `hvdkit.bench collectives --json` wrote; return the link and its relative deviations.

    Raises:
        UsageError: the file is missing or has another form.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text())
        rows = [row for row in content["rows"] if row["operation"] == "allreduce"]
        shared = [row for row in content["rows"] if row["operation"] == "shared_allreduce"]
        gathered = [] if shared else [row for row in content["rows"] if row["operation"] == "allgather"]
        return fit(shared or rows, content["ranks"], is_memory=bool(shared), gathered=gathered)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} does not hold measured exchanges ({error}). Make it with: python -m hvdkit.bench collectives "
            f"--json {path}"
        ) from None


def fit(
    rows: Sequence[dict[str, Any]],
    ranks: int,
    *,
    is_memory: bool = False,
    gathered: Sequence[dict[str, Any]] = (),
) -> tuple[Link, dict[str, float]]:
    """Fit the seconds per byte to the two largest sizes, and the fixed cost to the smallest.

    A least-squares fit over all sizes would be wrong: traffic shapers of slow links let the first kilobytes pass, so
    medium sizes look cheaper than they are in a long transfer.

    A ring allreduce of N ranks takes γ ⌈log2 N⌉ + 2 (N - 1) α + 2 (N - 1)/N n β seconds. One number of ranks does not
    determine both α and γ. The fit therefore attributes 1 % of the fixed cost to messages (α) and the rest to
    negotiation (γ). Shared memory needs no negotiation.

    Args:
        rows: allreduce measurements with `bytes`, `seconds` and `quartiles`, of at least two sizes.
        ranks: N.
        is_memory: whether ranks communicate through shared memory.
        gathered: the same for allgathers, if measured.

    Returns:
        The link, and its relative deviations `start` and `byte`.

    Raises:
        ValueError: there are fewer than two sizes or two ranks.
    """
    if len({row["bytes"] for row in rows}) < 2 or ranks < 2:
        raise ValueError("two ranks and two sizes at least are needed")
    start, byte = _line(rows)
    spread = [(row["quartiles"][1] - row["quartiles"][0]) / 1.349 / row["seconds"] for row in rows]
    deviation = float(np.clip(np.median(spread), 0.01, 1.0))
    messages = start if is_memory else 0.01 * start
    link = Link(
        latency=messages / (2 * (ranks - 1)),
        byte_seconds=byte * ranks / (2 * (ranks - 1)),
        agreeing=(start - messages) / int(np.ceil(np.log2(ranks))),
        gather_byte_seconds=_line(gathered)[1] / (ranks - 1) if len({row["bytes"] for row in gathered}) > 1 else 0.0,
    )
    return link, {"start": deviation, "byte": deviation}


def _line(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the seconds of an empty message, and the seconds per byte."""
    *_, (small, before), (large, longest) = ordered = sorted((row["bytes"], row["seconds"]) for row in rows)
    byte = (longest - before) / (large - small)
    if byte <= 0:  # noise
        byte = longest / large
    least, shortest = ordered[0]
    return max(shortest - least * byte, shortest / 10), byte


def given(latency: str, bandwidth: str, agreeing: str) -> Link:
    """Create a link from flags such as `50us` and `10Gbit/s`.

    Raises:
        UsageError: a value cannot be parsed.
    """
    return Link(_parse_seconds(latency), 1 / _parse_rate(bandwidth), _parse_seconds(agreeing))


def _parse_seconds(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)(s|ms|us|µs)", text)
    if not match:
        raise UsageError(f"{text!r} is no time. The form is a number and s, ms or us, as in 50us.")
    return float(match[1]) * _SECONDS[match[2]]


def _parse_rate(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)([kmg]?)(bit/s|byte/s|bit)", text.lower())
    if not match or not float(match[1]):
        raise UsageError(f"{text!r} is no bandwidth. The form is a number and a unit, as in 10Gbit/s or 1.2Gbyte/s.")
    return float(match[1]) * _PREFIXES[match[2]] * _UNITS[match[3].removesuffix("/s") + "/s"]

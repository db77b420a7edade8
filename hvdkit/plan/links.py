"""From measured exchanges to a link's α, β and γ."""

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
    """The link of a file that `hvdkit.bench collectives --json` wrote, and how sure it is.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text())
        rows = [row for row in content["rows"] if row["operation"] == "allreduce"]
        shared = [row for row in content["rows"] if row["operation"] == "shared_allreduce"]
        return fit(shared or rows, content["ranks"], is_memory=bool(shared))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} does not hold measured exchanges ({error}). Make it with: python -m hvdkit.bench collectives "
            f"--json {path}"
        ) from None


def fit(rows: Sequence[dict[str, Any]], ranks: int, *, is_memory: bool = False) -> tuple[Link, dict[str, float]]:
    """Least squares on seconds by bytes, each size weighing alike (errors are shares of the time).

    Seconds of a ring of N ranks are γ ⌈log2 N⌉ + 2 (N - 1) α + 2 (N - 1)/N n β. One number of ranks does not tell α
    from γ: a hundredth of the sum is taken for messages, the rest for agreeing; in memory there is no agreeing.

    Args:
        rows: with `bytes`, `seconds` and `quartiles`, of one operation; two sizes at least.
        ranks: N.
        is_memory: whether the ranks exchange through shared memory.

    Returns:
        The link, and the deviations of its numbers as shares of them: `start` and `byte`.

    Raises:
        ValueError: there are fewer than two sizes, or ranks.
    """
    sizes = np.array([row["bytes"] for row in rows], float)
    seconds = np.array([row["seconds"] for row in rows], float)
    if len(set(sizes)) < 2 or ranks < 2:
        raise ValueError("two ranks and two sizes at least are needed")
    design = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, np.newaxis]
    (start, byte), *_ = np.linalg.lstsq(design, np.ones_like(seconds), rcond=None)
    start, byte = max(start, float(seconds.min()) / 10), max(byte, 1e-15)
    spread = np.array([(row["quartiles"][1] - row["quartiles"][0]) / 1.349 / row["seconds"] for row in rows])
    deviation = float(np.clip(np.median(spread), 0.01, 1.0))
    byte_seconds = byte * ranks / (2 * (ranks - 1))
    depth = int(np.ceil(np.log2(ranks)))
    messages = start if is_memory else 0.01 * start
    link = Link(messages / (2 * (ranks - 1)), byte_seconds, (start - messages) / depth)
    return link, {"start": deviation, "byte": deviation}


def given(latency: str, bandwidth: str, agreeing: str) -> Link:
    """The link of flags such as `50us` and `10Gbit/s`.

    Raises:
        UsageError: a value is not understood.
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

"""Measure links with the transport that gradients use, and fit a link's α, β and γ (see `cost`) to the measurements."""

import itertools
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdkit.bench import jobs
from hvdkit.errors import UsageError
from hvdkit.plan.cost import Link, barriers, is_divided

_UNITS = {"bit/s": 1 / 8, "byte/s": 1.0}
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_LONG = 1 << 16  # bytes from which a transfer over sockets is long
_SAVED = 0.2  # fraction of the time in which bytes move; below it, a faster transfer after a pause is noise


def measure(launcher: Sequence[str], seconds: float) -> dict[str, Any]:
    """Measure the collectives that training uses on these hosts, and return what `hvdkit.bench collectives` writes.

    Args:
        launcher: arguments of hvdkit.launch.
        seconds: duration of the measurement of each size.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "links.json")
        program = [sys.executable, "-m", "hvdkit.bench.collectives_rank", str(result), "training", str(seconds)]
        jobs.run([sys.executable, "-m", "hvdkit.launch", *launcher, "--", *program])
        return dict(json.loads(result.read_text()))


def read(path: str, which: str = "between") -> tuple[Link, dict[str, Any]]:
    """Read the file that `bench collectives --json` or `plan measure --json` wrote.

    Args:
        path: the file.
        which: the link to take from a file that holds two: "between" hosts or "inside" a host.

    Returns:
        The link and its relative deviations.

    Raises:
        UsageError: the file is missing or has another form.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text())
        return from_measurement(content["links"][which] if "links" in content else content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} does not hold measured exchanges ({error}). Make it with: python -m hvdkit.bench collectives "
            f"--json {path}"
        ) from None


def from_measurement(content: dict[str, Any]) -> tuple[Link, dict[str, float]]:
    """Fit a link to measured collectives: those of the transport that the job used for gradients.

    Args:
        content: what `measure` returns.

    Raises:
        ValueError: the measurement does not determine the link.
        KeyError: something is missing.
    """
    by_operation: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        by_operation.setdefault(row["operation"], []).append(row)
    transport = next((key for key in ("shared", "sockets") if f"{key}_allreduce" in by_operation), "horovod")
    if content.get("hosts", 1) > 1 and content.get("local_size", 1) > 1:
        raise ValueError("hosts had several ranks; measure the link with one rank on each host, as in -H h1:1,h2:1")
    own = "" if transport == "horovod" else f"{transport}_"
    return fit(
        by_operation[f"{own}allreduce"],
        content["ranks"],
        transport=transport,
        gathered=by_operation.get(f"{own}allgather", ()),
        negotiated=by_operation.get("allreduce", ()),
        paused=by_operation.get(f"{own}allreduce_after_pause", ()),
    )


def fit(
    rows: Sequence[dict[str, Any]],
    ranks: int,
    *,
    transport: str = "horovod",
    gathered: Sequence[dict[str, Any]] = (),
    negotiated: Sequence[dict[str, Any]] = (),
    paused: Sequence[dict[str, Any]] = (),
) -> tuple[Link, dict[str, float]]:
    """Fit the seconds per byte to large sizes, and the fixed cost to the smallest.

    A least-squares fit over all sizes would be wrong: traffic shapers of slow links let the first kilobytes pass, so
    medium sizes look cheaper than they are in a long transfer. While Horovod negotiates, a link saves up for many: of
    its sizes only the two largest count. Sockets leave it no time, so each two neighbours from 64 KiB up count, and the
    median of their slopes is robust against an outlier.

    A ring allreduce of N ranks takes γ ⌈log2 N⌉ + 2 (N - 1) α + 2 (N - 1)/N n β seconds. One number of ranks does not
    determine both α and γ. The fit therefore attributes 1 % of the fixed cost to messages (α) and the rest to
    negotiation (γ). The other transports need no negotiation for an allreduce. Their γ, which an alltoall pays, is the
    fixed cost of Horovod's allreduce, if that was measured.

    Args:
        rows: allreduce measurements with `bytes`, `seconds` and `quartiles`, of at least two sizes. The largest two are
            large enough that more than two ranks divide the sum.
        ranks: N.
        transport: key of the transport that moved them.
        gathered: the same for allgathers, if measured.
        negotiated: the same for Horovod's allreduce, if the transport is another one.
        paused: allreduces after a pause in which the link was idle, if measured.

    Returns:
        The link, and its relative deviations `start` and `byte`.

    Raises:
        ValueError: there are fewer than two sizes or two ranks.
    """
    if len({row["bytes"] for row in rows}) < 2 or ranks < 2:
        raise ValueError("two ranks and two sizes at least are needed")
    start, byte = _line(rows, transport)
    spread = [(row["quartiles"][1] - row["quartiles"][0]) / 1.349 / row["seconds"] for row in rows]
    deviation = float(np.clip(np.median(spread), 0.01, 1.0))
    if transport == "horovod":
        latency, negotiation = 0.01 * start / (2 * (ranks - 1)), 0.99 * start
    else:
        latency = start / (barriers(ranks) if transport == "shared" else 1)  # the smallest sum takes one step
        negotiation = min((row["bytes"], row["seconds"]) for row in negotiated)[1] if negotiated else 0.0
    byte_seconds = byte * ranks / (2 * (ranks - 1))
    link = Link(
        latency=latency,
        byte_seconds=byte_seconds,
        agreeing=negotiation / int(np.ceil(np.log2(ranks))),
        gather_byte_seconds=_line(gathered, transport)[1] / (ranks - 1)
        if len({row["bytes"] for row in gathered}) > 1
        else 0.0,
        burst=_burst(paused, ranks, start, byte, transport) / byte_seconds,
        transport=transport,
    )
    return link, {"start": deviation, "byte": deviation}


def _line(rows: Sequence[dict[str, Any]], transport: str) -> tuple[float, float]:
    """Return the seconds of an empty message, and the seconds per byte."""
    ordered = sorted((row["bytes"], row["seconds"]) for row in rows)
    pairs = list(itertools.pairwise(ordered))
    long = [pair for pair in pairs if pair[0][0] >= _LONG] if transport != "horovod" else []
    slopes = [(after - before) / (large - small) for (small, before), (large, after) in long or pairs[-1:]]
    largest, longest = ordered[-1]
    byte = statistics.median(slopes)
    if byte <= 0:  # noise
        byte = longest / largest
    least, shortest = ordered[0]
    return max(shortest - least * byte, shortest / 10), byte


def _burst(paused: Sequence[dict[str, Any]], ranks: int, start: float, byte: float, transport: str) -> float:
    """Return the seconds that a transfer takes less after a pause than in a long series of transfers.

    It is that of the largest size of which it is a visible part. A smaller one may have passed at once, all of it.
    """
    found = 0.0
    for size, seconds in sorted((row["bytes"], row["seconds"]) for row in paused):
        moving = size * byte
        steps = 2 if transport == "sockets" and is_divided(ranks, size) else 1
        saved = min(moving, moving + steps * start - seconds)
        found = saved if saved > _SAVED * moving else found
    return found


def expected_transport() -> str:
    """Return the key of the transport between hosts for a job that Horovod's Gloo starts from this environment."""
    if os.environ.get("HVDKIT_SOCKETS") == "0":
        return "horovod"
    import tensorflow as tf  # takes seconds to load

    return "horovod" if tf.config.list_physical_devices("GPU") else "sockets"


def given(latency: str, bandwidth: str, agreeing: str, transport: str = "horovod") -> Link:
    """Create a link from flags such as `50us` and `10Gbit/s`.

    Args:
        latency: seconds per message or step.
        bandwidth: of a host.
        agreeing: seconds of Horovod's negotiation between two ranks.
        transport: key of the transport.

    Raises:
        UsageError: a value cannot be parsed.
    """
    return Link(_parse_seconds(latency), 1 / _parse_rate(bandwidth), _parse_seconds(agreeing), transport=transport)


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

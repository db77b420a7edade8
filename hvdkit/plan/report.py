"""The planner's report: a table of predictions with uncertainty intervals."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hvdkit import reporting
from hvdkit.plan import published
from hvdkit.plan.cost import Cluster, Compute, Link, Mode, predict

_DRAWS = 400


def rows(
    ranks: Sequence[int],
    local_batch: int,
    compute: Compute,
    modes: Mapping[str, Mode],
    cluster: Cluster,
    deviations: Mapping[str, float],
    price: float | None = None,
    one_process: float | None = None,
) -> list[dict[str, Any]]:
    """Predict every mode for every number of ranks, with 90 % intervals of the samples per second.

    Args:
        ranks: numbers of ranks.
        local_batch: samples per step of each rank.
        compute: measured compute cost of a rank.
        modes: the training modes by name.
        cluster: the hosts and links.
        deviations: relative deviations of `compute`, `start` and `byte`.
        price: price of one rank per hour, in any currency; gives the cost of a million samples.
        one_process: samples per second of one process that has a whole host, if a rank has less.
    """
    one = predict(1, local_batch, compute, Mode("one process"), cluster)
    alone = max(one.samples_per_second, one_process or 0.0)
    found = []
    for mode in modes.values():
        for number in ranks:
            if mode.one_host and number > cluster.ranks_per_host:
                continue
            one = predict(number, local_batch, compute, mode, cluster)
            low, high = _interval(number, local_batch, compute, mode, cluster, deviations)
            cost = price * number * 1e6 / one.samples_per_second / 3600 if price is not None else None
            found.append(
                {
                    "mode": mode.name,
                    "ranks": number,
                    **dataclasses.asdict(one),
                    "interval": [low, high],
                    "speedup": one.samples_per_second / alone,
                    "cost_per_million": cost,
                }
            )
    return found


def _interval(
    ranks: int, local_batch: int, compute: Compute, mode: Mode, cluster: Cluster, deviations: Mapping[str, float]
) -> tuple[float, float]:
    """Sample the measured values from their uncertainty, predict with each sample, and return the 90 % interval."""
    generator = np.random.default_rng(ranks)
    drawn = []
    for work, start, byte in generator.normal(size=(_DRAWS, 3)):
        factors = [np.exp(d * deviations[n]) for d, n in ((work, "compute"), (start, "start"), (byte, "byte"))]
        slower = dataclasses.replace(compute, fixed=compute.fixed * factors[0], sample=compute.sample * factors[0])
        between, inside = (_scaled(old, factors[1], factors[2]) for old in (cluster.between, cluster.inside))
        elsewhere = dataclasses.replace(cluster, between=between, inside=inside)
        drawn.append(predict(ranks, local_batch, slower, mode, elsewhere).samples_per_second)
    low, high = np.quantile(drawn, [0.05, 0.95])
    return float(low), float(high)


def _scaled(link: Link, start: float, byte: float) -> Link:
    return dataclasses.replace(
        link,
        latency=link.latency * start,
        agreeing=link.agreeing * start,
        byte_seconds=link.byte_seconds * byte,
        gather_byte_seconds=link.gather_byte_seconds * byte,
    )


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Format the predictions as a table."""
    priced = any(row["cost_per_million"] is not None for row in found)
    heads = [
        "mode",
        "ranks",
        "ms a step",
        "samples/s",
        "90 % interval",
        "speed-up",
        "efficiency",
        "MiB a rank",
        "wire MB a step",
    ]
    lines = []
    for row in found:
        line = [
            row["mode"],
            row["ranks"],
            f"{row['step_seconds'] * 1e3:,.1f}",
            f"{row['samples_per_second']:,.0f}",
            f"{row['interval'][0]:,.0f} to {row['interval'][1]:,.0f}",
            f"{row['speedup']:.2f}",
            f"{row['efficiency']:.2f}",
            f"{row['memory_bytes'] / 2**20:,.0f}",
            f"{row['wire_bytes'] / 1e6:,.3f}",
        ]
        lines.append(line + ([f"{row['cost_per_million']:.4f}"] if priced else []))
    return reporting.table(heads + (["cost of 1M samples"] if priced else []), lines)


def published_table(results: Sequence[published.Published]) -> str:
    """Format published results beside predictions, with nothing and with all of the allreduce hidden."""
    heads = [
        "precision",
        "GPUs",
        "published images/s",
        "predicted images/s",
        "error",
        "error, all hidden",
        "published efficiency",
        "predicted efficiency",
    ]
    lines = []
    for one in results:
        for gpus, images in one.images.items():
            found = published.predicted(one, gpus)
            lines.append(
                [
                    one.precision,
                    gpus,
                    f"{images:,}",
                    f"{found.samples_per_second:,.0f}",
                    f"{published.error(one, gpus):+.1%}",
                    f"{published.error(one, gpus, overlap=1.0):+.1%}",
                    f"{one.efficiency(gpus):.3f}",
                    f"{found.efficiency:.3f}",
                ]
            )
    return reporting.table(heads, lines)

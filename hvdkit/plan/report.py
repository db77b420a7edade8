"""The planner's report: a table of predictions with uncertainty intervals."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hvdkit import reporting
from hvdkit.plan import published
from hvdkit.plan.cost import Cluster, Compute, Link, Mode, predict
from hvdkit.plan.modes import ABOUT

_DRAWS = 400
_DENSE, _NO_EXCHANGE = "data parallel", "independent"


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


def table(found: Sequence[Mapping[str, Any]], modes: Mapping[str, Mode]) -> str:
    """Format the predictions as two tables: samples/s by mode and ranks, the fastest first, and what the modes do."""
    numbers = sorted({row["ranks"] for row in found})
    by_mode: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in found:
        by_mode.setdefault(row["mode"], {})[row["ranks"]] = row
    names = sorted(by_mode, key=lambda name: -max(row["samples_per_second"] for row in by_mode[name].values()))
    names.sort(key=lambda name: not modes[name].exact or name == _NO_EXCHANGE)
    heads = ["mode", *(f"{n} {'rank' if n == 1 else 'ranks'}" for n in numbers), "times one process", "MiB a rank"]
    heads += ["MB sent a step", "same training"]
    lines = []
    for name in names:
        rates = [f"{by_mode[name][n]['samples_per_second']:,.0f}" if n in by_mode[name] else "-" for n in numbers]
        last = by_mode[name][max(by_mode[name])]
        best = max(row["speedup"] for row in by_mode[name].values())
        same = "yes" if modes[name].exact and name != _NO_EXCHANGE else "no"
        megabytes = f"{last['wire_bytes'] / 1e6:,.3f}"
        lines.append([name, *rates, f"{best:.2f}", f"{last['memory_bytes'] / 2**20:,.0f}", megabytes, same])
    legend = reporting.table(["mode", "what it does"], [[name, ABOUT[name]] for name in names])
    return (
        f"Samples/s with the number of ranks:\n\n{reporting.table(heads, lines)}\n\n"
        f"times one process: the best of the row, against one process with all cores of a host. MiB, MB: of one rank, "
        f"at the most ranks.\nsame training: yes, if the model is the one that a single process trains with the global "
        f"batch; otherwise compare accuracies.\n\n{legend}"
    )


def lines(found: Sequence[Mapping[str, Any]], modes: Mapping[str, Mode]) -> dict[str, list[tuple[float, float]]]:
    """Return what to plot, by name: ideal scaling, data parallelism, and the fastest exact and other modes."""
    by_mode: dict[str, list[tuple[float, float]]] = {}
    for row in found:
        by_mode.setdefault(row["mode"], []).append((row["ranks"], row["speedup"]))

    def fastest(exact: bool, number: int) -> list[str]:
        others = [name for name, points in by_mode.items() if name not in (_DENSE, _NO_EXCHANGE) and len(points) > 1]
        names = [name for name in others if modes[name].exact == exact]
        return sorted(names, key=lambda name: -max(speedup for _, speedup in by_mode[name]))[:number]

    first = found[0]["mode"]
    drawn = {"ideal": [(row["ranks"], row["speedup"] / row["efficiency"]) for row in found if row["mode"] == first]}
    dense = [_DENSE] if _DENSE in by_mode else []
    drawn |= {name: by_mode[name] for name in (*dense, *fastest(True, 1))}
    return drawn | {f"{name} (other training)": by_mode[name] for name in fastest(False, 2)}


def details(found: Sequence[Mapping[str, Any]]) -> str:
    """Format one line for each mode and number of ranks, with the step time and the interval."""
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

"""`scaling`: throughput of N ranks, compared with N times that of one rank.

Weak scaling keeps the local batch size, strong scaling the global one (J. Gustafson, "Reevaluating Amdahl's law",
1988). One rank is bound to as many cores as each of N ranks has, for a fair comparison.
"""

import argparse
import statistics
import sys
from typing import Any

from hvdkit import reporting
from hvdkit.bench import jobs, statistic, workloads
from hvdkit.bench.throughput import run_case
from hvdkit.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--workloads", default="mlp,lenet", help="models to train: " + ", ".join(workloads.WORKLOADS))
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, compared with the smallest one")
    parser.add_argument(
        "--mode",
        choices=("weak", "strong"),
        default="weak",
        help="keep the local batch size (weak) or the global one (strong) constant",
    )
    parser.add_argument("--hosts", default="", metavar="H", help="hosts, such as h1:1,h2:1 for two ranks [this host]")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure each number of ranks in turn, once per round."""
    try:
        ranks = sorted({int(number) for number in arguments.ranks.split(",")})
    except ValueError:
        raise UsageError(f"--ranks={arguments.ranks} is no list of numbers, as in --ranks=1,2,4.") from None
    if ranks[0] < 1:
        raise UsageError(f"--ranks={arguments.ranks}: at least one rank is needed.")
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(arguments.rounds):
        for workload in workloads.named(arguments.workloads):
            for number in ranks:
                cores = None if arguments.hosts else _cores(number, ranks[-1])
                one = run_case(*_case(workload, number, ranks, arguments), arguments.seconds, cores)
                rate = statistics.median(one["samples_per_second"])
                found.setdefault((workload.name, number), []).append(rate)
                print(f"{workload.name}, {number} rank(s): {rate:,.0f} samples/s", file=sys.stderr, flush=True)
    return {"mode": arguments.mode, "rows": [_row(found, name, number, ranks[0]) for name, number in found]}


def _case(
    workload: workloads.Workload, number: int, ranks: list[int], arguments: argparse.Namespace
) -> tuple[str, list[str]]:
    flags = workload.train_flags()
    if arguments.mode == "strong":
        flags = [flag for flag in flags if not flag.startswith("--local_batch")]
        flags.append(f"--global_batch={workload.local_batch * ranks[0]}")
    if arguments.hosts:
        hosts = ",".join(arguments.hosts.split(",")[:number])
        return f"-H {hosts} -np {number}", flags
    return f"-np {number}", flags


def _cores(number: int, most: int) -> list[int]:
    """Return the cores for `number` ranks; each rank gets as many as it has in the job of `most` ranks."""
    usable = jobs.usable_cores()
    return usable[: number * max(1, len(usable) // most)]


def _row(found: dict[tuple[str, int], list[float]], name: str, number: int, yardstick: int) -> dict[str, Any]:
    rates, alone = found[name, number], found[name, yardstick]
    efficiencies = [a / b / (number / yardstick) for a, b in zip(rates, alone, strict=True)]
    return {
        "workload": name,
        "ranks": number,
        "samples_per_second": statistics.median(rates),
        "speedup": statistics.median(efficiencies) * number / yardstick,
        "efficiency": statistics.median(efficiencies),
        "interval": statistic.confidence_interval(efficiencies),
        "noisy": statistic.is_noisy(efficiencies),
    }


def report(found: dict[str, Any]) -> str:
    """Format the results as a table."""
    rows = [
        [
            row["workload"],
            row["ranks"],
            f"{row['samples_per_second']:,.0f}",
            f"{row['speedup']:.2f}",
            f"{row['efficiency']:.2f}" + (" (noisy)" if row["noisy"] else ""),
            f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}",
        ]
        for row in found["rows"]
    ]
    heads = ["workload", "ranks", "samples/s", "speed-up", f"{found['mode']} efficiency", "95 % interval"]
    return reporting.table(heads, rows)


def lines(found: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Return the points to plot: the speed-up of each workload, and the ideal speed-up."""
    by_name: dict[str, list[tuple[float, float]]] = {}
    for row in found["rows"]:
        by_name.setdefault(row["workload"], []).append((row["ranks"], row["speedup"]))
    longest = max(by_name.values(), key=len)
    return {**by_name, "ideal": [(ranks, ranks / longest[0][0]) for ranks, _ in longest]}


AXES = ("ranks", "speed-up")

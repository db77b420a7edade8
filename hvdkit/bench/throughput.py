"""`throughput`: samples per second, start-up time and memory of any model, strategy, batch size and number of ranks."""

import argparse
import statistics
import sys
from typing import Any

from hvdkit import reporting
from hvdkit.bench import jobs, statistic, workloads
from hvdkit.train import flags as train_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--workloads", default="mlp,lenet", help="models to train: " + ", ".join(workloads.WORKLOADS))
    how = (
        "launcher options of a case, such as '-np 2 --bind none'; words such as NAME=value in front set environment "
        "variables; may be repeated [one process, and -np 2]"
    )
    parser.add_argument("--case", action="append", default=[], metavar="'LAUNCHER ARGS'", help=how)
    parser.add_argument("flags", nargs="*", help="after --: flags of hvdkit.train, instead of --workloads")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every case of every workload in turn, once per round."""
    train_flags.check(arguments.flags)
    trainings = {"yours": arguments.flags}
    if not arguments.flags:
        trainings = {w.name: w.train_flags() for w in workloads.named(arguments.workloads)}
    cases = arguments.case or ["-np 1", "-np 2"]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for name, flags in trainings.items():
            for case in cases:
                one = run_case(case, flags, arguments.seconds)
                found.setdefault((name, case), []).append(one)
                rate = statistics.median(one["samples_per_second"])
                print(f"{name}, {case}: {rate:,.0f} samples/s", file=sys.stderr, flush=True)
    return {"rows": [{"workload": name, "case": case, **_row(runs)} for (name, case), runs in found.items()]}


def run_case(case: str, flags: list[str], seconds: float, cores: list[int] | None = None) -> dict[str, Any]:
    """Measure one case. Words with `=` are environment variables, all others are arguments of the launcher."""
    words = case.split()
    environment = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
    launcher = [word for word in words if "=" not in word or word.startswith("-")]
    return jobs.train(launcher, flags, seconds, environment, cores)


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [statistics.median(run["samples_per_second"]) for run in runs]
    middle, low, high = statistic.median_and_quartiles(rates)
    return {
        "samples_per_second": middle,
        "quartiles": [low, high],
        "noisy": statistic.is_noisy(rates),
        "rounds": rates,
        "startup_seconds": {
            phase: statistics.median(run["startup_seconds"][phase] for run in runs)
            for phase in runs[0]["startup_seconds"]
        },
        "peak_bytes": max(max(run["peak_bytes"]) for run in runs),
        "training_peak_bytes": max(max(run["training_peak_bytes"]) for run in runs),
        "optimizer_bytes": runs[0]["facts"]["optimizer_bytes"],
        "exchange": runs[0]["exchange"],
        "exchange_seconds": runs[-1].get("exchange_seconds"),
        "waiting_seconds": runs[-1].get("waiting_seconds"),
    }


def report(found: dict[str, Any]) -> str:
    """Format the results as a table."""
    rows = [
        [
            row["workload"],
            row["case"],
            f"{row['samples_per_second']:,.0f}" + (" (noisy)" if row["noisy"] else ""),
            f"{row['quartiles'][0]:,.0f} to {row['quartiles'][1]:,.0f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['training_peak_bytes'] / 2**20:,.0f}",
            f"{row['optimizer_bytes'] / 2**20:,.1f}",
            " + ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in row["startup_seconds"].items()),
            row["exchange"],
        ]
        for row in found["rows"]
    ]
    memory = ["peak MiB a rank", "MiB in steps", "MiB of the optimizer"]
    heads = ["workload", "case", "samples/s", "quartiles, samples/s", *memory, "s to the first step", "exchange"]
    return reporting.table(heads, rows)


def lines(found: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Return the points to plot: samples per second by round, for each case."""
    return {
        f"{row['workload']}, {row['case']}": [(i + 1, rate) for i, rate in enumerate(row["rounds"])]
        for row in found["rows"]
    }


AXES = ("round", "samples/s")

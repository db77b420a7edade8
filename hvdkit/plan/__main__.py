"""Predicts how training scales to more ranks, and recommends the fastest mode, or none.

    hvdkit plan -- --model=cifar_cnn --dataset=cifar10     on this host: one rank, or more, up to one a core?
    hvdkit plan --batch 64 --ranks 1,2,4,8 --links links.json -- --model=cifar_cnn --dataset=cifar10
    hvdkit plan --batch 64 --ranks 1,16,1024 --latency 20us --bandwidth 25Gbit/s -- --model=mine.py:build
    hvdkit plan measure -H h1:1,h2:1 ...     predict for these hosts, and run each mode on them
    hvdkit plan score FILE.json...           print the median error of files that `measure --json` wrote
    hvdkit plan published FILE.png           compare predictions for EfficientNet-B4 with NVIDIA's published results

The planner measures the model on this machine for a few seconds, in as many processes as a host has ranks. Create
links.json with `hvdkit bench collectives --sizes training --case='-H h1:1,h2:1' --json links.json` on the hosts that
will train; `plan measure` does so itself. The file written by --json also contains the measurements of the model and of
the links, and --model-from and --links reuse them.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from hvdkit import outcome, reporting
from hvdkit.command.arguments import Parser, new_file
from hvdkit.errors import UsageError
from hvdkit.launch import hosts as hosts_of
from hvdkit.plan import advice, facts, links, measure, modes, published, report
from hvdkit.plan import score as scoring
from hvdkit.plan.cost import Cluster, Compute, Link, Mode
from hvdkit.train import flags as train_flags
from hvdkit.world.devices import usable_cores

_MEMORY = Link(2e-4, 1 / 4e9, 1e-3, transport="shared")  # default between ranks of one host


def main(argv: list[str]) -> int:
    """Run the planner and return the exit code: 2 for a usage error."""
    try:
        if argv[1:2] == ["score"]:
            return _score(argv[2:])
        if argv[1:2] == ["published"]:
            return _published(argv[2:])
        if argv[1:2] == ["measure"]:
            return _measure(parser().parse_args(argv[2:]))
        return _plan(parser().parse_args(argv[1:]))
    except UsageError as error:
        print(f"hvdkit.plan: {error}", file=sys.stderr)
        return outcome.USAGE


def parser() -> Parser:
    """Create the planner's argument parser."""
    made = Parser("plan", description=__doc__)
    made.add_argument("--batch", type=int, default=64, help="local batch size: samples per step on each rank [64]")
    made.add_argument(
        "--ranks",
        help="numbers of ranks to predict, up to thousands [1,2,4,8; with -H, up to all ranks of the hosts; without "
        "options about hosts or links, up to one for each core of this host]",
    )
    made.add_argument(
        "--ranks-per-host",
        type=int,
        metavar="N",
        help="maximum number of ranks on a host [1; with -H, that of the hosts; without options about hosts or links, "
        "the cores of this host]",
    )
    made.add_argument("--links", metavar="FILE", help="measurements of allreduce between hosts")
    made.add_argument("--inside", metavar="FILE", help="measurements of allreduce between ranks of one host")
    made.add_argument("--latency", help="latency of a message between hosts, if --links is not given [50us]")
    made.add_argument("--bandwidth", help="bandwidth between hosts, if --links is not given [10Gbit/s]")
    made.add_argument("--agreeing", default="1ms", help="duration of Horovod's negotiation between two ranks [1ms]")
    made.add_argument(
        "--transport",
        choices=["sockets", "horovod"],
        help="what moves gradients between hosts, if --links is not given [horovod with GPUs or HVDKIT_SOCKETS=0, else "
        "sockets]",
    )
    made.add_argument(
        "--model-from", metavar="FILE", help="take the model's measurements from a file that --json wrote"
    )
    made.add_argument("--threads", type=int, help="cores per rank [an equal share of this machine's cores]")
    made.add_argument("--shared-machine", action="store_true", help="the hosts are test hosts on this machine")
    made.add_argument("--modes", default="", help="modes to consider, separated by commas [all]")
    made.add_argument("-H", dest="hosts", default="", help="hosts to predict for, as in -H h1:2,h2:2")
    made.add_argument("--price", type=float, help="price of one rank per hour")
    made.add_argument("--seconds", type=float, default=4.0, help="seconds of each measurement [4]")
    made.add_argument(
        "--details",
        action="store_true",
        help="one line for each mode and number of ranks, with intervals and step times",
    )
    made.add_argument("--json", type=new_file, metavar="FILE", help="write the results to this file, too")
    made.add_argument("--plot", type=new_file, metavar="FILE.png", help="plot the results to this file")
    made.add_argument("flags", nargs="*", help="after --: flags of hvdkit train, without a batch size")
    return made


def _plan(arguments: argparse.Namespace) -> int:
    _lay_out(arguments)
    numbers = _numbers(arguments.ranks)
    _check(arguments)
    threads = arguments.threads or max(1, usable_cores() // arguments.ranks_per_host)
    found, ways, measured = _predict(arguments, numbers, threads, *_cluster(arguments))
    sentence = advice.advise(found, ways, " ".join(arguments.flags), arguments.hosts, arguments.ranks_per_host)
    print(report.details(found) if arguments.details else report.table(found, ways))
    print(f"\n{sentence}")
    reporting.write_measurement(arguments.json, {"rows": found, **measured, "advice": sentence})
    lines = report.lines(found, ways)
    reporting.plot(arguments.plot, "predicted scaling", "ranks", "times one process", lines, xscale="log", yscale="log")
    return 0


def _lay_out(arguments: argparse.Namespace) -> None:
    """Fill in the numbers of ranks and the ranks of a host that the user left open."""
    if arguments.hosts:
        slots = [host.slots for host in hosts_of.from_list(arguments.hosts)]
        total, most = sum(slots), max(slots)
    elif any((arguments.ranks, arguments.ranks_per_host, arguments.links, arguments.latency, arguments.bandwidth)):
        total, most = 8, 1
    else:
        total = most = usable_cores()
    if not arguments.ranks:
        powers = [2**power for power in range(total.bit_length()) if 2**power < total]
        arguments.ranks = ",".join(map(str, [*powers, total]))
    if arguments.ranks_per_host is None:
        arguments.ranks_per_host = most


def _check(arguments: argparse.Namespace) -> None:
    """Raise a `UsageError` if an argument is wrong, before anything is measured."""
    if arguments.batch < 1 or arguments.ranks_per_host < 1:
        raise UsageError("--batch and --ranks-per-host must be 1 or more.")
    if arguments.seconds <= 0:
        raise UsageError(f"--seconds={arguments.seconds:g} must be above 0.")
    for name in filter(None, arguments.modes.split(",")):
        if name not in modes.NAMES:
            raise UsageError(f"There is no mode {name!r}. Choose from {', '.join(modes.NAMES)}.")
    arguments.flags = train_flags.check(arguments.flags)


def _measure(arguments: argparse.Namespace) -> int:
    if not arguments.hosts:
        raise UsageError("measure needs hosts to try the modes on, as in -H h1:1,h2:1.")
    slots = [host.slots for host in hosts_of.from_list(arguments.hosts)]
    number, arguments.ranks_per_host = sum(slots), max(slots)
    _check(arguments)
    beside = number if arguments.shared_machine else arguments.ranks_per_host
    threads = arguments.threads or max(1, usable_cores() // beside)
    cluster, deviations, transfers = _measured_cluster(arguments)
    predicted, ways, measured = _predict(arguments, [number], threads, cluster, deviations)
    predicted = [row for row in predicted if row["wire_bytes"] and not ways[row["mode"]].one_host]
    own = [*arguments.flags, f"--local_batch={arguments.batch}", f"--threads={threads}"]
    launcher = ["-H", arguments.hosts, "-np", str(number)]
    found = measure.measure(predicted, ways, own, launcher, arguments.seconds)
    print(measure.table(found))
    print(f"\nmedian error {scoring.score(found):.0%}")
    reporting.write_measurement(arguments.json, {"rows": found, **measured, "links": transfers})
    return 0


def _predict(
    arguments: argparse.Namespace,
    numbers: list[int],
    threads: int,
    cluster: Cluster,
    deviations: dict[str, float],
) -> tuple[list[dict[str, Any]], dict[str, Mode], dict[str, Any]]:
    """Return the prediction rows, the modes by name, and the model's measurements for the JSON file."""
    # The launcher binds the ranks of one host to separate cores. Hosts that share one machine do not coordinate, so
    # their ranks are not bound.
    beside = max(numbers) if arguments.shared_machine else arguments.ranks_per_host
    bound = not arguments.shared_machine and beside * threads <= usable_cores()
    if arguments.model_from:
        compute, known = _read_model(arguments.model_from)
    else:
        compute, known = facts.measure(arguments.flags, arguments.batch, threads, beside, bound, arguments.seconds)
    unknown = [name for name in _compressors(arguments.modes) if name not in known["compression_seconds"]]
    if unknown:
        known["compression_seconds"] |= facts.compression_seconds(unknown, known["shapes"], threads, beside, bound)
    deviations = {**deviations, "compute": max(compute.deviation, 0.02)}
    ways = modes.all_modes(
        known["shapes"], _optimizer(arguments.flags), known["compression_seconds"], known["divisions"]
    )
    ways = _chosen(ways, arguments.modes)
    found = report.rows(
        numbers, arguments.batch, compute, ways, cluster, deviations, arguments.price, known["one_process"]
    )
    return found, ways, {"compute": vars(compute), **known, "deviations": deviations}


def _compressors(names: str) -> list[str]:
    """Return the compressors among the modes to consider; the compute time of others is not measured."""
    chosen = names.split(",") if names else modes.FEEDBACK
    return [name for name in modes.FEEDBACK if name in chosen]


def _read_model(path: str) -> tuple[Compute, dict[str, Any]]:
    try:
        content = json.loads(Path(path).expanduser().read_text())
        return Compute(**content["compute"]), {
            key: content[key] for key in ("shapes", "compression_seconds", "divisions", "one_process")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} does not hold what is known of a model ({error}). It is written by: python -m hvdkit.plan "
            f"--json {path} -- --model=..."
        ) from None


def _cluster(arguments: argparse.Namespace) -> tuple[Cluster, dict[str, float]]:
    deviations = {"start": 0.2, "byte": 0.1}  # defaults without a measurement
    if arguments.links:
        between, deviations = links.read(arguments.links)
    else:
        transport = arguments.transport or links.expected_transport()
        latency, bandwidth = arguments.latency or "50us", arguments.bandwidth or "10Gbit/s"
        between = links.given(latency, bandwidth, arguments.agreeing, transport)
    inside = links.read(arguments.inside, "inside")[0] if arguments.inside else _MEMORY
    cluster = Cluster(between, inside, arguments.ranks_per_host, usable_cores(), arguments.shared_machine)
    return cluster, deviations


def _measured_cluster(arguments: argparse.Namespace) -> tuple[Cluster, dict[str, float], dict[str, Any]]:
    """Return the cluster of `-H`, the links' relative deviations, and the measurements of links that no file gives."""
    cluster, deviations = _cluster(arguments)
    names = [host.partition(":")[0] for host in arguments.hosts.split(",")]
    transfers = {}
    if len(names) > 1 and not arguments.links:
        transfers["between"] = links.measure(["-H", ",".join(f"{name}:1" for name in names)], arguments.seconds / 8)
        between, deviations = links.from_measurement(transfers["between"])
        cluster = dataclasses.replace(cluster, between=between)
    if arguments.ranks_per_host > 1 and not arguments.inside:
        alone = ["-H", f"{names[0]}:{arguments.ranks_per_host}"]
        transfers["inside"] = links.measure(alone, arguments.seconds / 8)
        inside, spread = links.from_measurement(transfers["inside"])
        deviations = deviations if len(names) > 1 else spread
        cluster = dataclasses.replace(cluster, inside=inside)
    return cluster, deviations, transfers


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(number) for number in text.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise UsageError(f"--ranks={text} is no list of numbers from 1 up, as in --ranks=1,2,4.")
    return numbers


def _optimizer(flags: list[str]) -> str:
    return next((flag.partition("=")[2] for flag in flags if flag.startswith("--optimizer=")), "adam")


def _chosen(ways: dict[str, Any], names: str) -> dict[str, Any]:
    missing = [name for name in filter(None, names.split(",")) if name not in ways]
    if missing:
        raise UsageError(f"This model cannot be trained in the mode {missing[0]!r}. Choose from {', '.join(ways)}.")
    return {name: ways[name] for name in names.split(",")} if names else ways


def _score(argv: list[str]) -> int:
    if not argv:
        raise UsageError("score needs files, as in: python -m hvdkit.plan score FILE.json...")
    pairs = [pair for path in argv for pair in scoring.read(path)]
    lines = [[p["case"], f"{p['predicted']:,.0f}", f"{p['measured']:,.0f}", f"{p['error']:+.0%}"] for p in pairs]
    print(reporting.table(["case", "predicted samples/s", "measured samples/s", "error"], lines))
    print(f"\nmedian error {scoring.score(pairs):.0%} of {len(pairs)}")
    return 0


def _published(argv: list[str]) -> int:
    if len(argv) != 1:
        raise UsageError("published needs one file, as in: python -m hvdkit.plan published FILE.png")
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in published.ALL:
        lines[f"{one.precision}, published"] = [(gpus, one.efficiency(gpus)) for gpus in one.images]
        lines[f"{one.precision}, predicted"] = [(n, published.predicted(one, n).efficiency) for n in published.RANKS]
    reporting.plot(Path(argv[0]), "EfficientNet-B4 on A100, weak scaling", "GPUs", "efficiency", lines, xscale="log")
    print(report.published_table(published.ALL))
    errors = [abs(published.error(one, gpus)) for one in published.ALL for gpus in one.images if gpus > 1]
    print(f"\nmedian error {statistics.median(errors):.0%} of {len(errors)}, without the GPU that calibrates")
    print(f"published: {published.SOURCE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

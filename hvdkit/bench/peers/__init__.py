"""`peers`: the same models and batch sizes with other tools, each in its own virtual environment.

Two of the rows are hvdkit: `hvdkit_script`, a user's script with Keras' defaults, which all others are compared with,
and `hvdkit`, the job of `hvdkit train`. `one_core` is plain Keras with its defaults, in one process bound to a core of
this host. The other peers use the ranks, hosts and cores that hvdkit uses.

Peers alternate: a round runs each of them once. The first round tries each with several thread settings; later rounds
use the fastest. Step times are of additional steps after those that count for samples/s. Where a tool runs several
steps in one execution, they count as equally long.

place.py         hosts, ranks and cores
commands.py      the peers and how each is started; environments.py has their packages
rounds.py        measures
table.py         reports
programs/        what the peers' ranks run
"""

import argparse
from typing import Any

from hvdkit.bench import workloads
from hvdkit.bench.peers import place, rounds, table
from hvdkit.bench.peers.commands import OURS, PEERS, SCRIPT

report = table.report
AXES = ("workload", "samples/s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    everyone = (SCRIPT, OURS, *(peer for peer in PEERS if peer != SCRIPT))
    tools = f"tools to measure beside {SCRIPT}, of {', '.join(everyone[1:])} [all]"
    cores = "cores of the ranks in their order, the same number for each, as in 0,1 for two ranks; for hosts that are "
    cores += "one machine, where each would use all cores [chosen by hvdkit's launcher, and tried for other peers]"
    parser.add_argument("--workloads", default=",".join(workloads.WORKLOADS), help="models to train [all]")
    parser.add_argument("--peers", default=",".join(everyone), help=tools)
    parser.add_argument("--ranks", type=int, help="number of ranks or replicas [2, or all slots of the hosts]")
    where = "hosts and their ranks, the first of them this host, as for hvdkit launch [this host]"
    parser.add_argument("-H", "--hosts", default="", metavar="h1:1,h2:1", help=where)
    parser.add_argument("--cpus", default="", metavar="0,1", help=cores)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure hvdkit and every peer in turn, once per round."""
    names = [w.name for w in workloads.named(arguments.workloads)]
    chosen, where = rounds.chosen(arguments), place.of(arguments)
    run = rounds.Rounds(names, where, arguments.seconds)
    run.run(chosen, arguments.rounds)
    keys = [(name, peer) for name in names for peer in chosen if (name, peer) in run.measured]
    rows = table.rows({key: run.measured[key] for key in keys}, run.best)
    about = {"ranks": where.ranks, "hosts": where.hosts, "cpus": list(where.cpus)}
    return {**about, "rows": rows, "verdicts": table.verdicts(rows), "missing": run.missing}


def lines(found: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Return the points to plot: samples per second by workload, for each peer."""
    drawn: dict[str, list[tuple[float, float]]] = {}
    for row in found["rows"]:
        points = drawn.setdefault(row["peer"], [])
        points.append((len(points) + 1, row["samples_per_second"]))
    return drawn

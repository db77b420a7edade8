"""Measures hvdkit and its peers in alternating rounds."""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from hvdkit.bench import jobs, workloads
from hvdkit.bench.peers import commands
from hvdkit.bench.peers.commands import OURS, PEERS, SCRIPT
from hvdkit.bench.peers.place import Place
from hvdkit.errors import UsageError

Setting = dict[str, str]
Found = dict[str, dict[str, Any]]  # what was measured, by workload


class Rounds:
    """Runs each peer once per round, and keeps what was measured.

    Args:
        names: names of the workloads.
        place: where the ranks run.
        seconds: duration of a measurement.

    Attributes:
        measured: of each workload and peer, one measurement per round, with `samples_per_second` (median of its
            windows) and `step_seconds`.
        best: of each workload and peer, the thread setting that was fastest in the first round.
        missing: why a peer was left out.
    """

    def __init__(self, names: Sequence[str], place: Place, seconds: float) -> None:
        self.measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.best: dict[tuple[str, str], Setting] = {}
        self.missing: dict[str, str] = {}
        self._names = names
        self._place = place
        self._seconds = seconds
        self._commands: dict[str, list[str]] = {}

    def run(self, peers: Sequence[str], rounds: int) -> None:
        """Run the rounds. A peer that fails is left out, and the results of the others are kept."""
        for number in range(rounds):
            for peer in peers:
                if peer not in self.missing:
                    try:
                        self._keep(number, peer, self._again(peer) if number else self._tune(peer))
                    except UsageError as error:
                        self.missing[peer] = str(error)
        for key in [key for key in self.measured if key[1] in self.missing]:
            del self.measured[key]

    def _keep(self, number: int, peer: str, found: Found) -> None:
        for name, one in found.items():
            rate = one["samples_per_second"]
            print(f"round {number + 1}: {peer}, {name}: {rate:,.0f} samples/s", file=sys.stderr, flush=True)
            self.measured.setdefault((name, peer), []).append(one)

    def _tune(self, peer: str) -> Found:
        """Run a peer with every setting, store each workload's best, and return what was measured with it."""
        reached: Found = {}
        if peer != OURS:
            self._commands[peer] = PEERS[peer].command(self._place)
        for setting in [{}] if peer == OURS else commands.settings(peer, self._place):
            for name, one in self._measure(peer, self._names, setting).items():
                if name not in reached or one["samples_per_second"] > reached[name]["samples_per_second"]:
                    reached[name], self.best[name, peer] = one, setting
        return reached

    def _again(self, peer: str) -> Found:
        """Run a peer with each workload's best setting."""
        reached: Found = {}
        for setting in _distinct(self.best[name, peer] for name in self._names):
            these = [name for name in self._names if self.best[name, peer] == setting]
            reached |= self._measure(peer, these, setting)
        return reached

    def _measure(self, peer: str, names: Sequence[str], setting: Setting) -> Found:
        if peer == OURS:
            return {name: self._main_job(name) for name in names}
        environment = {
            **setting,
            "HVDKIT_BENCH_SECONDS": str(self._seconds),
            "HVDKIT_BENCH_RANKS": str(self._place.ranks),
            "HVDKIT_BENCH_ADDRESSES": ",".join(self._place.addresses()),
        }
        command = [*self._commands[peer], ",".join(names)]
        found = results(jobs.run(command, environment).splitlines())
        lacking = set(names) - set(found)
        if lacking:
            raise UsageError(f"{' '.join(command)} told nothing of {', '.join(sorted(lacking))}")
        return found

    def _main_job(self, name: str) -> dict[str, Any]:
        flags, place = workloads.WORKLOADS[name].train_flags(), self._place
        found = jobs.train(commands.launcher(place), flags, self._seconds, prefix=commands.bound(place))
        return _summary(found)


def results(lines: Iterable[str]) -> Found:
    """Return what the output of a peer tells of each workload. Launchers put rank and time in front of lines."""
    found: Found = {}
    for line in lines:
        _, mark, content = line.partition("BENCH ")
        with contextlib.suppress(ValueError):  # another line with that word
            one = json.loads(content) if mark else {}
            if one:
                found[one["workload"]] = _summary(one)
    return found


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "samples_per_second": statistics.median(found["samples_per_second"]),
        "windows": found["samples_per_second"],
        "step_seconds": found["step_seconds"],
    }


def _distinct(settings: Iterable[Setting]) -> list[Setting]:
    return [dict(items) for items in sorted({tuple(sorted(setting.items())) for setting in settings})]


def chosen(arguments: argparse.Namespace) -> list[str]:
    """Return the names of the peers to measure, in order, with hvdkit's script, which all are compared with.

    Raises:
        UsageError: a name is unknown.
    """
    names = [name for name in arguments.peers.split(",") if name]
    for name in names:
        if name not in (OURS, *PEERS):
            raise UsageError(f"There is no peer {name!r}. Choose from {', '.join((OURS, *PEERS))}.")
    return list(dict.fromkeys([SCRIPT, *names]))

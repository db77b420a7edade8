"""Where the ranks of all peers run: their hosts and cores."""

import argparse
import dataclasses
import random
import socket

from hvdkit.bench import jobs
from hvdkit.errors import UsageError
from hvdkit.launch import hosts

_PORTS = range(20000, 32000)  # below those that Linux gives to clients


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the ranks run.

    Attributes:
        ranks: their number.
        hosts: hosts and their slots, as for `hvdkit launch -H`; empty for this host.
        cpus: the cores of all ranks in the order of the ranks, the same number for each; empty if they are not named.
    """

    ranks: int
    hosts: str = ""
    cpus: tuple[int, ...] = ()

    def host_of_each_rank(self) -> list[str]:
        """Return the name of each rank's host."""
        if not self.hosts:
            return ["127.0.0.1"] * self.ranks
        return [str(slot.hostname) for slot in hosts.assign(hosts.from_list(self.hosts), self.ranks)]

    def ranks_of_a_host(self) -> int:
        """Return the number of ranks of the host with the most."""
        names = self.host_of_each_rank()
        return max(names.count(name) for name in names)

    def launcher_options(self) -> list[str]:
        """Return the options of `hvdkit launch` and `horovodrun` that start the ranks here."""
        return ["-np", str(self.ranks), *(["-H", self.hosts] if self.hosts else [])]

    def addresses(self) -> list[str]:
        """Return an address of each rank, `host:port`. The ports are random, and free on this host."""
        free = (port for port in random.sample(_PORTS, len(_PORTS)) if _is_free(port))
        return [f"{host}:{next(free)}" for host in self.host_of_each_rank()]


def of(arguments: argparse.Namespace) -> Place:
    """Return the place that the options `--hosts`, `--ranks` and `--cpus` describe.

    Raises:
        UsageError: they have another form or contradict each other.
    """
    slots = sum(host.slots for host in hosts.from_list(arguments.hosts)) if arguments.hosts else 0
    ranks = arguments.ranks or slots or 2
    cpus = hosts.numbers(arguments.cpus, "--cpus") if arguments.cpus else []
    if len(cpus) % ranks:
        raise UsageError(
            f"--cpus {arguments.cpus} names {len(cpus)} core(s) for {ranks} ranks. Name the same number for each rank, "
            f"as in --cpus 0,1 for two ranks."
        )
    missing = set(cpus) - set(jobs.usable_cores())
    if missing and not arguments.hosts:
        raise UsageError(
            f"--cpus {arguments.cpus} names {', '.join(map(str, sorted(missing)))}, and this host has the cores "
            f"{', '.join(map(str, jobs.usable_cores()))}."
        )
    place = Place(ranks, arguments.hosts, tuple(cpus))
    place.host_of_each_rank()  # raises if the hosts have too few slots
    return place


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True

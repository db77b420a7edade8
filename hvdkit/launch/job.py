"""One job from start to end: agents on its hosts, ranks under the agents, and one verdict at the end.

One loop takes events off a queue: messages of agents, and signals. Nothing else changes a job's state.
"""

import contextlib
import dataclasses
import math
import queue
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from hvdkit import outcome
from hvdkit.errors import UsageError
from hvdkit.launch import agent, binding, dry_run, environment, failures
from hvdkit.launch.console import Console
from hvdkit.launch.failures import Failure
from hvdkit.launch.hosts import Host, assign
from hvdkit.launch.link import (
    GONE,
    Event,
    Link,
    address_of,
    is_this_host,
    own_address_towards,
)
from hvdkit.launch.shells import Shell
from hvdkit.outcome import Failed
from hvdkit.signals import SIGNALS

_ANSWER_SECONDS = 30  # at least, for the agent of a busy host to answer; ssh notices sooner that a host is down
_SPEAK_SECONDS = 4.0  # for the other ranks to report why one failed, before they are ended
_END_SECONDS = 4.0  # from SIGTERM to SIGKILL after a failure or Ctrl-C
_LATE_SECONDS = 2.0  # for an agent to finish
_TICK = 0.25


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a job; see `options.py` for each."""

    command: list[str]
    hosts: list[Host]
    ranks: int
    directory: str
    shell: Shell
    python: str
    interface: str | None
    bind: str
    start_limit: int
    stall_limit: float | None
    silence: float
    is_watched: bool
    stop_limit: float = 30.0  # from SIGTERM to SIGKILL after a stop request (SIGTERM): ranks save first
    elastic: str | None = None
    cores: list[int] | None = None
    gpus: list[str] | None = None


class UnfitHostError(UsageError):
    """A host cannot be reached or cannot run the job; `host` is its name."""

    def __init__(self, host: str, message: str) -> None:
        super().__init__(message)
        self.host = host


class Lost(Exception):  # noqa: N818 - says what happened
    """The job cannot continue, though no rank failed. The message says why and how to fix it.

    `hosts` are the names of the hosts to leave out, if hosts are the cause.
    """

    def __init__(self, message: str, hosts: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.hosts = hosts


class Stopped(KeyboardInterrupt):
    """A signal came before the ranks were started.

    Args:
        number: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = exit_code_before_start(number)


@dataclasses.dataclass(frozen=True)
class Regroup:
    """An event: the job's hosts change, so its ranks must save and exit."""

    why: str


class Job:
    """A job whose ranks communicate over Gloo.

    Args:
        settings: what to run, and where.
        console: takes the ranks' output.

    Attributes:
        events: messages of agents and signal numbers, for the loop.
        lost_hosts: after `run`, the names of hosts that became unreachable, or whose ranks did not start.
        regrouped: whether the ranks were asked to exit because the hosts change.
    """

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.slots = assign(settings.hosts, settings.ranks)
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.links: list[Link] = []
        self._names: dict[Link, str] = {}
        self._addresses: dict[str, str] = {}
        self._rendezvous: Any = None
        self._ended: dict[int, int] = {}
        self._closed: set[int] = set()
        self._failures: list[Failure] = []
        self._known_before: int | None = None  # number of failures when the watchdog named the cause
        self._ends_at: float | None = None  # when the remaining ranks are told to end
        self._over_at: float | None = None  # when to stop waiting for agents
        self._looked = time.monotonic()
        self._stopped_by = 0
        self._stopped_early_by = 0  # a stop request that came before all ranks had called hvd.init()
        self._started = math.inf  # time.monotonic() at which the ranks were started
        self._is_unheard = False  # whether it is said that no rank calls hvd.init()
        self._lost = ""
        self._is_closed = threading.Event()
        self.lost_hosts: list[str] = []
        self.regrouped = False

    # ---- Start -------------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Starts an agent on each host and waits for its description of the host.

        Raises:
            UsageError: a host cannot be reached, or cannot run the job.
        """
        used = [host.name for host in self.settings.hosts if any(slot.hostname == host.name for slot in self.slots)]
        for name in used:
            self._addresses[name] = address_of(name, self.settings.shell)
        for name, address in self._addresses.items():
            is_here = is_this_host(name, address)
            python = sys.executable if is_here else self.settings.python
            link = Link(name, None if is_here else self.settings.shell, python, self.events)
            self.links.append(link)
            self._names[link] = name
            link.send(
                ask={
                    "peer": self._own_address(link),
                    "interface": self.settings.interface,
                    "directory": self.settings.directory,
                    "silence": self.settings.silence if link.is_remote else 0,
                }
            )
        self._hear_hosts()
        for link in self.links:
            self._check_host(link)
        threading.Thread(target=self._beat, daemon=True).start()

    def _own_address(self, link: Link) -> str:
        """The address by which a host reaches the launcher; loopback if the job has no other host."""
        if link.is_remote:
            return own_address_towards(self._addresses[link.host])
        others = [a for name, a in self._addresses.items() if not is_this_host(name, a)]
        return own_address_towards(others[0]) if others else "127.0.0.1"

    def _hear_hosts(self) -> None:
        limit = max(self.settings.start_limit, _ANSWER_SECONDS)
        until = time.monotonic() + limit
        while missing := [link for link in self.links if link.about is None]:
            try:
                event = self.events.get(timeout=max(until - time.monotonic(), 0.01))
            except queue.Empty:
                names = ", ".join(link.host for link in missing)
                trial = shlex.join(self.settings.shell.command(missing[0].host, "true"))
                raise UnfitHostError(
                    missing[0].host,
                    f"No answer from {names} within {limit} s. Does this work: {trial}? --start-timeout=SECONDS gives "
                    f"more time.",
                ) from None
            self._on_event_of_start(event)

    def _on_event_of_start(self, event: Any) -> None:
        if isinstance(event, int):
            raise Stopped(event)
        if event.kind == GONE:
            raise UnfitHostError(event.link.host, event.link.complaint())
        if event.kind == agent.HELLO:
            event.link.about = event.content()

    def _check_host(self, link: Link) -> None:
        about = link.about or {}
        several = len(self.links) > 1
        if not about["has_directory"]:
            raise UnfitHostError(
                link.host,
                f"Host {link.host} has no directory {self.settings.directory}, in which the command runs. Start the "
                f"launcher in a directory that all hosts have, or name one: --directory=DIR.",
            )
        if self.settings.interface and about["interface"] != self.settings.interface:
            raise UnfitHostError(
                link.host,
                f"Host {link.host} has no network interface {self.settings.interface} with an IPv4 address; it has "
                f"{', '.join(about['interfaces'])}. Name one that all hosts have, or leave --interface out.",
            )
        if several and str(about["own_name"] or "127").startswith("127."):
            raise UnfitHostError(
                link.host,
                f"On host {link.host} its own name, {about['hostname']}, resolves to {about['own_name'] or 'nothing'}, "
                f"and Horovod's Gloo would listen there, where no other host can reach it. On {link.host}, let "
                f"/etc/hosts say: {about['source']} {about['hostname']}.",
            )

    def _beat(self) -> None:
        """Sends heartbeats from a thread, so that a terminal that blocks the loop does not delay them."""
        while not self._is_closed.wait(agent.BEAT_SECONDS):
            for link in self.links:
                if link.is_remote and not link.is_gone:
                    link.send(beat=1)

    def start(self) -> None:
        """Starts the ranks."""
        from hvdkit.launch.rendezvous import Rendezvous

        addresses = {self._own_address(link) for link in self.links}
        addresses |= {str(link.about["source"]) for link in self.links if link.about}
        self._rendezvous = Rendezvous(self.slots, addresses)
        self._started = time.monotonic()
        own = environment.own_environment()
        for link in self.links:
            mine = self.placed_on(link)
            link.send(
                start={
                    "command": self.settings.command,
                    "directory": self.settings.directory,
                    "own_env": not link.is_remote,
                    "env": {
                        **(environment.exported(own) if link.is_remote else own),
                        **self.common_environment(),
                        **self._rendezvous.environment(self._own_address(link)),
                        **self._interface_environment(link),
                    },
                    "ranks": [
                        {"rank": slot.rank, "env": environment.rank_environment(slot, bound), "cores": bound.cores}
                        for slot, bound in mine
                    ],
                }
            )

    def placed_on(self, link: Link) -> list[tuple[Any, binding.Binding]]:
        """The ranks of a host with their bindings."""
        mine = [slot for slot in self.slots if slot.hostname == self._names[link]]
        s = self.settings
        return list(zip(mine, binding.bindings(link.about or {}, len(mine), s.bind, s.cores, s.gpus), strict=True))

    def common_environment(self) -> dict[str, str]:
        """The variables that all ranks have."""
        return {
            **environment.job_environment(
                environment.own_environment(),
                start_limit=self.settings.start_limit,
                stall_limit=self.settings.stall_limit,
            ),
            **environment.terminal_environment(self.settings.is_watched),
            outcome.VARIABLE: outcome.STDERR,
            **({"HVDKIT_ELASTIC": self.settings.elastic} if self.settings.elastic else {}),
            **({"HVDKIT_RANK_LOGS": str(self.console.logs.resolve())} if self.console.logs else {}),
        }

    def _interface_environment(self, link: Link) -> dict[str, str]:
        interface = (link.about or {})["interface"]
        return {"HOROVOD_GLOO_IFACE": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}

    def description(self) -> str:
        """What `--dry-run` prints; call `connect` first."""
        ranks = [
            (
                slot,
                bound,
                f"by {self.settings.shell.program} as {self._addresses[link.host]}"
                if link.is_remote
                else "is this host",
            )
            for link in self.links
            for slot, bound in self.placed_on(link)
        ]
        link = self.links[0]
        common = {
            **self.common_environment(),
            **self._interface_environment(link),
            environment.SECRET: f"{self._own_address(link)}:PORT/TOKEN",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": "PORT",
        }
        return dry_run.describe(self.settings.command, common, ranks)

    # ---- The loop ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Waits for the end of the job and returns the launcher's exit code."""
        while not self._is_over():
            try:
                event = self.events.get(timeout=_TICK)
            except queue.Empty:
                event = None
            try:
                if isinstance(event, int):
                    self._on_signal(event)
                elif isinstance(event, Regroup):
                    self._on_regroup(event)
                elif event is not None:
                    self._on_event(event)
                self._keep_time()
            except Lost as lost:
                self._lose(lost)
        for rank in range(self.settings.ranks):
            self.console.finish(rank)
        return self._conclude()

    def close(self) -> None:
        """Ends all remaining agents and ranks, on all hosts at once."""
        self._is_closed.set()
        for link in self.links:
            link.send(end=0)
            link.hang_up()
        until = time.monotonic() + _LATE_SECONDS
        for link in self.links:
            link.close(until)
        if self._rendezvous is not None:
            self._rendezvous.close()

    def _is_over(self) -> bool:
        if self._over_at is not None and time.monotonic() > self._over_at:
            return True
        gone = {slot.rank for link in self.links if link.is_gone for slot in self.slots if slot.hostname == link.host}
        return len(self._closed | gone) == len(self.slots)

    def _on_event(self, event: Event) -> None:
        if event.kind in (agent.OUT, agent.ERR):
            self.take_output(event.rank, event.body, is_error=event.kind == agent.ERR)
        elif event.kind == agent.EXIT:
            self._on_exit(event.rank, event.content()["code"])
        elif event.kind == agent.CLOSED:
            self._closed.add(event.rank)
        elif event.kind == agent.REFUSED:
            raise Lost(
                f"Host {event.link.host} cannot start {self.settings.command[0]!r}: {event.content()['error']}. Name a "
                f"program that every host has."
            )
        elif event.kind == GONE:
            event.link.is_gone = True
            left = [s.rank for s in self.slots if s.hostname == event.link.host and s.rank not in self._ended]
            if left and self._ends_at is None:
                raise Lost(
                    f"{_ranks(left)} on host {event.link.host} can no longer be reached. {event.link.complaint()}",
                    [event.link.host],
                )

    def take_output(self, rank: int, data: bytes, *, is_error: bool) -> None:
        """Passes a rank's output to the console."""
        self.console.feed(rank, data, is_error=is_error)
        if self.console.cause and self._known_before is None:
            self._known_before = len(self._failures)

    def _on_exit(self, rank: int, code: int) -> None:
        self._ended[rank] = code
        # Once the launcher ends the ranks, their exit codes say nothing about the cause.
        is_ours = self._over_at is not None
        if code != 0 and not is_ours:
            self._failures.append(Failure(rank, code))
            if self._ends_at is None:
                # After a stop request ranks exit one by one, and the last may still be saving.
                patience = self.settings.stop_limit if code == outcome.PREEMPTED else _SPEAK_SECONDS
                self._ends_at = time.monotonic() + patience

    def _on_signal(self, number: int) -> None:
        if number in SIGNALS and self._is_starting():
            self._stopped_early_by = self._stopped_early_by or number
        if number == signal.SIGUSR1:
            for link in self.links:
                link.send(signal=int(number))
            return
        self.console.cancelled = True
        is_first = not self._stopped_by
        self._stopped_by = self._stopped_by or number
        if is_first:
            self._end(self.settings.stop_limit if number == signal.SIGTERM else _END_SECONDS)
        elif number == signal.SIGINT:  # a person; others repeat, as where a scheduler and a wrapper both send SIGTERM
            self._end(0)

    def _is_starting(self) -> bool:
        """Whether some rank has not called `hvd.init()` yet, as far as the rendezvous shows, and none has ended."""
        missing = self._rendezvous is not None and len(self._rendezvous.arrived) < len(self.slots)
        return missing and not (self._ended or self._is_unheard)

    def regroup(self, why: str) -> None:
        """Asks the ranks to save and exit because the job's hosts change. Call it from any thread."""
        self.events.put(Regroup(why))

    def _on_regroup(self, event: Regroup) -> None:
        if self._ends_at is None and not self._ended:  # the job is not ending anyway
            say(f"the hosts change ({event.why}): the ranks save and exit.")
            self.regrouped = self.console.cancelled = True
            self._end(self.settings.stop_limit)

    def _keep_time(self) -> None:
        now = time.monotonic()
        if self._ends_at is not None and now > self._ends_at and self._over_at is None:
            self._end(_END_SECONDS)
        if self._over_at is None and self._ends_at is None:
            self._check_silence()
            self._check_start(now)

    def _check_silence(self) -> None:
        limit = self.settings.silence
        now, before = time.monotonic(), self._looked
        self._looked = now
        if now - before > limit / 2:  # the launcher itself was suspended (Ctrl-Z): read the heartbeats first
            for link in self.links:
                link.heard = now
        for link in self.links:
            if link.is_remote and limit and link.silent_for() > limit:
                raise Lost(
                    f"Host {link.host} has sent no heartbeat for {limit:g} s: it is down, unresponsive or cut off. Its "
                    f"ranks stop by themselves. Start the job without it, or when it is back.",
                    [link.host],
                )

    def _check_start(self, now: float) -> None:
        arrived = dict(self._rendezvous.arrived) if self._rendezvous is not None else {}
        if not arrived and now - self._started > self.settings.start_limit and not self._is_unheard:
            self._say_unheard()
        missing = [slot for slot in self.slots if slot.rank not in arrived]
        if arrived and missing and now - min(arrived.values()) > self.settings.start_limit:
            hosts = sorted({slot.hostname for slot in missing})
            raise Lost(
                f"{_ranks([slot.rank for slot in missing])} on {', '.join(hosts)} did not reach hvd.init() within "
                f"{self.settings.start_limit} s after the first rank. Check what they do there; "
                f"--start-timeout=SECONDS gives more time.",
                hosts,
            )

    def _say_unheard(self) -> None:
        """Says, once, that the ranks are a Python program's that has not called `hvd.init()`."""
        self._is_unheard = True
        program = failures.python_program(self.settings.command)
        if program and len(self.slots) > 1:
            say(
                f"no rank has called hvd.init(). Without it the {len(self.slots)} processes of {program} know nothing "
                f"of each other, and each trains a model of its own. hvdkit lint says which lines to write."
            )

    def _end(self, grace: float) -> None:
        if self._ends_at is None:
            self._ends_at = time.monotonic()
        self._over_at = time.monotonic() + grace + _LATE_SECONDS
        for link in self.links:
            link.send(end=grace)

    def _lose(self, lost: Lost) -> None:
        self.lost_hosts.extend(lost.hosts)
        if not self._lost and not self._failures:
            self._lost = str(lost)
        self._end(_END_SECONDS)

    # ---- The end -----------------------------------------------------------------------------------------------------

    def _conclude(self) -> int:
        if self.regrouped and not self._stopped_by:
            return outcome.PREEMPTED if any(self._ended.values()) else 0
        if self._stopped_by:
            return self._conclude_stop()
        if self._ended_before_it_began():
            name = signal.Signals(self._stopped_early_by).name
            say(f"{name} came before all ranks had called hvd.init(), so nothing is lost: run the same command again.")
            return outcome.PREEMPTED
        if self._lost:
            return self._give_up(self._lost, outcome.STALLED if self._ended or self._has_begun() else outcome.USAGE)
        try:
            first = self.verdict()
        except Lost as lost:
            self.lost_hosts.extend(lost.hosts)
            return self._give_up(str(lost), outcome.STALLED if lost.hosts else outcome.USAGE)
        if first is None:
            if self._rendezvous is not None and not (self._rendezvous.arrived or self._is_unheard):
                self._say_unheard()
            return 0
        if first.exit_code not in outcome.REPORTED:
            self._show_last_words(first)
        outcome.tell(self._outcome(first))
        return first.exit_code

    def _conclude_stop(self) -> int:
        say(f"ended by {signal.Signals(self._stopped_by).name}.")
        if self._ended_before_it_began():
            return outcome.PREEMPTED
        own = [code for _, code in sorted(self._ended.items()) if code > 0]
        if self._ended and not any(self._ended.values()) and len(self._ended) == len(self.slots):
            return 0
        return own[0] if own else 128 + self._stopped_by

    def _ended_before_it_began(self) -> bool:
        """Whether a stop request ended the ranks before all had called `hvd.init()`."""
        codes = {-self._stopped_early_by, -int(signal.SIGTERM), outcome.PREEMPTED}  # SIGTERM is also the launcher's own
        return bool(self._stopped_early_by and self._ended) and set(self._ended.values()) <= codes

    def _give_up(self, why: str, code: int) -> int:
        say(why)
        outcome.tell(Failed("launch", code, why))
        return code

    def _outcome(self, first: Failure) -> Failed:
        """The failure as its rank or the watchdog reported it; without a report, as the launcher saw it."""
        for told in self.console.failures:
            if told.rank in (None, first.rank) and told.code == first.exit_code:
                return dataclasses.replace(told, lines=0)
        return Failed("rank", first.exit_code, self._words(first), first.rank, self.host_of(first.rank))

    @staticmethod
    def _words(first: Failure) -> str:
        return f"was the first to fail, {first.words()}"

    def _has_begun(self) -> bool:
        return self._rendezvous is not None and "cannot start" not in self._lost

    def verdict(self) -> Failure | None:
        """The failure that ended the job; None if no rank failed."""
        if not self._failures:
            return None
        return failures.first(self._failures, self.console.cause, self._known_before or 0, self._ended)

    def host_of(self, rank: int) -> str:
        """The name of a rank's host, as the user gave it; for localhost, the host's own name."""
        given = next(str(slot.hostname) for slot in self.slots if slot.rank == rank)
        link = next(link for link in self.links if link.host == given)
        return str((link.about or {}).get("hostname", given)) if given == "localhost" else given

    def _show_last_words(self, first: Failure) -> None:
        if lines := self.console.last_lines(first.rank):
            log = f" ({self.console.logs}/rank-{first.rank:04d}.log has all)" if self.console.logs else ""
            say(f"the last lines of rank {first.rank}{log}:")
            with contextlib.suppress(OSError):
                print(*(f"    {line}" for line in lines), sep="\n", file=sys.stderr)
        if package := failures.missing_package(lines):
            program = shlex.quote(self.settings.command[0])
            say(
                f"the Python of `{program}` has no {package}; the launcher runs in {sys.prefix}, which has. Activate "
                f"that environment, or give {sys.executable} in the command."
            )
        say(f"rank {first.rank} on host {self.host_of(first.rank)} {self._words(first)}.")


def _ranks(numbers: Sequence[int]) -> str:
    named = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"Rank {named}" if len(numbers) == 1 else f"Ranks {named}"


def exit_code_before_start(number: int) -> int:
    """Returns the launcher's exit code for a signal that comes while no rank runs: there is nothing to save."""
    return outcome.PREEMPTED if number in SIGNALS else 128 + number


def say(text: str) -> None:
    """Prints a message of the launcher to stderr."""
    with contextlib.suppress(OSError):  # a full disk, or a closed pipe, must not end the job
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(f"hvdkit.launch: {text}", file=sys.stderr, flush=True)

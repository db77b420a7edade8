"""Asks all hosts all questions, in parallel where questions do not disturb each other, and collects the answers.

This module judges nothing; see `checks/`. If a host or a question fails, it records the reason and continues with the
others. Every wait has a time limit.
"""

import dataclasses
import functools
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hvdkit.doctor import ranks
from hvdkit.doctor.connection import LOADER, Connection, Lost
from hvdkit.doctor.findings import Findings, HostFindings
from hvdkit.errors import UsageError
from hvdkit.launch.environment import exported
from hvdkit.launch.hosts import Host, assign
from hvdkit.launch.link import address_of, is_this_host, own_address_towards
from hvdkit.launch.shells import Ssh

HELLO_SECONDS = 20.0
ANSWER_SECONDS = 20.0
LOAD_SECONDS = 150.0  # for TensorFlow, on a busy host with a cold disk
DATASET_SECONDS = 30.0
ALLREDUCE_SECONDS = 30.0
_CLOCK_READINGS = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to examine.

    Attributes:
        hosts: names and numbers of ranks.
        python: the interpreter that the job uses, on every host.
        directory: where the job's commands run, on every host.
        workdir: an absolute path.
        dataset, data_dir: as for the training job; None to read no data set.
        schema: arguments of the data set's `hvdkit.data.sources.Schema`.
        ssh: how to reach other hosts.
        loads: whether to load TensorFlow. Without it no data sets are read and no ranks are started.
    """

    hosts: list[Host]
    python: str
    directory: str
    workdir: str
    dataset: str | None
    data_dir: str | None
    ssh: Ssh
    schema: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loads: bool = True


class Examination:
    """One examination of some hosts."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.findings = Findings(
            {name: getattr(settings, name) for name in ("python", "directory", "workdir", "dataset", "data_dir")},
            {host.name: HostFindings(host.slots) for host in settings.hosts},
        )
        self._token = secrets.token_hex(32)
        self._mark = secrets.token_hex(4)
        self._connections: dict[str, Connection] = {}

    def run(self) -> Findings:
        """Examines the hosts and returns the findings. All processes on the hosts have ended by then."""
        began = time.monotonic()
        names = list(self.findings.hosts)
        with ThreadPoolExecutor(3 * len(names)) as pool:
            try:
                list(pool.map(self._connect, names))
                loading = [pool.submit(self._load, name) for name in self._connections]
                list(pool.map(self._ask_alone, self._connections))
                self._ask_of_others()
                self._stream()
                for work in loading:
                    work.result()
                list(pool.map(self._read_dataset, self._connections))
                self._allreduce()
            finally:  # inside the pool, so that threads that wait for an answer end, too
                for connection in self._connections.values():
                    connection.close()
        self.findings.seconds = round(time.monotonic() - began, 1)
        return self.findings

    # ---- Each host by itself -----------------------------------------------------------------------------------------

    def _connect(self, name: str) -> None:
        host = self.findings.hosts[name]
        try:
            host.is_here = is_this_host(name, address_of(name, self.settings.ssh))
        except UsageError:
            host.is_here = False  # ssh reports the cause in more detail
        ssh = None if host.is_here else self.settings.ssh
        try:
            connection = Connection(name, ssh, self.settings.python, self._token)
        except FileNotFoundError as error:
            host.unreachable = f"{error.filename} is not installed"
            return
        try:
            host.answers["host"] = connection.hello.result(HELLO_SECONDS)
        except Lost as why:
            host.unreachable = str(why)
        except TimeoutError:
            host.unreachable = f"Connection timed out: no answer within {HELLO_SECONDS:g} s"
        if host.unreachable is not None:
            connection.close()
            return
        self._connections[name] = connection
        self._take(name, "clock", lambda: _read_clock(connection))
        env = {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
        env |= {} if host.is_here else exported(dict(os.environ))
        command = [self.settings.python, "-c", LOADER, *([] if self.settings.loads else ["--versions"])]
        program = Path(ranks.__file__).read_text()
        self._ask(name, "start_ranks", command=command, program=program, env=env, directory=self.settings.directory)

    def _load(self, name: str) -> None:
        """Waits until the host has loaded TensorFlow, then asks for the GPUs that TensorFlow sees."""
        host = self.findings.hosts[name]
        if "start_ranks" in host.problems:
            host.problems["versions"] = host.problems.pop("start_ranks")
            return
        if self._take(name, "versions", lambda: self._hear(name)) and self.settings.loads:
            self._take(name, "build", lambda: _content(self._hear(name)))
        if "build" in host.answers:
            order = {"do": "gpus", "limit": ANSWER_SECONDS}
            self._take(name, "usable_gpus", lambda: _content(self._hear(name, order)))

    def _ask_alone(self, name: str) -> None:
        workdir = self.settings.workdir
        questions: dict[str, dict[str, Any]] = {
            "names": {"names": list(self.findings.hosts)},
            "gpus": {},
            "shm": {},
            "disk": {"workdir": workdir},
            "files": {},
            "workdir": {"workdir": workdir, "mark": self._mark},
            "listen": {},
        }
        asked = {what: self._connections[name].ask(what, **arguments) for what, arguments in questions.items()}
        for what, future in asked.items():
            self._take(name, what, functools.partial(_wait, future, ANSWER_SECONDS))

    def _read_dataset(self, name: str) -> None:
        if self.settings.dataset and "build" in self.findings.hosts[name].answers:
            order = {
                "do": "dataset",
                "dataset": self.settings.dataset,
                "data_dir": self.settings.data_dir,
                "schema": dict(self.settings.schema),
                "limit": DATASET_SECONDS,
            }
            self._take(name, "dataset", lambda: _content(self._hear(name, order)))

    # ---- Hosts with each other ---------------------------------------------------------------------------------------

    def _ask_of_others(self) -> None:
        """Checks marks, ssh and ports from all hosts at once."""
        names = list(self._connections)
        listening = self.findings.answered("listen")
        patience = self.settings.ssh.patience + 3.0
        asked: dict[tuple[str, str], Future[Any]] = {}
        for place, name in enumerate(names):
            connection = self._connections[name]
            others = (
                names[place + 1 :] + names[:place]
            )  # each starts with a different host, since sshd accepts few at once
            asked["marks", name] = connection.ask("marks", workdir=self.settings.workdir, mark=self._mark)
            commands = {other: self.settings.ssh.command(other, "true") for other in others}
            asked["ssh", name] = connection.ask("ssh", commands=commands, seconds=patience)
            peers = [
                (o, address, port) for o in others for address, ports in listening.get(o, {}).items() for port in ports
            ]
            asked["reach", name] = connection.ask("reach", peers=peers)
        seconds = ANSWER_SECONDS + patience * len(names) / 4
        for (question, name), future in asked.items():
            self._take(name, question, functools.partial(_wait, future, seconds))
        for name in names:
            self._ask(name, "unmark")
            links = self.findings.hosts[name].answers.pop("reach", [])
            self.findings.links += [{"from": name, **link} for link in links]

    def _stream(self) -> None:
        """Measures the bandwidth of each pair, in rounds in which each host sends once and receives once."""
        names = list(self._connections)
        for distance in range(1, len(names)):
            pairs = [(name, names[(place + distance) % len(names)]) for place, name in enumerate(names)]
            if len(names) == 2:  # otherwise both directions would share a link or a core
                self._stream_at_once(pairs[:1])
                pairs = pairs[1:]
            self._stream_at_once(pairs)

    def _stream_at_once(self, pairs: Iterable[tuple[str, str]]) -> None:
        asked = []
        for one, other in pairs:
            good = self.findings.good_addresses(other)
            links = [link for link in self.findings.links if (link["from"], link["to"]) == (one, other)]
            if link := next((link for link in links if link["address"] in good), None):
                future = self._connections[one].ask("stream", address=link["address"], port=link["port"])
                asked.append(({"from": one, "to": other}, future))
        for pair, future in asked:
            try:
                self.findings.streams.append({**pair, **_wait(future, ANSWER_SECONDS)})
            except Lost as why:
                self.findings.streams.append({**pair, "problem": str(why)})

    def _allreduce(self) -> None:
        """Runs an allreduce over all ranks."""
        obstacle = self._obstacle()
        if obstacle:
            self.findings.exchange = {"skipped": obstacle}
            return
        try:
            from hvdkit.launch.rendezvous import Rendezvous
        except ImportError as error:  # the doctor's host need not run ranks
            self.findings.exchange = {"skipped": f"the ranks' rendezvous needs Horovod here: {error}"}
            return
        slots = assign(self.settings.hosts, sum(host.slots for host in self.settings.hosts))
        sources = {name: self._address(name) for name in self._connections}
        # A host with several interfaces may come from any of them.
        there = [
            each["address"] for name in sources for each in self.findings.hosts[name].answers["host"]["interfaces"]
        ]
        rendezvous = Rendezvous(slots, {"127.0.0.1", *there, *(self._own_address(name) for name in sources)})
        try:
            asked = {}
            for name, connection in self._connections.items():
                common = {**rendezvous.environment(self._own_address(name)), **self._interface(name, sources[name])}
                mine = [{**_rank_environment(slot), **common} for slot in slots if slot.hostname == name]
                order = {"do": "allreduce", "ranks": mine, "limit": ALLREDUCE_SECONDS}
                asked[name] = connection.ask("ranks", order=order)
            found = [{"host": name, **one} for name, future in asked.items() for one in _ranks(future)]
            self.findings.exchange = {"ranks": found}
        finally:
            rendezvous.close()

    def _obstacle(self) -> str | None:
        """Why the ranks cannot be started; None if they can."""
        if not self.settings.loads:
            return "Horovod was not loaded (--skip build)"
        for name, host in self.findings.hosts.items():
            if host.unreachable is not None:
                return f"{name} was not reached"
            if "build" not in host.answers:
                return f"Horovod cannot be loaded on {name}"
            if len(self.findings.hosts) > 1 and not self.findings.good_addresses(name):
                return f"{name} has no address at which all others reach it"
        return None if "build" in self.findings.hosts[next(iter(self._connections))].answers else "no host is left"

    def _address(self, name: str) -> str:
        return (self.findings.good_addresses(name) or ["127.0.0.1"])[0]

    def _own_address(self, name: str) -> str:
        """The address at which a host reaches the doctor: the source of the doctor's ssh connection."""
        here = self.findings.here
        if len(self._connections) == 1 and here:
            return "127.0.0.1"
        came_from = self.findings.hosts[name].answers["host"]["client"]
        return self._address(here) if here else came_from or own_address_towards(self._address(name))

    def _interface(self, name: str, address: str) -> dict[str, str]:
        there = self.findings.hosts[name].answers["host"]["interfaces"]
        interface = next((each["name"] for each in there if each["address"] == address), "lo")
        return {"HOROVOD_GLOO_IFACE": interface, "NCCL_SOCKET_IFNAME": interface}

    # ---- Questions and answers ---------------------------------------------------------------------------------------

    def _ask(self, name: str, question: str, **arguments: Any) -> None:
        future = self._connections[name].ask(question, **arguments)
        self._take(name, question, lambda: _wait(future, ANSWER_SECONDS))

    def _hear(self, name: str, order: dict[str, Any] | None = None) -> Any:
        return _wait(self._connections[name].ask("ranks", order=order), LOAD_SECONDS)

    def _take(self, name: str, question: str, answer: Callable[[], Any]) -> bool:
        """Records an answer, or why there is none; returns whether there is one."""
        host = self.findings.hosts[name]
        try:
            found = answer()
        except Lost as why:
            host.problems[question] = str(why)
            return False
        if found is not None:
            host.answers[question] = found
        return True


def _wait(future: "Future[Any]", seconds: float) -> Any:
    try:
        return future.result(seconds)
    except TimeoutError:
        raise Lost(f"no answer within {seconds:g} s") from None


def _content(said: dict[str, Any]) -> Any:
    """The answer in a line of the ranks' program.

    Raises:
        Lost: the line holds a problem instead.
    """
    if "problem" in said:
        raise Lost(said["problem"])
    return said["answer"]


def _ranks(future: "Future[Any]") -> list[dict[str, Any]]:
    try:
        said = _wait(future, ALLREDUCE_SECONDS + 10)
    except Lost as why:
        return [{"problem": str(why)}]
    return [{**one.pop("answer", {}), **one} for one in said]


def _read_clock(connection: Connection) -> dict[str, float]:
    """How far a host's clock is ahead of the doctor's, and the largest error of that value, both in seconds.

    The host read its clock between the question and the answer. The middle is the best estimate, and half of the
    shortest round trip is the largest error (F. Cristian, "Probabilistic clock synchronization", 1989).
    """
    readings = []
    for _ in range(_CLOCK_READINGS):
        asked = time.time()
        there = float(_wait(connection.ask("time"), ANSWER_SECONDS))
        answered = time.time()
        readings.append((answered - asked, there - (asked + answered) / 2))
    round_trip, ahead = min(readings)
    return {"ahead": ahead, "error": round_trip / 2}


def _rank_environment(slot: Any) -> dict[str, str]:
    names = ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size", "hostname")
    return {
        **{f"HOROVOD_{name.upper()}": str(getattr(slot, name)) for name in names},
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(int(ALLREDUCE_SECONDS / 2)),
    }

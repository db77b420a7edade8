"""Elastic jobs: they restart on the available hosts after failures and changes of hosts, until they succeed.

If a rank or host is lost, the job ends on all hosts, and the next start resumes from the last checkpoint on the
remaining hosts. A script or a host file announces hosts that are added or removed. The ranks are then asked to save
first (SIGTERM), so no step is repeated. Each start uses new processes, so no state of the old ones, such as Horovod's
background thread, can disturb the new ones. TorchElastic restarts in the same way. Horovod's own elastic mode differs:
it repairs the state of running processes.
"""

import collections
import contextlib
import dataclasses
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from hvdkit import outcome
from hvdkit.errors import UsageError
from hvdkit.launch import hosts
from hvdkit.launch.hosts import Host
from hvdkit.launch.job import Job, Settings, UnfitHostError, exit_code_before_start, say
from hvdkit.launch.link import is_reachable
from hvdkit.launch.shells import Shell

POLL_SECONDS = 2.0
_REST_SECONDS = 30.0  # before a lost host is used again; doubles each time
_SCRIPT_SECONDS = 60  # for a discovery script to answer


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a job may restart.

    Attributes:
        least: the least number of ranks; below it, the job waits for hosts.
        most: the largest number of ranks; None for all slots.
        restarts: how often to restart after a failure. Restarts for a change of hosts do not count.
        patience: seconds to wait for enough hosts.
        may_change: whether the job may start with other hosts than given, or with fewer ranks.
    """

    least: int
    most: int | None
    restarts: int
    patience: float
    may_change: bool


class TooFewHostsError(UsageError):
    """There were not enough hosts for too long."""


class Roster:
    """The currently listed hosts, without those that cannot be used.

    Args:
        discover: lists hosts. A host that was listed before keeps its position, so rank 0 stays on its host.
        shell: how to check whether a host is back.
    """

    def __init__(self, discover: Callable[[], Sequence[Host]], shell: Shell) -> None:
        self._discover = discover
        self._shell = shell
        self._listed: list[Host] = []
        self._left_out: dict[str, float] = {}  # time.monotonic() since which a host is left out
        self._times: collections.Counter[str] = collections.Counter()
        self._complained = ""
        self._lock = threading.Lock()

    def available(self) -> list[Host]:
        """The hosts that can be used, as far as known."""
        with self._lock:
            self._refresh()
            return [host for host in self._listed if host.name not in self._left_out]

    def leave_out(self, name: str) -> None:
        """Leaves out a host until it can be reached again and its rest time is over."""
        with self._lock:
            self._left_out[name] = time.monotonic()
            self._times[name] += 1

    def look_after(self, *, in_need: bool = False) -> None:
        """Takes back hosts that can be reached again; with `in_need`, before their rest time is over, too."""
        for name, since in list(self._left_out.items()):
            has_rested = time.monotonic() - since > _REST_SECONDS * 2 ** (self._times[name] - 1)
            if (has_rested or in_need) and is_reachable(name, self._shell):
                with self._lock:
                    self._left_out.pop(name, None)

    def _refresh(self) -> None:
        try:
            found = {host.name: host for host in self._discover()}
        except UsageError as error:
            if not self._listed:
                raise
            if str(error) != self._complained:
                say(f"{error} Keeping the previous hosts.")
            self._complained = str(error)
            return
        known = [found.pop(host.name) for host in self._listed if host.name in found]
        self._listed = [*known, *found.values()]


class ElasticJob:
    """A job with all its restarts.

    Args:
        settings: as for a `Job`, with the hosts and ranks of the first start.
        policy: how it may restart.
        roster: the hosts.
        make: creates the job of one start.
    """

    def __init__(self, settings: Settings, policy: Policy, roster: Roster, make: Callable[[Settings], Job]) -> None:
        self.settings = settings
        self.policy = policy
        self._roster = roster
        self._make = make
        self._most = policy.most
        self._job: Job | None = None
        self._signal = 0
        self._failed = 0
        self._has_run = False
        self._before: set[str] = set()  # the hosts of the previous start
        self._newcomers: list[str] = []
        self._waits_since: float | None = None
        self._last_words = ""

    def receive(self, number: int) -> None:
        """Handles a signal to the launcher; safe in a signal handler."""
        self._signal = number
        if self._job is not None:
            self._job.events.put(number)

    @property
    def exit_code(self) -> int:
        """The launcher's exit code if a signal came while no rank was running."""
        return exit_code_before_start(self._signal or signal.SIGINT)

    def run(self) -> int:
        """Restarts the job until it succeeds, and returns the launcher's exit code.

        Raises:
            UsageError: the first start failed because of a mistake, or there were not enough hosts for it.
        """
        while True:
            try:
                chosen, ranks = self._wait_for_hosts()
            except TooFewHostsError as error:
                if not self._has_run:
                    raise
                say(str(error))
                outcome.tell(outcome.Failed("launch", outcome.STALLED, str(error)))
                return outcome.STALLED
            job = self._job = self._make(dataclasses.replace(self.settings, hosts=chosen, ranks=ranks))
            try:
                code = self._run_once(job, chosen, ranks)
            except UnfitHostError as unfit:
                if not (self.policy.may_change or self._has_run):
                    raise
                self._leave_out(unfit)
            else:
                if self._is_final(job, code, ranks):
                    return code

    def _run_once(self, job: Job, chosen: list[Host], ranks: int) -> int:
        try:
            job.connect()
            job.start()
            self._newcomers = [host.name for host in chosen if self._has_run and host.name not in self._before]
            self._before = {host.name for host in chosen}
            self._waits_since, self._has_run = None, True
            say(f"started {ranks} rank(s) on {_listed(chosen)}.")
            with self._watching(job, chosen, ranks):
                return job.run()
        finally:
            job.close()

    def _is_final(self, job: Job, code: int, ranks: int) -> bool:
        """Whether the job is over or abandoned. Otherwise prepares the next start."""
        if code == 0 or self._signal or (code == outcome.USAGE and not self._newcomers):
            return True
        for name in job.lost_hosts:
            self._roster.leave_out(name)
        if job.regrouped:
            return False
        if code == outcome.UNFIT_SIZE:
            self._use_fewer_than(ranks)
            return False
        if code == outcome.PREEMPTED:  # a rank was asked to leave its host, and all have saved
            say("the ranks have saved and exited; restarting on the available hosts.")
            return False
        if code == outcome.USAGE:  # the job ran before these hosts were added
            say(f"continuing without {', '.join(self._newcomers)}.")
            for name in self._newcomers:
                self._roster.leave_out(name)
        self._failed += 1
        if self._failed > self.policy.restarts:
            say(
                f"the job has failed {self._failed} time(s), and --restarts {self.policy.restarts} allows no more. The "
                f"same command resumes from its last checkpoint."
            )
            return True
        say(f"restart {self._failed} of {self.policy.restarts}.")
        return False

    def _leave_out(self, unfit: UnfitHostError) -> None:
        self._last_words = str(unfit)
        say(f"{unfit} Continuing without {unfit.host}.")
        self._roster.leave_out(unfit.host)

    # ---- Hosts -------------------------------------------------------------------------------------------------------

    def _wait_for_hosts(self) -> tuple[list[Host], int]:
        """The hosts of the next start, and its number of ranks."""
        self._waits_since = self._waits_since or time.monotonic()
        is_told = False
        while True:
            if self._signal:
                raise KeyboardInterrupt
            chosen = self._roster.available()
            ranks = self._ranks(chosen)
            if ranks >= self.policy.least:
                return _enough(chosen, ranks), ranks
            if time.monotonic() - self._waits_since > self.policy.patience:
                raise TooFewHostsError(
                    f"For {self.policy.patience:g} s there were slots for only {ranks} rank(s), and --min-np is "
                    f"{self.policy.least}. {self._last_words or 'Add hosts.'} The same command resumes from its last "
                    f"checkpoint."
                )
            if not is_told:
                say(f"waiting for hosts: there are slots for {ranks} rank(s), and --min-np is {self.policy.least}.")
                is_told = True
            self._roster.look_after(in_need=True)
            time.sleep(POLL_SECONDS / 2)

    def _ranks(self, chosen: Sequence[Host]) -> int:
        slots = sum(host.slots for host in chosen)
        return min(slots, self._most) if self._most is not None else slots

    def _use_fewer_than(self, ranks: int) -> None:
        if ranks - 1 < self.policy.least:
            raise UsageError(
                f"The command can use neither {ranks} rank(s) nor any smaller number down to --min-np "
                f"{self.policy.least}; its last output says why."
            )
        self._most = ranks - 1
        say(f"the command cannot use {ranks} ranks; trying {ranks - 1}.")

    @contextlib.contextmanager
    def _watching(self, job: Job, chosen: list[Host], ranks: int) -> Iterator[None]:
        """Watches for changes of the hosts while the job runs, and tells the job."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(job, chosen, ranks, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(self, job: Job, chosen: list[Host], ranks: int, over: threading.Event) -> None:
        before = ""
        while not over.wait(POLL_SECONDS):
            self._roster.look_after()
            now = self._change(self._roster.available(), chosen, ranks)
            if now and now == before:  # seen twice, so that hosts added together are used together
                job.regroup(now)
                return
            before = now

    def _change(self, available: list[Host], chosen: list[Host], ranks: int) -> str:
        """Why the job should restart, in words; empty if it should not."""
        slots = {host.name: host.slots for host in available}
        if gone := [host.name for host in chosen if slots.get(host.name, 0) < host.slots]:
            return f"{', '.join(gone)} no longer available"
        if self._ranks(available) > ranks:
            return f"slots for {self._ranks(available)} ranks, {ranks} in use"
        return ""


def run_script(path: str, slots: int) -> list[Host]:
    """The hosts that a discovery script prints, one per line: `h1` or `h1:4`, as for Horovod.

    Args:
        path: the script.
        slots: the number of slots of a host that is printed without one.

    Raises:
        UsageError: the script cannot be run, fails, or prints something else.
    """
    try:
        ended = subprocess.run([path], capture_output=True, text=True, timeout=_SCRIPT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--host-discovery-script {path} cannot be run ({error}). Is it executable?") from None
    if ended.returncode:
        raise UsageError(
            f"--host-discovery-script {path} ended with exit code {ended.returncode}: {ended.stderr.strip()[-300:]}"
        )
    lines = [line.strip() for line in ended.stdout.splitlines() if line.strip()]
    if not lines:
        return []
    return hosts.from_list(",".join(line if ":" in line else f"{line}:{slots}" for line in lines))


def _enough(chosen: list[Host], ranks: int) -> list[Host]:
    """The first hosts that have enough slots for the ranks, with unused slots removed."""
    used = []
    for host in chosen:
        if ranks > 0:
            used.append(Host(host.name, min(host.slots, ranks)))
            ranks -= host.slots
    return used


def _listed(chosen: Sequence[Host]) -> str:
    return ",".join(f"{host.name}:{host.slots}" for host in chosen)

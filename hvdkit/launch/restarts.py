"""Jobs that outlive their ranks and hosts: they are started again, on the hosts that there are, until they succeed.

A rank or host that is lost ends the job on all hosts; the next one goes on from the last checkpoint with those that are
left. Hosts that come or leave are announced by a script or a host file: then the ranks are told to save first
(SIGTERM), and nothing is done twice. Each start is one of new processes, so nothing that the old ones held, Horovod's
background thread least of all, can be in the way of the new ones (as in TorchElastic, whose restarts are of this kind,
and unlike Horovod's own elastic mode, which mends the state of processes that go on).
"""

import collections
import contextlib
import dataclasses
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from hvdkit.errors import UsageError
from hvdkit.launch import failures, hosts
from hvdkit.launch.hosts import Host
from hvdkit.launch.job import Job, Settings, UnfitHostError, say
from hvdkit.launch.link import is_reachable
from hvdkit.launch.shells import Shell

POLL_SECONDS = 2.0
_REST_SECONDS = 30.0  # before a host that was lost is used again; twice as long each time
_SCRIPT_SECONDS = 60  # for a discovery script to answer


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a job may change.

    Attributes:
        least: ranks below which it waits for hosts.
        most: ranks that it uses at most; None for all places that there are.
        restarts: starts after a failure; those for a change of hosts do not count.
        patience: seconds to wait for enough hosts.
        may_change: start with other hosts than were given, or fewer ranks.
    """

    least: int
    most: int | None
    restarts: int
    patience: float
    may_change: bool


class TooFewHostsError(UsageError):
    """There were not enough hosts for too long."""


class Roster:
    """The hosts that are listed now, without those that cannot be used.

    Args:
        discover: lists hosts; one that was listed before keeps its place, so that rank 0 stays where it is.
        shell: how to see whether a host is back.
    """

    def __init__(self, discover: Callable[[], Sequence[Host]], shell: Shell) -> None:
        self._discover = discover
        self._shell = shell
        self._listed: list[Host] = []
        self._left_out: dict[str, float] = {}  # since when, by the monotonic clock
        self._times: collections.Counter[str] = collections.Counter()
        self._complained = ""
        self._lock = threading.Lock()

    def available(self) -> list[Host]:
        """The hosts that can be used, as far as is known."""
        with self._lock:
            self._refresh()
            return [host for host in self._listed if host.name not in self._left_out]

    def leave_out(self, name: str) -> None:
        """Uses a host no longer, until it can be reached again and has rested."""
        with self._lock:
            self._left_out[name] = time.monotonic()
            self._times[name] += 1

    def look_after(self, *, in_need: bool = False) -> None:
        """Takes back those that can be reached again; also those that have not rested, where there are too few."""
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
                say(f"{error} The hosts of before are kept.")
            self._complained = str(error)
            return
        known = [found.pop(host.name) for host in self._listed if host.name in found]
        self._listed = [*known, *found.values()]


class ElasticJob:
    """One command over all its starts.

    Args:
        settings: as for a `Job`; its hosts and ranks are those of the first start.
        policy: how it may change.
        roster: the hosts.
        make: makes the job of one start.
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
        self._before: set[str] = set()  # the hosts of the start before
        self._newcomers: list[str] = []
        self._waits_since: float | None = None
        self._last_words = ""

    def receive(self, number: int) -> None:
        """Takes a signal to the launcher; safe in a signal handler."""
        self._signal = number
        if self._job is not None:
            self._job.events.put(number)

    @property
    def exit_code(self) -> int:
        """The launcher's, where a signal came while no rank was running."""
        return 128 + (self._signal or signal.SIGINT)

    def run(self) -> int:
        """Starts the job until it has succeeded, and returns the launcher's exit code.

        Raises:
            UsageError: the first start shows a mistake, or there were not even enough hosts for it.
        """
        while True:
            try:
                chosen, ranks = self._wait_for_hosts()
            except TooFewHostsError as error:
                if not self._has_run:
                    raise
                say(str(error))
                return failures.STALLED
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
        """Whether the job is over, or given up; otherwise prepares the next start."""
        if code == 0 or self._signal or (code == failures.MISTAKE and not self._newcomers):
            return True
        for name in job.lost_hosts:
            self._roster.leave_out(name)
        if job.regrouped:
            return False
        if code == failures.UNFIT:
            self._use_fewer_than(ranks)
            return False
        if code == failures.PREEMPTED:  # a rank was told to leave its host, and all have saved
            say("the ranks have saved and left; starting again with the hosts that there are.")
            return False
        if code == failures.MISTAKE:  # before these came, nothing was wrong
            say(f"going on without {', '.join(self._newcomers)}.")
            for name in self._newcomers:
                self._roster.leave_out(name)
        self._failed += 1
        if self._failed > self.policy.restarts:
            say(
                f"the job has failed {self._failed} time(s), and --restarts {self.policy.restarts} allows no more. The "
                f"same command goes on from its last checkpoint."
            )
            return True
        say(f"restart {self._failed} of {self.policy.restarts}.")
        return False

    def _leave_out(self, unfit: UnfitHostError) -> None:
        self._last_words = str(unfit)
        say(f"{unfit} Going on without {unfit.host}.")
        self._roster.leave_out(unfit.host)

    # ---- Hosts -------------------------------------------------------------------------------------------------------

    def _wait_for_hosts(self) -> tuple[list[Host], int]:
        """The hosts of the next start, and how many ranks."""
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
                    f"There were places for {ranks} rank(s) only for {self.policy.patience:g} s, and --min-np is "
                    f"{self.policy.least}. {self._last_words or 'Add hosts.'} The same command goes on from its last "
                    f"checkpoint."
                )
            if not is_told:
                say(f"waiting for hosts: there are places for {ranks} rank(s), and --min-np is {self.policy.least}.")
                is_told = True
            self._roster.look_after(in_need=True)
            time.sleep(POLL_SECONDS / 2)

    def _ranks(self, chosen: Sequence[Host]) -> int:
        places = sum(host.slots for host in chosen)
        return min(places, self._most) if self._most is not None else places

    def _use_fewer_than(self, ranks: int) -> None:
        if ranks - 1 < self.policy.least:
            raise UsageError(
                f"The command can use neither {ranks} rank(s) nor any number from there down to --min-np "
                f"{self.policy.least}; its last words say why."
            )
        self._most = ranks - 1
        say(f"the command cannot use {ranks} ranks; trying {ranks - 1}.")

    @contextlib.contextmanager
    def _watching(self, job: Job, chosen: list[Host], ranks: int) -> Iterator[None]:
        """While the job runs, tells it when its hosts are to change."""
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
            if now and now == before:  # seen twice: hosts that come together are taken together
                job.regroup(now)
                return
            before = now

    def _change(self, available: list[Host], chosen: list[Host], ranks: int) -> str:
        """Why the job should be started anew, in words; empty if it should not."""
        places = {host.name: host.slots for host in available}
        if gone := [host.name for host in chosen if places.get(host.name, 0) < host.slots]:
            return f"{', '.join(gone)} no longer to be used"
        if self._ranks(available) > ranks:
            return f"places for {self._ranks(available)} ranks, {ranks} in use"
        return ""


def run_script(path: str, slots: int) -> list[Host]:
    """The hosts that a discovery script prints, one a line: `h1` or `h1:4`, as Horovod has it.

    Args:
        path: the script.
        slots: of a host that is printed without a number.

    Raises:
        UsageError: it cannot be run, fails, or prints something else.
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
    """The first hosts that have places for so many ranks, and no more places than these."""
    used = []
    for host in chosen:
        if ranks > 0:
            used.append(Host(host.name, min(host.slots, ranks)))
            ranks -= host.slots
    return used


def _listed(chosen: Sequence[Host]) -> str:
    return ",".join(f"{host.name}:{host.slots}" for host in chosen)

"""Jobs whose ranks communicate over MPI: one `mpirun`, under this host's agent, starts all ranks.

`mpirun` reaches the other hosts by ssh with the launcher's options and tags each output line with its rank. It ends all
ranks when one fails, or when the agent ends it, which happens even if the launcher is killed. It ends the other ranks
at once, so they may not have time to report the cause.
"""

import os
import re
import shlex
import shutil
import signal
import sys
import time

from hvdkit.errors import UsageError
from hvdkit.launch import binding, dry_run, environment
from hvdkit.launch.failures import Failure
from hvdkit.launch.job import Job, Lost
from hvdkit.launch.link import Link, address_of, is_this_host
from hvdkit.launch.shells import Ssh

_LEAVE_SECONDS = 15.0  # for mpirun to end after all ranks exit: it waits for the daemon of a host that is cut off
_OF_A_RANK = re.compile(rb"(\[\d+,(\d+)\]<std(?:out|err)>:)(.*)", re.DOTALL)
_EXITED = re.compile(r"Process name: \[\[\d+,\d+\],\s*(\d+)\]\s+Exit code:\s+(\d+)")
_CUT_OFF = re.compile(r"lost communication with a remote daemon.*?Remote daemon:.*? on node (\S+)", re.DOTALL)
_KILLED = re.compile(r"rank (\d+) with PID \d+ on node \S+ exited\s+on signal (\d+)")


class MpiJob(Job):
    """A job that `mpirun` (Open MPI) starts; see `Job`."""

    def connect(self) -> None:
        """Finds mpirun and starts the agent that will run it.

        Raises:
            UsageError: there is no mpirun, or an option conflicts with it.
        """
        self._said = b""  # mpirun's own output
        self._leaving_since: float | None = None
        self._begun: dict[bool, bytes] = {False: b"", True: b""}
        self._mpirun = shutil.which("mpirun") or ""
        if not self._mpirun:
            raise UsageError(
                "--mpi needs mpirun. Install it with: apt-get install openmpi-bin libopenmpi-dev, on every host, and "
                "run launch/bootstrap.sh --mpi yes, which builds Horovod with MPI."
            )
        if self.settings.bind not in ("auto", "none"):
            raise UsageError(
                f"--bind {self.settings.bind} and --mpi exclude each other: mpirun binds its ranks itself. Leave "
                f"--bind out, and set OMPI_MCA_hwloc_base_binding_policy=core for cores."
            )
        if self.settings.cores or self.settings.gpus:
            raise UsageError("--cores and --gpus are for Gloo: mpirun binds ranks itself. Leave them out, or --mpi.")
        for host in self.settings.hosts:
            self._addresses[host.name] = address_of(host.name, self.settings.shell)
        link = Link("localhost", None, sys.executable, self.events)
        self.links.append(link)
        self._names[link] = link.host
        question = {"interface": self.settings.interface, "directory": self.settings.directory, "silence": 0}
        link.send(ask={"peer": self._own_address(link), **question})
        self._hear_hosts()
        self._check_host(link)

    def command(self) -> list[str]:
        """The exact command that starts the ranks."""
        hosts = ",".join(f"{host.name}:{host.slots}" for host in self.settings.hosts)
        shell = self.settings.shell  # inside a Slurm job, mpirun uses srun by itself
        reach = ["-mca", "plm_rsh_args", shlex.join(shell.options())] if isinstance(shell, Ssh) else []
        everything = {**environment.exported(environment.own_environment()), **self.common_environment()}
        names = sorted(name for name in everything if re.fullmatch(r"\w+", name, re.ASCII))
        interface = str((self.links[0].about or {}).get("interface") or "")
        return [
            self._mpirun,
            *(["--allow-run-as-root"] if os.geteuid() == 0 else []),
            "--tag-output",
            *("-np", str(self.settings.ranks), "-H", hosts, "-wdir", self.settings.directory),
            *("-bind-to", "none", "-map-by", "slot"),  # TensorFlow's threads need more than one core
            *("-mca", "pml", "ob1", "-mca", "btl", "^openib"),
            *reach,
            *_keepalive_options(self.settings.silence),
            *(["-mca", "oob_tcp_if_include", interface, "-mca", "btl_tcp_if_include", interface] if interface else []),
            *(part for name in names for part in ("-x", name)),
            *self.settings.command,
        ]

    def common_environment(self) -> dict[str, str]:
        """The variables that all ranks have."""
        return {
            **super().common_environment(),
            "HOROVOD_CONTROLLER": "mpi",
            "HOROVOD_CPU_OPERATIONS": "mpi",
        }

    def start(self) -> None:
        """Starts mpirun as the agent's only process."""
        self.links[0].send(
            start={
                "command": self.command(),
                "directory": self.settings.directory,
                "own_env": True,
                "env": {**environment.own_environment(), **self.common_environment()},
                "ranks": [{"rank": 0, "env": {}, "cores": None}],
            }
        )

    def description(self) -> str:
        """What `--dry-run` prints."""
        nothing = binding.Binding(None, None)
        reached = {
            name: "is this host" if is_this_host(name, address) else f"by ssh as {address}"
            for name, address in self._addresses.items()
        }
        ranks = [(slot, nothing, reached[slot.hostname]) for slot in self.slots]
        return dry_run.describe(self.settings.command, self.common_environment(), ranks, started_by=self.command())

    def take_output(self, rank: int, data: bytes, *, is_error: bool) -> None:
        """Assigns each line to the rank in its tag. Lines without a tag are mpirun's own."""
        *lines, self._begun[is_error] = re.split(rb"(?<=[\n\r])", self._begun[is_error] + data)
        for line in lines:
            if match := _OF_A_RANK.fullmatch(line):
                # Also within a line, where a rank wrote it in several pieces.
                super().take_output(int(match[2]), match[3].replace(match[1], b""), is_error=is_error)
            else:
                self._said += line

    def verdict(self) -> Failure | None:
        """The failure that mpirun names first, or the watchdog's.

        Raises:
            Lost: mpirun itself failed.
        """
        code = self._ended.get(0, 0)
        if code == 0:
            return None
        said = self._said.decode(errors="replace")
        killed = [Failure(int(rank), -int(number)) for rank, number in _KILLED.findall(said)]
        # mpirun itself ends the other ranks with SIGTERM after a failure.
        killed = [failure for failure in killed if failure.code != -signal.SIGTERM]
        exited = [Failure(int(rank), int(number)) for rank, number in _EXITED.findall(said)]
        if lost := _CUT_OFF.search(said):
            raise self._without_answer(lost[1])
        cause = self.console.cause
        if cause and cause[1]:
            return Failure(cause[0], cause[1])
        if self._leaving_since is not None and self.console.leaving:
            return Failure(cause[0] if cause else 0, self.console.leaving)
        first = next((f for f in [*killed, *exited] if cause is None or f.rank == cause[0]), None)
        if first is None and (killed or exited):
            first = (killed or exited)[0]
        if first is None:
            raise Lost(
                self.settings.shell.explain(self._failed_host(said), said.strip(), code, sys.executable)
                if "ssh" in said
                else f"mpirun: {said.strip()}"
            )
        return first

    def host_of(self, rank: int) -> str:
        """The name of a rank's host."""
        return next(str(slot.hostname) for slot in self.slots if slot.rank == rank)

    def _is_over(self) -> bool:
        late = self._over_at is not None and time.monotonic() > self._over_at
        return late or self.links[0].is_gone or 0 in self._closed

    def _failed_host(self, said: str) -> str:
        return next((name for name in self._addresses if re.search(rf"\b{re.escape(name)}\b", said)), "of the job")

    def _without_answer(self, node: str) -> Lost:
        hosts = [name for name, address in self._addresses.items() if node in (name, address)]
        return Lost(
            f"Host {node} is down, unresponsive or cut off: mpirun has lost the connection to it. Its ranks stop by "
            f"themselves. Start the job without it, or when it is back.",
            hosts or [node],
        )

    def _keep_time(self) -> None:
        super()._keep_time()
        if self.console.leaving is not None and self._over_at is None:
            self._leaving_since = self._leaving_since or time.monotonic()
            if time.monotonic() - self._leaving_since > _LEAVE_SECONDS:
                self._end(0)

    def _check_start(self, now: float) -> None:
        """Does nothing: mpirun has its own limit."""


def _keepalive_options(silence: float) -> list[str]:
    """The options with which mpirun's daemons detect a lost host within `silence` seconds; 0 for their default."""
    if not silence:
        return []
    parts = {"time": silence / 2, "intvl": silence / 8, "probes": 4}
    return [word for name, n in parts.items() for word in ("-mca", f"oob_tcp_keepalive_{name}", str(max(1, int(n))))]

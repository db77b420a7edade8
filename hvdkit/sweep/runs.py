"""The processes of tasks: started by the launcher, or forked by the fork server for one rank on this host."""

import contextlib
import ctypes
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from hvdkit import outcome
from hvdkit.sweep.hosts import Slot
from hvdkit.sweep.options import Options

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Run(Protocol):
    """A task's process."""

    def poll(self) -> int | None:
        """Its exit code, or the negative number of the signal that killed it; None while it runs."""

    def has_begun(self) -> bool:
        """Whether it has started and no longer waits for TensorFlow to load."""

    def leave(self) -> None:
        """Asks it to save and exit."""

    def end(self) -> None:
        """Ends it and all processes that it started."""

    def kill(self) -> None:
        """Ends it by force."""


class Launched:
    """A task under `hvdkit.launch`, which watches the ranks and their host, and ends the ranks if it ends itself.

    Args:
        options: the sweep's options.
        slot: where it runs.
        flags: the flags of the training.
        log: the file for its output.
        told: the file in which it records how it ended.
    """

    def __init__(self, options: Options, slot: Slot, flags: Sequence[str], log: Path, told: Path) -> None:
        where = ["-np", str(options.ranks_per_task)]
        where += ["-H", f"{slot.host.given.name}:{options.ranks_per_task}"]
        for option, own in (("--cores", slot.cores), ("--gpus", slot.gpus)):
            where += [option, ",".join(map(str, own))] if own else []
        limits = ["--stall-timeout", f"{options.stall_limit:g}", "--host-timeout", f"{options.host_limit:g}"]
        launcher = [sys.executable, "-m", "hvdkit.launch", *where, *limits, *options.launcher]
        command = [*launcher, "--", options.launch.python, "-m", "hvdkit.train", *flags]
        me = os.getpid()

        def prepare() -> None:  # if the sweep dies, kill the launcher: its ranks then end on every host
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != me:
                os._exit(1)

        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, outcome.VARIABLE: str(told)},
                start_new_session=True,
                preexec_fn=prepare,
            )

    def poll(self) -> int | None:
        """See `Run`."""
        return self._process.poll()

    def has_begun(self) -> bool:
        """See `Run`."""
        return True

    def leave(self) -> None:
        """See `Run`: the launcher gives its ranks half a minute."""
        self._process.terminate()

    def end(self) -> None:
        """See `Run`: the launcher gives its ranks four seconds."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """See `Run`."""
        self._process.kill()


class ForkServer:
    """The fork server for tasks of one rank, see `hvdkit.sweep.fork_server`. The coordinator replaces one that died.

    Args:
        log: the file for its output.
    """

    def __init__(self, log: Path) -> None:
        self._ids = itertools.count()
        self._pids: dict[int, int] = {}
        self._codes: dict[int, int] = {}
        self._incoming = b""
        me = os.getpid()

        def prepare() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != me:
                os._exit(1)

        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hvdkit.sweep.fork_server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
                preexec_fn=prepare,
            )
        if self._process.stdout:
            os.set_blocking(self._process.stdout.fileno(), False)

    @property
    def is_alive(self) -> bool:
        """Whether it can fork tasks."""
        return self._process.poll() is None

    def start(self, slot: Slot, flags: Sequence[str], log: Path, told: Path) -> "Forked":
        """Forks a task, which starts once TensorFlow is loaded. For `log` and `told` see `Launched`."""
        number = next(self._ids)
        env = {outcome.VARIABLE: str(told)}
        if slot.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
        order = {"id": number, "argv": list(flags), "cores": slot.cores, "env": env, "log": str(log)}
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin:
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
        return Forked(self, number)

    def code(self, number: int) -> int | None:
        """A task's exit code; that of SIGKILL if the fork server has died, and its tasks with it."""
        is_alive = self.is_alive  # before reading its output, so that no output comes later
        self._hear()
        return self._codes.get(number, None if is_alive else -signal.SIGKILL)

    def has_forked(self, number: int) -> bool:
        """Whether a task has a process."""
        self._hear()
        return number in self._pids

    def signal(self, number: int, what: int) -> None:
        """Sends a signal to a task and all processes that it started."""
        self._hear()
        if number in self._pids and number not in self._codes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pids[number], what)

    def close(self) -> None:
        """Ends the fork server and all its tasks."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _hear(self) -> None:
        while self._process.stdout and not self._process.stdout.closed:
            data = self._process.stdout.read(1 << 16)
            if not data:
                break
            *lines, self._incoming = (self._incoming + data).split(b"\n")
            for line in map(json.loads, lines):
                (self._pids if "pid" in line else self._codes)[line["id"]] = line.get("pid", line.get("code"))


class Forked:
    """A task that a fork server has forked."""

    def __init__(self, fork_server: ForkServer, number: int) -> None:
        self._fork_server = fork_server
        self._number = number

    def poll(self) -> int | None:
        """See `Run`."""
        return self._fork_server.code(self._number)

    def has_begun(self) -> bool:
        """See `Run`."""
        return self._fork_server.has_forked(self._number)

    def leave(self) -> None:
        """See `Run`."""
        self._fork_server.signal(self._number, signal.SIGTERM)

    def end(self) -> None:
        """See `Run`. It has no other ranks to end, so it is killed at once."""
        self._fork_server.signal(self._number, signal.SIGKILL)

    def kill(self) -> None:
        """See `Run`. A task that survived `end` has an unresponsive fork server, so this ends the server."""
        self._fork_server.close()

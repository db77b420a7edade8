"""The processes of tasks: under the launcher; or, of one rank on this host, forked where TensorFlow is loaded."""

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
        """Its exit code, negative for a signal's number; None as long as it runs."""

    def has_begun(self) -> bool:
        """Whether it runs, and does not wait for TensorFlow to be loaded."""

    def leave(self) -> None:
        """Asks it to save and leave."""

    def end(self) -> None:
        """Ends it, and what it has started."""

    def kill(self) -> None:
        """The same by force."""


class Launched:
    """A task under `hvdkit.launch`, which watches the ranks and their host, and ends them if it ends itself.

    Args:
        options: the sweep's.
        slot: where it runs.
        flags: of the training.
        log: the file that takes what it prints.
        told: the file in which it tells how it ends.
    """

    def __init__(self, options: Options, slot: Slot, flags: Sequence[str], log: Path, told: Path) -> None:
        where = ["-np", str(options.ranks_per_task)]
        where += ["-H", f"{slot.host.given.name}:{options.ranks_per_task}"]
        for option, own in (("--cores", slot.cores), ("--gpus", slot.gpus)):
            where += [option, ",".join(map(str, own))] if own else []
        limits = ["--stall-timeout", f"{options.stall_limit:g}", "--host-timeout", f"{options.host_limit:g}"]
        command = [
            sys.executable, "-m", "hvdkit.launch", *where, *limits, *options.launcher, "--",
            options.launch.python, "-m", "hvdkit.train", *flags,
        ]  # fmt: skip
        me = os.getpid()

        def prepare() -> None:  # the launcher ends its ranks when it is killed, on whichever host
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


class Nursery:
    """Where tasks of one rank are forked; see `hvdkit.sweep.nursery`. A new one is made when one has died.

    Args:
        log: the file that takes what it prints.
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
                [sys.executable, "-m", "hvdkit.sweep.nursery"],
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
        """Forks a task; it begins once TensorFlow is loaded. `log` and `told` as for `Launched`."""
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
        """A task's exit code; that of SIGKILL where the nursery has died, and its tasks with it."""
        is_alive = self.is_alive  # what it said is read after that: nothing comes later
        self._hear()
        return self._codes.get(number, None if is_alive else -signal.SIGKILL)

    def has_forked(self, number: int) -> bool:
        """Whether a task has a process."""
        self._hear()
        return number in self._pids

    def signal(self, number: int, what: int) -> None:
        """Sends a signal to a task and all that it has started."""
        self._hear()
        if number in self._pids and number not in self._codes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pids[number], what)

    def close(self) -> None:
        """Ends it, and all tasks of it."""
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
    """A task that a nursery has forked."""

    def __init__(self, nursery: Nursery, number: int) -> None:
        self._nursery = nursery
        self._number = number

    def poll(self) -> int | None:
        """See `Run`."""
        return self._nursery.code(self._number)

    def has_begun(self) -> bool:
        """See `Run`."""
        return self._nursery.has_forked(self._number)

    def leave(self) -> None:
        """See `Run`."""
        self._nursery.signal(self._number, signal.SIGTERM)

    def end(self) -> None:
        """See `Run`; nobody else has to be told, so it can go at once."""
        self._nursery.signal(self._number, signal.SIGKILL)

    def kill(self) -> None:
        """See `Run`: if it does not end at that, it is the nursery that is frozen."""
        self._nursery.close()

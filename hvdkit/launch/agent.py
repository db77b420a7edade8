"""The launcher's agent on one host: starts the ranks, sends back their output, and cleans up all their processes.

The launcher sends this file through the connection (see `link.py`) and runs it with the host's Python, without
site-packages. It needs neither hvdkit nor Horovod there. Keep it a single file that imports only the standard library.

Each host runs two processes. The worker does all the work in one thread, and the keeper waits for it. If either is
killed, the other ends the ranks. The worker also ends them on SIGTERM, when its input closes, and when the launcher has
been silent for too long (a cut network closes no connection). Both are subreapers, so a process whose parent rank has
ended stays among their descendants.

The input is lines of JSON. The output is frames: a kind, a rank, a length, and that many bytes.
"""

import ctypes
import fcntl
import json
import os
import re
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GREETING = b"hvdkit-agent 1 "  # a nonce follows; output of the shell's start-up files may come before it
FRAME = struct.Struct("!cII")
HELLO, OUT, ERR, EXIT, CLOSED, REFUSED, BEAT = b"h", b"o", b"e", b"x", b"c", b"r", b"b"
BEAT_SECONDS = 2.0
_DRAIN_SECONDS = 1.0  # to read the pipes of a rank that has ended, if a child of it still holds them open
_MOST_WAITING = 4 << 20  # bytes not yet sent to the launcher; above this, reading the ranks' pipes pauses
_SIOCGIFADDR = 0x8915
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


class Rank:
    """A rank on this host: its process and its pipes."""

    def __init__(self, number: int, process: "subprocess.Popen[bytes]", errors: int) -> None:
        self.number = number
        self.process = process
        self.pipes = {errors: ERR, **({process.stdout.fileno(): OUT} if process.stdout else {})}
        self.ended: float | None = None  # time.monotonic() of its end

    @property
    def is_done(self) -> bool:
        """Whether the rank has ended and all its output has been read."""
        return self.ended is not None and not self.pipes


class Agent:
    """The worker: one loop over the launcher's lines, the ranks' pipes and signals."""

    def __init__(self) -> None:
        self.ranks: dict[int, Rank] = {}  # by process id
        self.ending: float | None = None  # time.monotonic() at which SIGKILL follows SIGTERM
        self.launcher_is_there = True
        self.silence = 0.0
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.heard = self.beaten = time.monotonic()
        self.selector = selectors.DefaultSelector()
        self.paused = False

    def run(self) -> None:
        """Runs until the launcher ends the job or disappears."""
        awake, alarm = os.pipe()
        for end in (0, 1, awake, alarm):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            # Slurm ends a step with SIGTERM 30 s before SIGKILL: let ranks save first.
            signal.signal(number, lambda *_: self._end(25.0))
        self.selector.register(awake, selectors.EVENT_READ, lambda: os.read(awake, 4096))
        self.selector.register(0, selectors.EVENT_READ, self._listen)
        while not self._is_done():
            for key, _ in self.selector.select(0.5):
                key.data()
            self._reap()
            self._keep_time()
            self._flush()
        kill_descendants()
        self._say_goodbye()

    def _is_done(self) -> bool:
        return self.ending is not None and all(rank.is_done for rank in self.ranks.values())

    # ---- The launcher ------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            data = os.read(0, 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose_launcher()
            return
        self.heard = time.monotonic()
        self.incoming += data
        *lines, rest = self.incoming.split(b"\n")
        self.incoming = rest
        for line in lines:
            self._obey(json.loads(line))

    def _obey(self, order: dict[str, Any]) -> None:
        if "ask" in order:
            self.silence = order["ask"]["silence"]
            self._send(HELLO, 0, about_this_host(*(order["ask"][name] for name in ("peer", "interface", "directory"))))
        elif "start" in order:
            self._start(**order["start"])
        elif "signal" in order:
            self._signal_ranks(order["signal"])
        elif "end" in order:
            self._end(order["end"])

    def _send(self, kind: bytes, rank: int, content: Any) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.launcher_is_there:
            self.outgoing += FRAME.pack(kind, rank, len(body)) + body

    def _flush(self) -> None:
        try:
            while self.outgoing and self.launcher_is_there:
                del self.outgoing[: os.write(1, self.outgoing[: 1 << 16])]
        except BlockingIOError:
            pass
        except OSError:
            self._lose_launcher()
        waits = len(self.outgoing) > 0
        if waits != (1 in self.selector.get_map()):
            self.selector.register(1, selectors.EVENT_WRITE, self._flush) if waits else self.selector.unregister(1)
        if (len(self.outgoing) > _MOST_WAITING) != self.paused:
            self._pause(not self.paused)

    def _pause(self, paused: bool) -> None:
        self.paused = paused
        for rank in self.ranks.values():
            for pipe in rank.pipes:
                self.selector.unregister(pipe) if paused else self._watch(rank, pipe)

    def _lose_launcher(self) -> None:
        if self.launcher_is_there:
            self.launcher_is_there = False
            self.outgoing.clear()
            self.selector.unregister(0)
            self._end(3.0)

    def _say_goodbye(self) -> None:
        until = time.monotonic() + 2
        while self.outgoing and self.launcher_is_there and time.monotonic() < until:
            time.sleep(0.01)
            self._flush()

    # ---- The ranks ---------------------------------------------------------------------------------------------------

    def _start(
        self,
        command: list[str],
        directory: str,
        env: dict[str, str],
        ranks: list[dict[str, Any]],
        own_env: bool,
    ) -> None:
        base = {} if own_env else dict(os.environ)
        me = os.getpid()
        for rank in ranks:

            def prepare(cores: Any = rank["cores"]) -> None:  # safe after the fork: this process has one thread
                _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != me:
                    os._exit(1)
                if cores:
                    os.sched_setaffinity(0, cores)

            errors, their_end = os.pipe()
            # The pipe has a second number, which stays when the program redirects its standard error (see `outcome`).
            pipe = {"HVDKIT_STDERR": f"{their_end}:{os.fstat(their_end).st_ino}"}
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=their_end,
                    pass_fds=(their_end,),
                    bufsize=0,
                    cwd=directory,
                    env={**base, **env, **rank["env"], **pipe},
                    start_new_session=True,
                    preexec_fn=prepare,
                )
            except (OSError, subprocess.SubprocessError) as error:
                os.close(errors)
                self._send(REFUSED, rank["rank"], {"error": str(error)})
                return
            finally:
                os.close(their_end)
            started = self.ranks[process.pid] = Rank(rank["rank"], process, errors)
            for number in started.pipes:
                os.set_blocking(number, False)
                self._watch(started, number)

    def _watch(self, rank: Rank, pipe: int) -> None:
        self.selector.register(pipe, selectors.EVENT_READ, lambda: self._copy(rank, pipe))

    def _copy(self, rank: Rank, pipe: int) -> bool:
        """Forwards the content of a pipe; returns whether there was any."""
        try:
            data = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return False
        if data:
            self._send(rank.pipes[pipe], rank.number, data)
        else:
            self._close(rank, pipe)
        return bool(data)

    def _close(self, rank: Rank, pipe: int) -> None:
        if not self.paused:
            self.selector.unregister(pipe)
        del rank.pipes[pipe]
        os.close(pipe)
        if rank.is_done:
            self._send(CLOSED, rank.number, b"")

    def _reap(self) -> None:
        """Records ranks that have ended, and reaps orphaned processes."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            rank = self.ranks.get(pid)
            if rank is not None:
                rank.process.returncode = os.waitstatus_to_exitcode(status)
                for pipe in list(rank.pipes):
                    for _ in range(_MOST_WAITING >> 16):  # send its output before its exit
                        if pipe not in rank.pipes or not self._copy(rank, pipe):
                            break
                rank.ended = time.monotonic()
                self._send(EXIT, rank.number, {"code": rank.process.returncode})
                if rank.is_done:
                    self._send(CLOSED, rank.number, b"")

    def _signal_ranks(self, number: int) -> None:
        for rank in self.ranks.values():
            if rank.ended is None:
                os.killpg(rank.process.pid, number)

    def _end(self, grace: float) -> None:
        """Ends the ranks with SIGTERM now and SIGKILL after `grace` seconds. A later call can only shorten the time."""
        until = time.monotonic() + grace
        if self.ending is None:
            self._signal_ranks(signal.SIGTERM)
        self.ending = until if self.ending is None else min(self.ending, until)

    def _keep_time(self) -> None:
        now = time.monotonic()
        if now - self.beaten > BEAT_SECONDS and not self.outgoing:
            self.beaten = now
            self._send(BEAT, 0, b"")
        if self.launcher_is_there and self.silence and now - self.heard > self.silence:
            self._lose_launcher()
        if self.ending is not None and now > self.ending:
            self._signal_ranks(signal.SIGKILL)
        for rank in self.ranks.values():
            if rank.ended is not None and now - rank.ended > _DRAIN_SECONDS:
                for pipe in list(rank.pipes):
                    self._close(rank, pipe)


# -------------------------------------------------------------------------------------------------------- This host


def about_this_host(peer: str, interface: str | None, directory: str) -> dict[str, Any]:
    """What the launcher must know about this host before it starts ranks; `peer` is the launcher's address."""
    source = source_address(peer)
    return {
        "hostname": socket.gethostname(),
        "own_name": address_of(socket.gethostname()),
        "source": source,
        "interfaces": sorted(name for name in interfaces().values()),
        "interface": interface if interface in interfaces().values() else interfaces().get(source or ""),
        "cores": cores_by_place(),
        "gpus": gpus(),
        "has_directory": Path(directory).is_dir(),
    }


def source_address(peer: str) -> str | None:
    """The address that this host uses to reach another. Connecting a UDP socket looks it up and sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def address_of(name: str) -> str | None:
    """The IPv4 address that a name resolves to on this host."""
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def interfaces() -> dict[str, str]:
    """The names of this host's interfaces by IPv4 address."""
    names = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # the interface has no address
                continue
            names[socket.inet_ntoa(reply[20:24])] = name
    return names


def cores_by_place() -> list[int]:
    """The usable cores, sorted by socket and physical core."""

    def place(core: int) -> list[int]:
        topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
        try:
            return [int((topology / name).read_text()) for name in ("physical_package_id", "core_id")]
        except (OSError, ValueError):
            return [0, core]

    return sorted(os.sched_getaffinity(0), key=lambda core: (*place(core), core))


def gpus() -> list[str]:
    """The CUDA names of this host's visible GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    devices = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(devices.iterdir())))] if devices.is_dir() else []


# ----------------------------------------------------------------------------------------- Cleaning up processes


def descendants() -> list[int]:
    """The ids of all processes that descend from this one."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def kill_descendants() -> None:
    """Kills all descendants, repeatedly, since one may start another meanwhile."""
    for _ in range(200):
        left = descendants()
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


def keep() -> None:
    """Forks the worker and returns in it. This process waits for the worker, then kills its remaining processes."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    me = os.getpid()
    worker = os.fork()
    if worker == 0:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != me:
            os._exit(1)
        return
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: os.kill(worker, signal.SIGTERM))
    nothing = os.open(os.devnull, os.O_RDWR)
    for end in (0, 1, 2):  # so that they close for the launcher when the worker ends
        os.dup2(nothing, end)
    os.waitpid(worker, 0)
    kill_descendants()
    os._exit(0)


def main(nonce: str) -> None:
    """Sends the greeting and runs until the launcher ends the job."""
    if not re.fullmatch("[0-9a-f]+", nonce):
        sys.exit("hvdkit's agent is started by python -m hvdkit.launch, not by hand")
    keep()
    os.write(1, GREETING + nonce.encode() + b"\n")
    Agent().run()

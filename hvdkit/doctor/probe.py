"""What the doctor runs on each host: answers its questions about the host, and talks to the probes of the others.

The doctor sends this file through the standard input of one ssh connection a host (see `connection.py`), so it is a
single file of the standard library and works where hvdkit is missing or broken. Requests come in as lines of JSON,
answers go out as lines of JSON in the order in which they are found.

A probe takes connections from other probes alone: both sides prove, without saying it, that they know the token that
came through ssh. It ends, with all that it has started, when its input closes or its lifetime is over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import hmac
import json
import os
import platform
import resource
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

LISTENERS = 3  # ports opened on each address: a firewall that lets one of them through by chance is found out
CONNECT_SECONDS = 3.0
PINGS = 30
STREAM_SECONDS = 0.4
_STREAM_BYTES = 1 << 28  # and no more than this, on a fast network
_CHUNK = bytes(1 << 18)
_MAC_BYTES = 32
_VISITORS = 64  # connections that are served at once
_SIOCGIFFLAGS, _SIOCGIFADDR, _SIOCGIFNETMASK = 0x8913, 0x8915, 0x891B
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8


class Probe:
    """Answers one doctor, on this host."""

    def __init__(self, name: str, token: str, lifetime: int) -> None:
        self.name = name
        self._key = token.encode()
        self._lock = threading.Lock()
        self._visitors = threading.BoundedSemaphore(_VISITORS)
        self._ranks: subprocess.Popen[bytes] | None = None
        self._complaints: Any = None
        self._marks: list[Path] = []
        self._made: list[Path] = []
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda *_: self.close())
        signal.alarm(lifetime)  # a cut network closes nothing

    def serve(self) -> None:
        """Answers until the input closes. Requests that may wait have a thread each."""
        for line in sys.stdin.buffer:
            request = json.loads(line)
            # The clock's answer must not wait for a thread; a child that is to die with the thread that has started it
            # must be started by the one that stays.
            if request["do"] in ("time", "start_ranks"):
                self._answer(request)
            else:
                threading.Thread(target=self._answer, args=(request,), daemon=True).start()
        self.close()

    def close(self) -> None:
        """Leaves nothing behind, and ends."""
        if self._ranks is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._ranks.pid, signal.SIGKILL)
        self.answer_unmark()
        for made in reversed(self._made):
            with contextlib.suppress(OSError):  # another host's, or somebody has written there
                made.rmdir()
        os._exit(0)

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            found: dict[str, Any] = {"answer": getattr(self, "answer_" + request["do"])(**request.get("with", {}))}
        except Exception as error:  # whatever is wrong with this host is what the doctor asked for
            found = {"problem": f"{type(error).__name__}: {error}"}
        self.say({"id": request["id"], **found})

    def say(self, content: dict[str, Any]) -> None:
        """Sends a line to the doctor."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            sys.stdout.write(json.dumps(content) + "\n")
            sys.stdout.flush()

    # ---- This host ---------------------------------------------------------------------------------------------------

    def answer_time(self) -> float:
        """Seconds since 1970, by this host's clock."""
        return time.time()

    def answer_host(self) -> dict[str, Any]:
        """Who this host is, and what mends of its failures depend on."""
        firewalls = [name for name in ("ufw", "firewall-cmd", "nft", "iptables") if _which(name)]
        return {
            "hostname": socket.gethostname(),
            "system": platform.platform(),
            "python": sys.executable,
            "is_root": os.geteuid() == 0,
            "cores": len(os.sched_getaffinity(0)),
            "interfaces": list(interfaces()),
            "firewalls": firewalls,
            "client": os.environ.get("SSH_CONNECTION", "").partition(" ")[0],
        }

    def answer_names(self, names: list[str]) -> dict[str, Any]:
        """The IPv4 addresses of names, and of this host's own, as programs on this host resolve them."""
        with ThreadPoolExecutor(16) as pool:
            every = list(dict.fromkeys([*names, socket.gethostname()]))
            return dict(zip(every, pool.map(_resolve, every)))  # noqa: B905 - as old a Python as may be there

    def answer_gpus(self) -> dict[str, Any]:
        """The GPUs that NVIDIA's driver shows."""
        tool = _which("nvidia-smi")
        devices = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
        if not tool:
            problem = "nvidia-smi is not installed, though " + ", ".join(devices) + " is there" if devices else None
            return {"gpus": [], "problem": problem}
        query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
        ended = subprocess.run(query, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=15, check=False)
        if ended.returncode != 0:
            said = (ended.stdout + ended.stderr).strip().splitlines() or [f"exit code {ended.returncode}"]
            return {"gpus": [], "problem": f"nvidia-smi says: {said[0]}"}
        rows = [[field.strip() for field in line.split(",")] for line in ended.stdout.splitlines() if line.strip()]
        return {"gpus": [dict(zip(("name", "mebibytes", "driver"), row)) for row in rows], "problem": None}  # noqa: B905

    def answer_shm(self) -> dict[str, int]:
        """Size of /dev/shm in bytes."""
        return _space(Path("/dev/shm"))

    def answer_disk(self, workdir: str) -> dict[str, Any]:
        """Space in bytes where a run writes, and where temporary files go."""
        there = next(path for path in (Path(workdir), *Path(workdir).parents) if path.exists())
        temporary = Path(tempfile.gettempdir())
        return {
            "workdir": {"path": str(there), **_space(there)},
            "temporary": {"path": str(temporary), **_space(temporary)},
        }

    def answer_files(self) -> dict[str, int]:
        """How many files a process may have open: the limit that holds, and the one to which it may be raised."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return {"soft": soft, "hard": hard}

    def answer_workdir(self, workdir: str, mark: str) -> dict[str, Any]:
        """Whether files can be written in a directory, which is made if it is not there, and removed at the end."""
        path = Path(workdir)
        missing = [p for p in (path, *path.parents) if not p.exists()]
        for directory in reversed(missing):
            directory.mkdir(exist_ok=True)
            self._made.append(directory)
        file = path / f".hvdkit-doctor-{mark}-{self.name}"
        self._marks.append(file)
        file.write_bytes(b"written by hvdkit.doctor\n")
        return {"made": bool(missing)}

    def answer_marks(self, workdir: str, mark: str) -> list[str]:
        """The hosts whose marks are seen in the directory from here: all of them, if it is shared."""
        prefix = f".hvdkit-doctor-{mark}-"
        return sorted(path.name[len(prefix) :] for path in Path(workdir).glob(prefix + "*"))

    def answer_unmark(self) -> None:
        """Removes this host's mark."""
        for file in self._marks:
            with contextlib.suppress(OSError):
                file.unlink()

    # ---- From this host to others ------------------------------------------------------------------------------------

    def answer_ssh(self, commands: dict[str, list[str]], seconds: float) -> dict[str, Any]:
        """How ssh commands to other hosts end; few at once, as sshd turns away many."""
        with ThreadPoolExecutor(4) as pool:
            return dict(zip(commands, pool.map(lambda command: _run(command, seconds), commands.values())))  # noqa: B905

    def answer_listen(self) -> dict[str, list[int]]:
        """Opens ports on each address of this host, and returns them."""
        opened: dict[str, list[int]] = {}
        for interface in interfaces():
            for _ in range(LISTENERS):
                server = socket.create_server((interface["address"], 0), backlog=_VISITORS)
                opened.setdefault(interface["address"], []).append(server.getsockname()[1])
                threading.Thread(target=self._accept, args=(server,), daemon=True).start()
        return opened

    def answer_reach(self, peers: list[list[Any]]) -> list[dict[str, Any]]:
        """Tries addresses and ports of other hosts, each (host, address, port), and measures the round trip."""
        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(lambda peer: self._reach(*peer), peers))
        for link in found:  # alone, or the pings of the one would wait for the other
            if link["problem"] is None:
                link["seconds"] = self._ping(link["address"], link["port"])
        return found

    def answer_stream(self, address: str, port: int) -> dict[str, float]:
        """Sends as fast as it goes to another host, which counts: bytes, and seconds from the first to the last."""
        connection, _ = self._connect(address, port)
        with connection:
            connection.sendall(b"S")
            began, sent = time.monotonic(), 0
            while time.monotonic() < began + STREAM_SECONDS and sent < _STREAM_BYTES:
                sent += connection.send(_CHUNK)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(10 * CONNECT_SECONDS)  # a slow network still has to empty its buffers
            received, seconds = struct.unpack("!Qd", _exactly(connection, 16))
        return {"bytes": received, "seconds": seconds}

    def _reach(self, host: str, address: str, port: int) -> dict[str, Any]:
        link: dict[str, Any] = {"to": host, "address": address, "port": port, "problem": None, "kind": None}
        try:
            connection, name = self._connect(address, port)
            connection.close()
            if name != host:
                link.update(kind="other", problem=f"{name} answers there")
        except (socket.timeout, OSError) as error:  # noqa: UP041 - one and the same from Python 3.10 on
            link.update(kind=_kind(error), problem=str(getattr(error, "strerror", None) or error))
        return link

    def _ping(self, address: str, port: int) -> float | None:
        """The shortest round trip of one byte, in seconds."""
        try:
            connection, _ = self._connect(address, port)
            with connection:
                connection.sendall(b"P")
                times = []
                for _ in range(PINGS):
                    began = time.perf_counter()
                    connection.sendall(b"p")
                    _exactly(connection, 1)
                    times.append(time.perf_counter() - began)
        except OSError:
            return None
        return min(times)

    # ---- How probes talk to each other -------------------------------------------------------------------------------

    def _connect(self, address: str, port: int) -> tuple[socket.socket, str]:
        """A connection to another probe, and that probe's name; both have proved that they know the token."""
        connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            theirs, mine = _exactly(connection, 16), secrets.token_bytes(16)
            connection.sendall(mine + self._proof(b"client", theirs))
            proof, length = _exactly(connection, _MAC_BYTES), _exactly(connection, 1)
            name = _exactly(connection, length[0])
            if not hmac.compare_digest(proof, self._proof(b"server", mine + name)):
                raise OSError("what answers there is no probe of this doctor")
        except BaseException:
            connection.close()
            raise
        return connection, name.decode()

    def _accept(self, server: socket.socket) -> None:
        while True:
            connection, _ = server.accept()
            if self._visitors.acquire(blocking=False):
                threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def _welcome(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(CONNECT_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                nonce = secrets.token_bytes(16)
                connection.sendall(nonce)
                theirs, proof = _exactly(connection, 16), _exactly(connection, _MAC_BYTES)
                if not hmac.compare_digest(proof, self._proof(b"client", nonce)):
                    return
                name = self.name.encode()[:255]
                connection.sendall(self._proof(b"server", theirs + name) + bytes([len(name)]) + name)
                self._oblige(connection)
        finally:
            self._visitors.release()

    def _oblige(self, connection: socket.socket) -> None:
        wish = connection.recv(1)
        if wish == b"P":
            for _ in range(PINGS):
                connection.sendall(_exactly(connection, 1))
        elif wish == b"S":
            received, first = 0, 0.0
            buffer = bytearray(len(_CHUNK))
            connection.settimeout(10 * CONNECT_SECONDS)
            while count := connection.recv_into(buffer):
                first = first or time.monotonic()
                received += count
            connection.sendall(struct.pack("!Qd", received, time.monotonic() - first))

    def _proof(self, side: bytes, content: bytes) -> bytes:
        return hmac.new(self._key, side + content, hashlib.sha256).digest()

    # ---- The ranks ---------------------------------------------------------------------------------------------------

    def answer_start_ranks(self, command: list[str], program: str, env: dict[str, str], directory: str) -> None:
        """Starts the program that becomes this host's ranks (`ranks.py`) as the launcher would."""
        if not Path(directory).is_dir():
            raise FileNotFoundError(f"there is no directory {directory}")
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._ranks = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            cwd=directory,
            env={**os.environ, **env},
            start_new_session=True,
        )
        content = program.encode()
        self._tell_ranks(b"%d\n" % len(content) + content)

    def answer_ranks(self, order: dict[str, Any] | None) -> Any:
        """Passes an order on, if there is one, and waits for the next line of that program."""
        if self._ranks is None or self._ranks.stdout is None:
            raise RuntimeError("they were not started")
        if order is not None:
            self._tell_ranks(json.dumps(order).encode() + b"\n")
        line = self._ranks.stdout.readline()
        if not line:
            code = self._ranks.wait()
            self._complaints.seek(0)
            said = self._complaints.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"it ended with {code}: {said[-1] if said else 'without a word'}")
        return json.loads(line)

    def _tell_ranks(self, content: bytes) -> None:
        if self._ranks is not None and self._ranks.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # why it ended is told by its output
                self._ranks.stdin.write(content)
                self._ranks.stdin.flush()


def interfaces() -> Iterator[dict[str, Any]]:
    """The IPv4 interfaces that are up, without loopback: name, address and network mask."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:

        def ask(what: int, name: str) -> bytes:
            return fcntl.ioctl(query.fileno(), what, struct.pack("256s", name.encode()[:15]))

        for _, name in socket.if_nameindex():
            try:
                (flags,) = struct.unpack_from("H", ask(_SIOCGIFFLAGS, name), 16)
                address, mask = (socket.inet_ntoa(ask(what, name)[20:24]) for what in (_SIOCGIFADDR, _SIOCGIFNETMASK))
            except OSError:  # it has no IPv4 address
                continue
            if flags & _IFF_UP and not flags & _IFF_LOOPBACK:
                yield {"name": name, "address": address, "mask": mask}


def _resolve(name: str) -> dict[str, Any]:
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        return {"addresses": [], "problem": str(error.strerror or error)}
    return {"addresses": list(dict.fromkeys(str(entry[4][0]) for entry in found)), "problem": None}


def _run(command: list[str], seconds: float) -> dict[str, Any]:
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)
    except FileNotFoundError:
        return {"code": 127, "said": f"{command[0]} is not installed"}
    except subprocess.TimeoutExpired:
        return {"code": 255, "said": f"Connection timed out: no answer within {seconds:g} s"}
    return {"code": ended.returncode, "said": ended.stderr.decode(errors="replace").strip()[-2000:]}


def _space(path: Path) -> dict[str, int]:
    status = os.statvfs(path)
    return {"free": status.f_bavail * status.f_frsize, "size": status.f_blocks * status.f_frsize}


def _kind(error: OSError) -> str:
    """What became of an attempt to connect: nobody answered, somebody said no, there is no way, or something else."""
    if isinstance(error, socket.timeout):  # TimeoutError, from Python 3.10 on
        return "silence"
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EPERM, errno.EINVAL):
        return "no way"
    return "refused" if error.errno == errno.ECONNREFUSED else "other"


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
        data += piece
    return data


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin")


if __name__ == "__main__":
    begin = json.loads(sys.stdin.buffer.readline())
    probe = Probe(begin["name"], begin["token"], begin["lifetime"])
    probe.say({"hello": begin["name"], "host": probe.answer_host()})
    probe.serve()

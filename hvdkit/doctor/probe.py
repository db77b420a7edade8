"""The doctor's program on each host: answers questions about the host, and connects to the probes of other hosts.

The doctor sends this file through the standard input of one ssh connection per host (see `connection.py`). Keep it a
single file that imports only the standard library, so that it works if hvdkit is missing or broken. Requests and
answers are lines of JSON. Answers come in the order in which they are ready.

A probe accepts connections only from other probes: both sides prove that they know the token from ssh without sending
it. A probe ends, with all processes that it started, when its input closes or its lifetime is over.
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

LISTENERS = 3  # ports to open on each address, since a firewall may let a single one through by chance
CONNECT_SECONDS = 3.0
PINGS = 30
STREAM_SECONDS = 0.4
_STREAM_BYTES = 1 << 28  # the limit on a fast network
_CHUNK = bytes(1 << 18)
_MAC_BYTES = 32
_VISITORS = 64  # concurrent connections
_SIOCGIFFLAGS, _SIOCGIFADDR, _SIOCGIFNETMASK = 0x8913, 0x8915, 0x891B
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8


class Probe:
    """Answers one doctor on this host."""

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
        signal.alarm(lifetime)  # a cut network closes no connection

    def serve(self) -> None:
        """Answers until the input closes. Each request that may block runs in its own thread."""
        for line in sys.stdin.buffer:
            request = json.loads(line)
            # The clock must be read without delay. The ranks' process ends with the thread that started it, so the main
            # thread must start it.
            if request["do"] in ("time", "start_ranks"):
                self._answer(request)
            else:
                threading.Thread(target=self._answer, args=(request,), daemon=True).start()
        self.close()

    def close(self) -> None:
        """Removes all files, ends all processes, and exits."""
        if self._ranks is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._ranks.pid, signal.SIGKILL)
        self.answer_unmark()
        for made in reversed(self._made):
            with contextlib.suppress(OSError):  # it has files of another host or user
                made.rmdir()
        os._exit(0)

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            found: dict[str, Any] = {"answer": getattr(self, "answer_" + request["do"])(**request.get("with", {}))}
        except Exception as error:  # any error on this host is an answer for the doctor
            found = {"problem": f"{type(error).__name__}: {error}"}
        self.say({"id": request["id"], **found})

    def say(self, content: dict[str, Any]) -> None:
        """Sends a line to the doctor."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            sys.stdout.write(json.dumps(content) + "\n")
            sys.stdout.flush()

    # ---- This host ---------------------------------------------------------------------------------------------------

    def answer_time(self) -> float:
        """Seconds since 1970 by this host's clock."""
        return time.time()

    def answer_host(self) -> dict[str, Any]:
        """A description of this host, with the facts on which fixes depend."""
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
        """The IPv4 addresses to which this host resolves the names and its own name."""
        with ThreadPoolExecutor(16) as pool:
            every = list(dict.fromkeys([*names, socket.gethostname()]))
            return dict(zip(every, pool.map(_resolve, every)))  # noqa: B905 - the host's Python may be old

    def answer_gpus(self) -> dict[str, Any]:
        """The GPUs that NVIDIA's driver reports."""
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
        """Space in bytes in the workdir and for temporary files."""
        there = next(path for path in (Path(workdir), *Path(workdir).parents) if path.exists())
        temporary = Path(tempfile.gettempdir())
        return {
            "workdir": {"path": str(there), **_space(there)},
            "temporary": {"path": str(temporary), **_space(temporary)},
        }

    def answer_files(self) -> dict[str, int]:
        """The soft and the hard limit of open files per process."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return {"soft": soft, "hard": hard}

    def answer_workdir(self, workdir: str, mark: str) -> dict[str, Any]:
        """Writes a mark into a directory. A missing directory is created, and removed at the end."""
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
        """The hosts whose marks this host sees in the directory. If the directory is shared, these are all hosts."""
        prefix = f".hvdkit-doctor-{mark}-"
        return sorted(path.name[len(prefix) :] for path in Path(workdir).glob(prefix + "*"))

    def answer_unmark(self) -> None:
        """Removes this host's mark."""
        for file in self._marks:
            with contextlib.suppress(OSError):
                file.unlink()

    # ---- From this host to others ------------------------------------------------------------------------------------

    def answer_ssh(self, commands: dict[str, list[str]], seconds: float) -> dict[str, Any]:
        """The exit codes of ssh commands to other hosts; few at once, since sshd refuses many."""
        with ThreadPoolExecutor(4) as pool:
            return dict(zip(commands, pool.map(lambda command: _run(command, seconds), commands.values())))  # noqa: B905

    def answer_listen(self) -> dict[str, list[int]]:
        """Opens ports on each address of this host and returns them."""
        opened: dict[str, list[int]] = {}
        for interface in interfaces():
            for _ in range(LISTENERS):
                server = socket.create_server((interface["address"], 0), backlog=_VISITORS)
                opened.setdefault(interface["address"], []).append(server.getsockname()[1])
                threading.Thread(target=self._accept, args=(server,), daemon=True).start()
        return opened

    def answer_reach(self, peers: list[list[Any]]) -> list[dict[str, Any]]:
        """Connects to the (host, address, port) of other hosts and measures the round trips."""
        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(lambda peer: self._reach(*peer), peers))
        for link in found:  # one at a time, so that pings do not delay each other
            if link["problem"] is None:
                link["seconds"] = self._ping(link["address"], link["port"])
        return found

    def answer_stream(self, address: str, port: int) -> dict[str, float]:
        """Sends to another host as fast as possible; returns the bytes and seconds that the receiver measured."""
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
        except (socket.timeout, OSError) as error:  # noqa: UP041 - they are the same from Python 3.10 on
            link.update(kind=_kind(error), problem=str(getattr(error, "strerror", None) or error))
        return link

    def _ping(self, address: str, port: int) -> float | None:
        """The shortest round trip of one byte in seconds."""
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
        """Connects to another probe, verifies the token on both sides, and returns the probe's name, too."""
        connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            theirs, mine = _exactly(connection, 16), secrets.token_bytes(16)
            connection.sendall(mine + self._proof(b"client", theirs))
            proof, length = _exactly(connection, _MAC_BYTES), _exactly(connection, 1)
            name = _exactly(connection, length[0])
            if not hmac.compare_digest(proof, self._proof(b"server", mine + name)):
                raise OSError("the program that answers there is not a probe of this doctor")
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
                self._serve_peer(connection)
        finally:
            self._visitors.release()

    def _serve_peer(self, connection: socket.socket) -> None:
        request = connection.recv(1)
        if request == b"P":
            for _ in range(PINGS):
                connection.sendall(_exactly(connection, 1))
        elif request == b"S":
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
        """Starts the program that becomes this host's ranks (`ranks.py`), as the launcher would."""
        if not Path(directory).is_dir():
            raise FileNotFoundError(f"there is no directory {directory}")
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - stays open as long as the process runs
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
        """Forwards an order to that program, if given, and waits for its next line."""
        if self._ranks is None or self._ranks.stdout is None:
            raise RuntimeError("the ranks were not started")
        if order is not None:
            self._tell_ranks(json.dumps(order).encode() + b"\n")
        line = self._ranks.stdout.readline()
        if not line:
            code = self._ranks.wait()
            self._complaints.seek(0)
            said = self._complaints.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"it ended with {code}: {said[-1] if said else 'without output'}")
        return json.loads(line)

    def _tell_ranks(self, content: bytes) -> None:
        if self._ranks is not None and self._ranks.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # its output says why it ended
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
            except OSError:  # the interface has no IPv4 address
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
    """The kind of a connection error: no answer, refused, no route or not permitted, or another one."""
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

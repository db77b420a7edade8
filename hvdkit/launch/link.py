"""The launcher's connection to one host: starts an agent there, through a remote shell if needed, and talks to it.

The agent's source, and then all orders, go through its standard input. The ranks' environment may hold secrets, and so
never appears on a command line. The agent's answers become events on one queue.
"""

import contextlib
import dataclasses
import json
import queue
import secrets
import shlex
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import IO, Any

from hvdkit.errors import UsageError
from hvdkit.launch import agent
from hvdkit.launch.shells import Shell

_MOST_BYTES = 1 << 24  # of a frame; an agent sends at most 64 KiB
_MOST_COMPLAINTS = 1 << 16  # the last bytes of ssh's error output that are kept
_PROGRAM = (
    "i=open(0,'rb',0,closefd=False);s=b''.join(i.readline() for _ in range(int(i.readline())));"
    "exec(compile(s,'hvdkit-agent','exec'));main('{nonce}')"
)


@dataclasses.dataclass(frozen=True)
class Event:
    """A frame from an agent, or `GONE` as `kind` if the connection has ended."""

    link: "Link"
    kind: bytes
    rank: int = 0
    body: bytes = b""

    def content(self) -> Any:
        """The body of a JSON frame, parsed."""
        return json.loads(self.body)


GONE = b"gone"


class Link:
    """An agent on one host.

    Args:
        host: the host's name, as the user gave it.
        shell: how to reach it; None for this host.
        python: the interpreter on that host that runs the agent.
        events: the queue for the agent's frames.
    """

    def __init__(self, host: str, shell: Shell | None, python: str, events: "queue.SimpleQueue[Any]") -> None:
        self.host = host
        self.shell = shell
        self.heard = time.monotonic()
        self.about: dict[str, Any] | None = None  # the agent's description of its host
        self.is_gone = False
        self._events = events
        self._lock = threading.Lock()
        self._complaints = b""
        self._nonce = secrets.token_hex(8)
        self._python = python
        program = [python, "-I", "-S", "-c", _PROGRAM.format(nonce=self._nonce)]
        try:
            # A separate session: otherwise Ctrl-C would end the connection before it could end the ranks.
            self._process = subprocess.Popen(
                program if shell is None else shell.command(host, "exec " + shlex.join(program)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            fix = shell.install if shell else "reinstall Python"
            raise UsageError(f"{error.filename} is missing; {fix}.") from None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._read_complaints)]
        for thread in self._threads:
            thread.start()
        source = Path(agent.__file__).read_bytes()
        self._write(b"%d\n" % len(source.splitlines()) + source)

    @property
    def is_remote(self) -> bool:
        """Whether the agent is on another host."""
        return self.shell is not None

    def send(self, **order: Any) -> None:
        """Sends an order. If the agent has ended, an event reports it."""
        self._write(json.dumps(order).encode() + b"\n")

    def silent_for(self) -> float:
        """Seconds since the agent's last frame."""
        return time.monotonic() - self.heard

    def hang_up(self) -> None:
        """Tells the agent to end, by closing its input. `close` waits for it."""
        with contextlib.suppress(OSError), self._lock:
            if self._process.stdin:
                self._process.stdin.close()

    def close(self, until: float) -> None:
        """Ends the connection and the agent, by force after the time `until` of `time.monotonic()`."""
        try:
            self._process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            # A remote host does not answer. The agent there ends itself when it receives no more heartbeats.
            self._process.send_signal(signal.SIGKILL if self.is_remote else signal.SIGTERM)
        try:
            self._process.wait(8)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the agent is unresponsive; the ranks end with it
            self._process.wait()
        for thread in self._threads:
            thread.join(2)

    def complaint(self) -> str:
        """Why there is no agent and how to fix it, in a sentence. Call it after the connection has ended."""
        self._threads[1].join(2)
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            code = 255  # ssh's exit code for a failed connection
        said = self._complaints.decode(errors="replace").strip()
        if self.shell is None:
            return f"The agent on this host ended: {said or code}"
        return self.shell.explain(self.host, said, code, self._python)

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError, ValueError), self._lock:
            if self._process.stdin:
                self._process.stdin.write(data)
                self._process.stdin.flush()

    def _read(self) -> None:
        source = self._process.stdout
        if source is not None and self._find_greeting(source):
            while frame := _frame(source):
                self.heard = time.monotonic()
                if frame[0] != agent.BEAT:
                    self._events.put(Event(self, *frame))
        self._events.put(Event(self, GONE))

    def _find_greeting(self, source: IO[bytes]) -> bool:
        """Skips the output of the shell's start-up files."""
        greeting = agent.GREETING + self._nonce.encode() + b"\n"
        return any(line.endswith(greeting) for line in iter(lambda: source.readline(1 << 16), b""))

    def _read_complaints(self) -> None:
        source = self._process.stderr
        while source is not None and (data := source.read1(4096)):  # type: ignore[attr-defined]
            self._complaints = (self._complaints + data)[-_MOST_COMPLAINTS:]


def _frame(source: IO[bytes]) -> tuple[bytes, int, bytes] | None:
    head = source.read(agent.FRAME.size)
    if len(head) < agent.FRAME.size:
        return None
    kind, rank, length = agent.FRAME.unpack(head)
    body = source.read(length) if length <= _MOST_BYTES else b""
    return (kind, rank, body) if len(body) == length else None


# --------------------------------------------------------------------------------------------- Names and addresses


def address_of(host: str, shell: Shell) -> str:
    """A host's IPv4 address. Names that only the remote shell knows are looked up in its configuration.

    Raises:
        UsageError: the name has no address.
    """
    for name in (lambda: host, lambda: shell.name_of(host)):
        with contextlib.suppress(OSError):
            return socket.gethostbyname(name())
    raise UsageError(f"Host {host} is not known here. Is the name right? getent hosts {host} must find its address.")


def is_this_host(host: str, address: str) -> bool:
    """Whether a name and its address are this host's own. A socket can only be bound to an own address."""
    if host == socket.gethostname() or address.startswith("127."):
        return True
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def is_reachable(host: str, shell: Shell) -> bool:
    """Whether a command can be run on a host within ten seconds."""
    try:
        if is_this_host(host, address_of(host, shell)):
            return True
        asked = subprocess.run(
            shell.command(host, "true"), stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False
        )
    except (UsageError, OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


def own_address_towards(address: str) -> str:
    """The address that this host uses to reach another."""
    return str(agent.source_address(address) or "127.0.0.1")

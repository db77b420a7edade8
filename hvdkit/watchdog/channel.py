"""Authenticated connections between the watchdogs of one job: framed JSON over TCP.

Both ends prove that they know the job's token, by HMAC-SHA256 over fresh random challenges from both sides. This keeps
out strangers and replayed connections. Messages are JSON, never pickles, and limited in size. They are not encrypted:
they contain stack traces, not data.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import threading
import time
from typing import Any

from hvdkit.world.ranks import World

Message = dict[str, Any]

MOST_BYTES = 8 << 20  # limit of a message; the stacks and signatures of a large model are far smaller
MOST_VISITORS = 64  # limit of connections that are not authenticated yet
PATIENCE = 5.0  # seconds to authenticate, or to connect
_CHALLENGE = 32
_LENGTH = struct.Struct("!I")
_REPLY = struct.Struct(f"!I{_CHALLENGE}s32s")  # rank, the caller's challenge, the caller's HMAC


class Gone(ConnectionError):  # noqa: N818 - says what happened
    """The connection is lost, or the other end violates the protocol."""


class Connection:
    """An authenticated connection to another rank. `send` may be called from any thread and never blocks.

    Args:
        sock: the socket; it is made non-blocking.
        rank: the rank at the other end.
    """

    def __init__(self, sock: socket.socket, rank: int) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.rank = rank
        self._lock = threading.Lock()
        self._incoming = bytearray()
        self._outgoing = bytearray()

    def send(self, message: Message) -> None:
        """Sends, or buffers for `flush` what the socket does not accept now. `receive` reports a lost connection."""
        body = json.dumps(message).encode()
        if len(body) > MOST_BYTES:
            raise ValueError(f"A message of {len(body)} bytes is over the limit of {MOST_BYTES}.")
        with self._lock:
            self._outgoing += _LENGTH.pack(len(body)) + body
        self.flush()

    def flush(self) -> None:
        """Sends what is buffered, as far as the socket accepts it."""
        with self._lock, contextlib.suppress(OSError):
            while self._outgoing:
                del self._outgoing[: self.sock.send(self._outgoing)]

    def receive(self) -> list[Message]:
        """Returns the messages that have arrived.

        Raises:
            Gone: the connection is lost, or the data is not a message; do not call `receive` again.
        """
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Gone(str(error)) from error
        if not data:
            raise Gone("closed by the other end")
        self._incoming += data
        return self._whole_messages()

    def _whole_messages(self) -> list[Message]:
        messages = []
        while len(self._incoming) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming)
            if length > MOST_BYTES:
                raise Gone(f"a message of {length} bytes was announced")
            end = _LENGTH.size + length
            if len(self._incoming) < end:
                break
            try:
                message = json.loads(self._incoming[_LENGTH.size : end])
            except ValueError as error:
                raise Gone(str(error)) from error
            del self._incoming[:end]
            if not isinstance(message, dict):
                raise Gone("what came is no message")
            messages.append(message)
        return messages

    def close(self) -> None:
        """Closes the connection. Data already sent still arrives, even if received data was not read."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self.sock.close()


class Visitor:
    """An incoming connection that is not authenticated yet.

    Args:
        sock: the accepted socket.
        token: the job's secret.
        size: number of ranks in the job.
    """

    def __init__(self, sock: socket.socket, token: bytes, size: int) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.until = time.monotonic() + PATIENCE
        self._token = token
        self._size = size
        self._challenge = secrets.token_bytes(_CHALLENGE)
        self._reply = b""
        sock.send(self._challenge)

    def receive(self) -> Connection | None:
        """Reads more; returns the authenticated connection, or None while the proof is incomplete.

        Raises:
            Gone: the other end has closed the connection, or its proof is wrong.
        """
        try:
            self._reply += self.sock.recv(_REPLY.size - len(self._reply)) or _refuse("left before the proof")
            if len(self._reply) < _REPLY.size:
                return None
            rank, challenge, proof = _REPLY.unpack(self._reply)
            expected = _prove(self._token, b"caller", self._challenge, challenge, rank)
            if not hmac.compare_digest(proof, expected) or rank >= self._size:
                _refuse("wrong proof")
            self.sock.send(_prove(self._token, b"host", self._challenge, challenge, rank))
        except BlockingIOError:
            return None
        except OSError as error:
            raise Gone(str(error)) from error
        return Connection(self.sock, rank)


def call(address: tuple[str, int], token: bytes, *, mine: int, theirs: int) -> Connection:
    """Opens a connection to another rank.

    Args:
        address: host address and port on which the other rank listens.
        token: the job's secret.
        mine: this rank.
        theirs: the other rank.

    Raises:
        OSError: nothing listens there, or the other end does not know the token.
    """
    sock = socket.create_connection(address, timeout=PATIENCE)
    try:
        theirs_challenge = _read(sock, _CHALLENGE)
        my_challenge = secrets.token_bytes(_CHALLENGE)
        proof = _prove(token, b"caller", theirs_challenge, my_challenge, mine)
        sock.sendall(_REPLY.pack(mine, my_challenge, proof))
        if not hmac.compare_digest(_read(sock, 32), _prove(token, b"host", theirs_challenge, my_challenge, mine)):
            _refuse("wrong proof")
    except OSError:
        sock.close()
        raise
    return Connection(sock, theirs)


def listen(address: str) -> socket.socket:
    """A listening socket on a free port of a local address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    door = socket.create_server((address, 0), family=family, backlog=256)
    door.setblocking(False)
    return door


def own_address(world: World) -> str:
    """The address at which the job's other hosts reach this one; loopback if all ranks are on this host."""
    if world.local_size == world.size:
        return "127.0.0.1"
    return _address_of(os.environ.get("HOROVOD_GLOO_IFACE", "")) or _address_of_own_name() or _outward_address()


def _address_of(interface: str) -> str | None:
    import psutil

    addresses = [a.address for a in psutil.net_if_addrs().get(interface, []) if a.family == socket.AF_INET]
    return next((a for a in addresses if not a.startswith("127.")), None)


def _address_of_own_name() -> str | None:
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return None
    return next((str(entry[4][0]) for entry in found if not str(entry[4][0]).startswith("127.")), None)


def _outward_address() -> str:
    """The source address of the default route: connecting a UDP socket looks it up without sending anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # reserved for documentation (RFC 5737)
        return str(probe.getsockname()[0])


def _prove(token: bytes, role: bytes, challenge: bytes, other: bytes, rank: int) -> bytes:
    return hmac.digest(token, role + challenge + other + _LENGTH.pack(rank), hashlib.sha256)


def _read(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        data += sock.recv(length - len(data)) or _refuse("closed by the other end")
    return data


def _refuse(why: str) -> bytes:
    raise Gone(why)

"""Where a job's ranks find each other: Horovod's rendezvous server, open to the job's hosts alone.

Horovod's own listens on every interface, takes values of any size from anybody, and where it is elastic unpickles them
(CVE-2024-10190, CVE-2026-31234). This one listens on the job's interface (loopback for a job on one host), closes a
connection from any other address than those of the job's hosts before it reads from it, and answers only to who
knows the job's token. Values are bytes that Gloo left for Gloo: bounded, kept, given back, and never looked into.

The token is the first part of every path. Horovod's client in C++ makes its addresses of HOROVOD_GLOO_RENDEZVOUS_ADDR
by joining strings, so a token in that variable goes with each request; other users of the host cannot read a rank's
environment. It is not encrypted on its way: who can listen on the job's own network can read it.
"""

import hmac
import re
import secrets
import socketserver
import threading
import time
from collections.abc import Collection
from typing import Any

from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

MOST_BYTES = 1 << 20  # of a value: Gloo's list of addresses of 1,000 ranks has a tenth of it
MOST_VALUES = 1 << 16
MOST_VISITORS = 512  # connections at once
_PATH = re.compile(r"/([0-9a-f]{64}):\d{1,5}/([\w.,-]{1,300})/([\w.,:-]{1,300})", re.ASCII)
_SCOPE_OF_ALL = "global"  # where each rank first says that it is there, under its number


class Rendezvous:
    """The rendezvous of one job.

    Args:
        slots: the ranks' places (`hosts.assign`).
        hosts: the addresses from which the job's hosts may come; its own addresses must be among them, too.
    """

    def __init__(self, slots: Collection[Any], hosts: Collection[str]) -> None:
        self.token = secrets.token_hex(32)
        self.arrived: dict[int, float] = {}  # when each rank reached `hvd.init()`, by the monotonic clock
        self.refused = 0  # visitors that were sent away
        self._slots = slots
        self._hosts = frozenset(hosts)
        self._servers: dict[str, _Server] = {}

    def open(self, address: str) -> int:
        """Listens on one of this host's addresses, and returns the port."""
        server = self._servers.get(address)
        if server is None:
            server = self._servers[address] = _Server((address, 0), self, next(iter(self._servers.values()), None))
            if len(self._servers) == 1:
                server.init(self._slots)
            threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        return int(server.server_address[1])

    def environment(self, address: str) -> dict[str, str]:
        """What a rank needs in its environment to come to `address`."""
        port = self.open(address)
        # Horovod joins "http://" + ADDR + ":" + PORT + "/": what follows ADDR's own port and slash is path.
        return {
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": f"{address}:{port}/{self.token}",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        }

    def admits(self, address: str) -> bool:
        """Whether a visitor from this address is one of the job's hosts."""
        return address in self._hosts

    def close(self) -> None:
        """Stops listening."""
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def note(self, scope: str, key: str) -> None:
        """Takes note of a rank's first value."""
        if scope == _SCOPE_OF_ALL and key.isdigit():
            self.arrived.setdefault(int(key), time.monotonic())


class _Handler(RendezvousHandler):
    """One request: its token is checked and its path cut to what Horovod's handler expects."""

    server: "_Server"
    path: str
    server_version, sys_version = "hvdkit", ""

    def do_GET(self) -> None:  # noqa: N802 - http.server calls it so
        if self._is_admitted():
            super().do_GET()

    def do_PUT(self) -> None:  # noqa: N802 - http.server calls it so
        length = self.headers.get("Content-Length", "")
        if self._is_admitted():
            if not length.isdigit() or int(length) > MOST_BYTES or self.server.is_full():
                self._refuse(413)
                return
            _, scope, key = self.path.split("/")
            self.server.rendezvous.note(scope, key)  # before it is answered
            super().do_PUT()

    def do_DELETE(self) -> None:  # noqa: N802 - http.server calls it so
        if self._is_admitted():
            super().do_DELETE()

    def do_HEAD(self) -> None:  # noqa: N802 - the base class would answer it with files of the working directory
        self._refuse(405)

    def _is_admitted(self) -> bool:
        match = _PATH.fullmatch(self.path)
        if not match or not hmac.compare_digest(match[1], self.server.rendezvous.token):
            self._refuse(403)
            return False
        self.path = f"/{match[2]}/{match[3]}"
        return True

    def _refuse(self, status: int) -> None:
        self.server.rendezvous.refused += 1
        self.close_connection = True
        self.send_status_code(status)


class _Server(RendezvousHTTPServer):
    """Listens on one address; several of one job share what they hold."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], rendezvous: Rendezvous, sibling: "_Server | None") -> None:
        super().__init__(address, _Handler, False)
        self.rendezvous = rendezvous
        self._places = threading.BoundedSemaphore(MOST_VISITORS)
        if sibling is not None:
            for name in ("cache_lock", "cache", "finished_list_lock", "finished_list", "scope_size"):
                setattr(self, name, getattr(sibling, name))

    def server_bind(self) -> None:  # the base class would ask the DNS for the address's name
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def is_full(self) -> bool:
        with self.cache_lock:
            return sum(len(values) for values in self.cache.values()) >= MOST_VALUES

    def verify_request(self, request: Any, client_address: tuple[str, int]) -> bool:
        if self.rendezvous.admits(client_address[0]):
            return True
        self.rendezvous.refused += 1
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        self._places.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A visitor who breaks off is no news."""

"""The rendezvous server through which a job's ranks find each other, restricted to the job's hosts.

Horovod's own server listens on every interface, accepts values of any size from any client, and in elastic mode
unpickles them (CVE-2024-10190, CVE-2026-31234). This server listens on the job's interface (loopback for a job on one
host). It closes connections from other addresses than those of the job's hosts before reading from them, and answers
only requests with the job's token. Values are opaque bytes for Gloo: limited in size and number, stored and returned,
never parsed.

The token is the first part of every path. Horovod's C++ client builds its URLs from HOROVOD_GLOO_RENDEZVOUS_ADDR by
joining strings, so a token in that variable is part of each request. Other users of the host cannot read a rank's
environment. The token is not encrypted in transit: anyone who can capture the job's network traffic can read it.
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

MOST_BYTES = 1 << 20  # of a value; Gloo's address list of 1,000 ranks takes a tenth of it
MOST_VALUES = 1 << 16
MOST_VISITORS = 512  # concurrent connections
_PATH = re.compile(r"/([0-9a-f]{64}):\d{1,5}/([\w.,-]{1,300})/([\w.,:-]{1,300})", re.ASCII)
_SCOPE_OF_ALL = "global"  # each rank first registers here, under its number


class Rendezvous:
    """The rendezvous of one job.

    Args:
        slots: the ranks' slots (`hosts.assign`).
        hosts: the addresses of the job's hosts, including this host's own.
    """

    def __init__(self, slots: Collection[Any], hosts: Collection[str]) -> None:
        self.token = secrets.token_hex(32)
        self.arrived: dict[int, float] = {}  # time.monotonic() at which each rank reached `hvd.init()`
        self.refused = 0  # number of refused connections and requests
        self._slots = slots
        self._hosts = frozenset(hosts)
        self._servers: dict[str, _Server] = {}

    def open(self, address: str) -> int:
        """Listens on one of this host's addresses and returns the port."""
        server = self._servers.get(address)
        if server is None:
            server = self._servers[address] = _Server((address, 0), self, next(iter(self._servers.values()), None))
            if len(self._servers) == 1:
                server.init(self._slots)
            threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        return int(server.server_address[1])

    def environment(self, address: str) -> dict[str, str]:
        """The environment with which a rank connects to `address`."""
        port = self.open(address)
        # Horovod joins "http://" + ADDR + ":" + PORT + "/", so all after the port and slash in ADDR becomes the path.
        return {
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": f"{address}:{port}/{self.token}",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        }

    def admits(self, address: str) -> bool:
        """Whether this address is one of the job's hosts."""
        return address in self._hosts

    def close(self) -> None:
        """Stops listening."""
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def note(self, scope: str, key: str) -> None:
        """Records the time of a rank's first value."""
        if scope == _SCOPE_OF_ALL and key.isdigit():
            self.arrived.setdefault(int(key), time.monotonic())


class _Handler(RendezvousHandler):
    """Handles one request: checks its token, and reduces its path to the form that Horovod's handler expects."""

    server: "_Server"
    path: str
    server_version, sys_version = "hvdkit", ""

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        if self._is_admitted():
            super().do_GET()

    def do_PUT(self) -> None:  # noqa: N802 - the name that http.server calls
        length = self.headers.get("Content-Length", "")
        if self._is_admitted():
            if not length.isdigit() or int(length) > MOST_BYTES or self.server.is_full():
                self._refuse(413)
                return
            _, scope, key = self.path.split("/")
            self.server.rendezvous.note(scope, key)  # before the answer
            super().do_PUT()

    def _put_value(self, scope: str, key: str, value: bytes) -> None:
        """Stores a value. The first value of a later `hvd.init()` removes those of the one before from its scope.

        Each rank registers once in each scope when Horovod starts. After `hvd.shutdown()` it registers again, and must
        not find the addresses that the other ranks had before: it would connect to closed ports and crash.
        """
        with self.server.cache_lock:
            values = self.server.cache.setdefault(scope, {})
            if key in values:
                values.clear()
            values[key] = value

    def do_DELETE(self) -> None:  # noqa: N802 - the name that http.server calls
        if self._is_admitted():
            super().do_DELETE()

    def do_HEAD(self) -> None:  # noqa: N802 - the base class would serve files of the working directory
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
    """Listens on one address. The servers of one job share their values."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], rendezvous: Rendezvous, sibling: "_Server | None") -> None:
        super().__init__(address, _Handler, False)
        self.rendezvous = rendezvous
        self._places = threading.BoundedSemaphore(MOST_VISITORS)
        if sibling is not None:
            for name in ("cache_lock", "cache", "finished_list_lock", "finished_list", "scope_size"):
                setattr(self, name, getattr(sibling, name))

    def server_bind(self) -> None:  # the base class would look up the address in the DNS
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
        """Ignores clients that disconnect."""

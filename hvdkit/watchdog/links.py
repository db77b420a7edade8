"""This rank's connections: those that other ranks have opened, and its own to the hub.

Only the watchdog's thread opens and closes them. `everyone` may be called from any thread.
"""

import logging
import selectors
import socket
import time
from collections.abc import Callable

from hvdkit.watchdog.channel import MOST_VISITORS, Connection, Gone, Message, Visitor

_log = logging.getLogger(__name__)


class Links:
    """All sockets of the watchdog except the one that wakes it.

    Args:
        selector: its data are functions to call when there is something to read.
        door: the listening socket for the other ranks.
        token: the job's secret.
        size: number of ranks.
        on_caller: called with each incoming connection once it is authenticated.
        on_readable: called with a connection that has data to read, or is lost.

    Attributes:
        callers: incoming connections, by rank: the hub's members, or a rank that takes this one for the hub.
        hub: the connection to the hub; None on the hub itself, or before it is connected.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        door: socket.socket,
        token: bytes,
        size: int,
        on_caller: Callable[[Connection], None],
        on_readable: Callable[[Connection], None],
    ) -> None:
        self.callers: dict[int, Connection] = {}
        self.hub: Connection | None = None
        self.door = door
        self._selector = selector
        self._token = token
        self._size = size
        self._on_caller = on_caller
        self._on_readable = on_readable
        self._visitors: set[Visitor] = set()

    def open(self) -> None:
        """Starts to accept connections."""
        self._selector.register(self.door, selectors.EVENT_READ, self._on_visitor)

    def everyone(self) -> list[Connection]:
        """All connections."""
        return [*list(self.callers.values()), *([self.hub] if self.hub else [])]

    def send(self, message: Message) -> None:
        """Sends to all connections."""
        for connection in self.everyone():
            connection.send(message)

    def send_to_callers(self, message: Message) -> None:
        """Sends to the incoming connections."""
        for caller in self.callers.values():
            caller.send(message)

    def flush(self) -> None:
        """Sends what is buffered, as far as the sockets accept it."""
        for connection in self.everyone():
            connection.flush()

    def set_hub(self, connection: Connection) -> None:
        """Uses a new connection to the hub."""
        self.hub = connection
        self._selector.register(connection.sock, selectors.EVENT_READ, lambda: self._on_readable(connection))

    def drop_hub(self, last: Message | None = None) -> None:
        """Sends a last message to the hub and closes the connection, if there is one."""
        old, self.hub = self.hub, None
        if old is not None:
            if last is not None:
                old.send(last)
            self._drop(old)

    def drop_caller(self, rank: int) -> None:
        """Closes the connection that a rank has opened, if there is one."""
        old = self.callers.pop(rank, None)
        if old is not None:
            self._drop(old)

    def turn_late_away(self) -> None:
        """Closes the connections that have not authenticated in time."""
        now = time.monotonic()
        for visitor in [v for v in self._visitors if v.until < now]:
            self._turn_away(visitor)

    def close(self) -> None:
        """Closes the connections. Data already sent still arrives."""
        for connection in self.everyone():
            connection.close()

    def forget(self) -> None:
        """Closes this process's copies of the sockets without telling the other ranks."""
        for sock in (self.door, *(c.sock for c in self.everyone()), *(v.sock for v in self._visitors)):
            sock.close()

    def _on_visitor(self) -> None:
        try:
            sock, _ = self.door.accept()
        except OSError:
            return
        if len(self._visitors) >= max(MOST_VISITORS, 2 * self._size):
            sock.close()
            return
        try:
            visitor = Visitor(sock, self._token, self._size)
        except OSError:
            sock.close()
            return
        self._visitors.add(visitor)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._on_proof(visitor))

    def _on_proof(self, visitor: Visitor) -> None:
        try:
            connection = visitor.receive()
        except Gone as error:
            _log.debug("an incoming connection was rejected: %s", error)
            self._turn_away(visitor)
            return
        if connection:
            self._visitors.discard(visitor)
            self.drop_caller(connection.rank)
            self.callers[connection.rank] = connection
            self._on_caller(connection)
            self._selector.modify(visitor.sock, selectors.EVENT_READ, lambda: self._on_readable(connection))

    def _turn_away(self, visitor: Visitor) -> None:
        self._visitors.discard(visitor)
        self._selector.unregister(visitor.sock)
        visitor.sock.close()

    def _drop(self, connection: Connection) -> None:
        connection.flush()
        self._selector.unregister(connection.sock)
        connection.close()

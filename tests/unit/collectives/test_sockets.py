"""How ranks connect: all of them, and nobody else."""

import secrets
import socket
import threading

import pytest

from hvdkit.collectives.transports import sockets
from hvdkit.errors import UsageError
from hvdkit.watchdog.channel import Gone, call, listen


def guests_of(door, token, rank, size):
    """Starts to accept the ranks before `rank`; returns what is found, and the thread."""
    found = {}
    thread = threading.Thread(target=sockets._receive_guests, args=(door, token, rank, size, found))
    thread.start()
    return found, thread


def test_strangers_are_turned_away_and_the_ranks_connect():
    token, door = secrets.token_bytes(32), listen("127.0.0.1")
    found, thread = guests_of(door, token, rank=2, size=3)
    silent = socket.create_connection(door.getsockname())
    with pytest.raises(Gone):
        call(door.getsockname(), secrets.token_bytes(32), mine=0, theirs=2)
    with pytest.raises(Gone):  # this rank does not come before rank 2
        call(door.getsockname(), token, mine=3, theirs=2)
    callers = [call(door.getsockname(), token, mine=rank, theirs=2) for rank in (1, 0)]
    thread.join(20)
    assert sorted(found) == [0, 1]
    found[1].setblocking(True)
    callers[0].sock.send(b"from rank 1")
    assert found[1].recv(99) == b"from rank 1"
    assert silent.recv(99)[32:] == b"", "a stranger gets a challenge, and is disconnected"
    for connection in (silent, door, *found.values(), *(c.sock for c in callers)):
        connection.close()


def test_a_rank_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr(sockets, "_PATIENCE", 0.3)
    door, closed = listen("127.0.0.1"), listen("127.0.0.1")
    where = closed.getsockname()
    closed.close()
    everyone = [{"token": secrets.token_hex(32), "door": at} for at in (door.getsockname(), where)]
    problem = sockets._connect(0, door, everyone)
    assert problem.startswith(f"rank 0 cannot reach rank 1 at 127.0.0.1:{where[1]} (")
    assert sockets._connect(1, door, everyone) == "rank 0 has not connected to rank 1 within 0 s"
    door.close()


@pytest.mark.parametrize(
    ("hosts", "ranks", "groups"),
    [
        ([0, 0, 1, 1], [0, 1, 2, 3], [[0, 1], [2, 3]]),
        ([0, 1, 0, 1], [0, 1, 2, 3], [[0, 2], [1, 3]]),
        ([0, 0, 1], [1, 2], [[1], [2]]),
        ([0, 0, 1], [0, 1], [[0, 1]]),
    ],
)
def test_ranks_are_grouped_by_host(hosts, ranks, groups):
    assert sockets.Sockets(0, hosts, spins=False, within=None)._groups(ranks) == groups


@pytest.mark.parametrize(("asked", "packing"), [(None, 2), ("0", 0), ("1", 1)])
def test_zeros_are_left_out_where_it_saves_time_or_as_asked(monkeypatch, asked, packing):
    monkeypatch.delenv("HVDKIT_PACK_ZEROS", raising=False)
    if asked:
        monkeypatch.setenv("HVDKIT_PACK_ZEROS", asked)
    assert sockets._packing() == packing


def test_another_wish_is_refused(monkeypatch):
    monkeypatch.setenv("HVDKIT_PACK_ZEROS", "yes")
    with pytest.raises(UsageError, match=r"HVDKIT_PACK_ZEROS must be 0 \(never\) or 1 \(always\), but is 'yes'"):
        sockets._packing()

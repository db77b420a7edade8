"""Collectives between CPU ranks of several hosts, over TCP connections of hvdkit's own.

Horovod sends gradients between hosts from a background thread, after a negotiation. A rank that has one core then waits
for this thread, and the thread for the core. `hvdkit.native` sends them on the thread that computes. The ranks of one
host first sum in shared memory. Each of them then sums one part between the hosts, so a host sends as many bytes as a
single rank would. On a link that takes longer than packing does, the zeros of gradients are left out, without loss
(`hvdkit/native/pack.h`). Everything else uses Horovod; so do jobs with GPUs (NCCL), jobs started by MPI, and elastic
jobs.

The ranks connect when a job starts. They learn each other's address, and the secret that both ends of a connection
prove to know (see `hvdkit.watchdog.channel`), through Horovod. Nothing listens afterwards.
"""

import hashlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdkit import native, world
from hvdkit.collectives.transports.base import Kind, Scale, Transport, Usage, in_any_order, may_block
from hvdkit.collectives.transports.shared_memory import GATHERED, SUMMED, SharedMemory, owns_a_core
from hvdkit.errors import UsageError
from hvdkit.watchdog.channel import Gone, Visitor, call, listen, own_address
from hvdkit.world.introduction import introduce
from hvdkit.world.ranks import World

_PATIENCE = 30.0  # seconds until all ranks must have connected
_log = logging.getLogger(__name__)
_LACKING = (
    "The ranks of several hosts exchange through Horovod, which is slower between CPUs, because %s. HVDKIT_SOCKETS=0 "
    "says that this is meant."
)


class Sockets(Transport):
    """A TCP connection between each two ranks.

    Args:
        rank: the rank of this process.
        hosts: the number of the host of each rank.
        spins: whether this rank has a core of its own, so it may spin while it waits.
        within: shared memory of the ranks of this host; None if a host has none.
    """

    name = "sockets"
    key = "sockets"
    bucket_bytes = 2 << 20

    def __init__(self, rank: int, hosts: Sequence[int], spins: bool, within: SharedMemory | None) -> None:
        self._rank, self._hosts, self._spins, self._within = rank, list(hosts), spins, within
        self._has_exchanged = False

    @classmethod
    def start(cls, world: World, preferred: Sequence[Transport]) -> "Sockets | None":
        """Connects the ranks, if all of them can and they do not share memory."""
        if preferred:
            return None
        door, problem = _open_door(world)
        mine = {
            "instead": _what_is_used_instead(),
            "lack": problem or ("" if native.is_built() else "hvdkit.native is not compiled: python -m hvdkit.native"),
            "door": door and door.getsockname()[:2],
            "token": secrets.token_hex(32),
            "host": world.cross_rank,
        }
        everyone = introduce(mine, "sockets")
        instead, lack = (next((a[what] for a in everyone if a[what]), "") for what in ("instead", "lack"))
        if door is not None and not (instead or lack):
            connected = _connect(world.rank, door, everyone)
            lack = next((a["lack"] for a in introduce({"lack": connected}, "sockets.connected") if a["lack"]), "")
        if door is not None:
            door.close()
        if lack and not instead and world.is_root:
            _log.warning(_LACKING, lack)
        if instead or lack:
            return None
        hosts = [a["host"] for a in everyone]
        several = 1 < len(set(hosts)) < len(hosts)
        within = SharedMemory.within_hosts(world) if several else None
        return cls(world.rank, hosts, owns_a_core(world), within)

    def stop(self) -> None:
        """Closes the connections."""
        native.stop_sockets()

    def serves(self, kind: Kind, dtype: tf.DType, process_set: Any) -> bool:
        """Returns True for sums of floats, and for rows of all numeric dtypes."""
        return dtype.name in (SUMMED if kind == "allreduce" else GATHERED)

    def allreduce(
        self, tensors: Sequence[tf.Tensor], name: str, process_set: Any, *, scale: Scale, overlaps: bool = False
    ) -> list[tf.Tensor]:
        """Sums within each host, then a part per rank between the hosts, and spreads the parts within each host."""
        ranks = self._ranks(process_set)
        if scale.before != 1:
            tensors = [t * tf.cast(scale.before, t.dtype) for t in tensors]
        after = {"after": scale.after, "divisor": len(ranks) if scale.average else 1}
        groups = self._groups(ranks)
        if all(len(group) == 1 for group in groups) or self._within is None:
            return self._sum(tensors, name, ranks, after, overlaps)
        mine = next(group for group in groups if self._rank in group)
        if len(groups) == 1:
            within = Scale(after=scale.after, average=scale.average)
            return self._within.sum_over(mine, tensors, name, within, overlaps)
        sums = self._within.sum_over(mine, tensors, f"{name}.host", Scale(), overlaps)
        flat = tf.concat([tf.reshape(s, [-1]) for s in sums], axis=0)
        carriers = min(map(len, groups))
        place = mine.index(self._rank)
        part = flat[:0]
        if place < carriers:
            length = tf.size(flat)
            part = flat[length * place // carriers : length * (place + 1) // carriers]
            (part,) = self._sum([part], f"{name}.hosts", [group[place] for group in groups], after, overlaps)
        whole = self._within.gather_over(mine, part, f"{name}.spread", overlaps)
        parts = tf.split(whole, [tf.size(s) for s in sums])
        return [tf.reshape(p, tf.shape(s)) for p, s in zip(parts, sums, strict=True)]

    def allgather(self, tensors: Sequence[tf.Tensor], name: str, process_set: Any) -> list[tf.Tensor]:
        """Sends the rows of each rank to each other rank."""
        place = self._place(name, tensors[0].dtype, self._ranks(process_set))
        with tf.device("CPU:0"):
            return [native.load().hvdkit_sockets_gather(tensors[0], name=name, **place)]

    def refuse_to_join(self) -> None:
        """Raises if this rank stops calling collectives: the other ranks would hang.

        Raises:
            UsageError: gradients of this rank went through sockets.
        """
        if self._has_exchanged:
            raise UsageError(
                "hvdkit.join() was called after exchanges through hvdkit's sockets, which need all ranks. Give every "
                "rank as many steps with hvdkit.data.shard(..., uneven='join'), or set HVDKIT_SOCKETS=0 for all ranks."
            )

    def usage(self) -> Usage:
        """Returns the statistics of the compiled operations."""
        in_all, waiting, number, _ = native.sockets_times()
        return Usage(in_all / 1e9, waiting / 1e9, number, 0)

    def describe(self) -> str:
        """Names the hosts, and what is used within them."""
        hosts = len(set(self._hosts))
        within = ", and shared memory within each" if self._within is not None else ""
        return f"sockets ({len(self._hosts)} ranks on {hosts} hosts{within})"

    def _sum(
        self, tensors: Sequence[tf.Tensor], name: str, ranks: Sequence[int], after: dict[str, Any], overlaps: bool
    ) -> list[tf.Tensor]:
        if len(ranks) == 1:
            factor = after["after"] / after["divisor"]
            return [t * tf.cast(factor, t.dtype) for t in tensors]
        place = self._place(name, tensors[0].dtype, ranks)
        if overlaps and not tf.executing_eagerly():
            place["spins"] = False  # the thread has other operations to run
        with tf.device("CPU:0"):
            return in_any_order(native.load().hvdkit_sockets_sum(list(tensors), name=name, **after, **place), overlaps)

    def _ranks(self, process_set: Any) -> list[int]:
        self._has_exchanged = True
        return list(range(len(self._hosts))) if process_set.process_set_id == 0 else list(process_set.ranks)

    def _groups(self, ranks: Sequence[int]) -> list[list[int]]:
        """Returns the ranks of each host, in the order of the hosts."""
        hosts = dict.fromkeys(self._hosts[rank] for rank in ranks)
        return [[rank for rank in ranks if self._hosts[rank] == host] for host in hosts]

    def _place(self, name: str, dtype: tf.DType, ranks: Sequence[int]) -> dict[str, Any]:
        """Returns the identity of a collective, and how its operation waits."""
        digest = hashlib.sha256(f"{name} {dtype.name} {list(ranks)}".encode()).digest()
        return {
            "collective": int.from_bytes(digest[:7], "big"),
            "ranks": list(ranks),
            "rank": self._rank,
            "spins": self._spins,
            "blocks": may_block(),
        }


def _what_is_used_instead() -> str:
    """Returns the reason to prefer Horovod for this job; empty if sockets are preferable."""
    if os.environ.get("HVDKIT_SOCKETS") == "0":
        return "HVDKIT_SOCKETS=0 is set"
    if not world.horovod().gloo_enabled():
        return "MPI has started the job"
    if tf.config.list_physical_devices("GPU"):
        return "there are GPUs"
    return "ranks may come and go" if os.environ.get("HOROVOD_ELASTIC") == "1" else ""


def _packing() -> int:
    """Returns whether messages are sent without their zeros: 0 never, 1 always, 2 where it saves time."""
    asked = os.environ.get("HVDKIT_PACK_ZEROS", "")
    if asked not in ("", "0", "1"):
        raise UsageError(
            f"HVDKIT_PACK_ZEROS must be 0 (never) or 1 (always), but is {asked!r}. Leave it out to send messages "
            f"without their zeros where that saves time."
        )
    return int(asked or 2)


def _open_door(world: World) -> tuple[socket.socket | None, str]:
    try:
        return listen(own_address(world)), ""
    except OSError as error:
        return None, f"host {world.host} could not open a port ({error})"


def _connect(rank: int, door: socket.socket, everyone: Sequence[dict[str, Any]]) -> str:
    """Connects this rank with all others, and hands the sockets to the compiled operations.

    Returns:
        What has failed; empty if nothing has.
    """
    token = bytes.fromhex(everyone[0]["token"])
    found: dict[int, socket.socket] = {}
    guests = threading.Thread(target=_receive_guests, args=(door, token, rank, len(everyone), found), daemon=True)
    guests.start()
    problem = ""
    for other in range(rank + 1, len(everyone)):
        host, port = everyone[other]["door"]
        try:
            found[other] = call((host, port), token, mine=rank, theirs=other).sock
        except OSError as error:
            problem = f"rank {rank} cannot reach rank {other} at {host}:{port} ({error})"
            break
    guests.join()
    if not problem and len(found) < len(everyone) - 1:
        lacking = next(other for other in range(len(everyone)) if other != rank and other not in found)
        problem = f"rank {lacking} has not connected to rank {rank} within {_PATIENCE:.0f} s"
    if problem:
        for connection in found.values():
            connection.close()
        return problem
    native.start_sockets({other: connection.detach() for other, connection in found.items()}, _packing())
    return ""


def _receive_guests(door: socket.socket, token: bytes, rank: int, size: int, found: dict[int, socket.socket]) -> None:
    """Accepts the connections of all ranks before this one; strangers cannot prove that they know the token."""
    until = time.monotonic() + _PATIENCE
    visitors: list[Visitor] = []
    wanted = set(range(rank))
    while wanted and time.monotonic() < until:
        try:
            visitors.append(Visitor(door.accept()[0], token, size))
        except OSError:
            time.sleep(0.002)
        for visitor in list(visitors):
            try:
                connection = visitor.receive()
            except Gone:
                visitor.sock.close()
                visitors.remove(visitor)
                continue
            if connection is None:
                continue
            visitors.remove(visitor)
            if connection.rank in wanted:
                wanted.discard(connection.rank)
                found[connection.rank] = connection.sock
            else:
                connection.sock.close()
    for visitor in visitors:
        visitor.sock.close()

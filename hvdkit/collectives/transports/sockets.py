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

import dataclasses
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
from hvdkit.collectives.transports.base import Kind, Scale, Transport, Usage, in_any_order, may_block, scaled
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
        way = self._way(process_set, overlaps)
        if len(way.between) == 1 and way.host:  # all of them on one host
            return way.sum_within(tensors, name, scale)
        parts = way.own_parts([scaled(t, scale.before) for t in tensors], name)
        if way.carries:
            parts = self._sum(parts, f"{name}.hosts" if way.host else name, way.between, way.factor(scale), overlaps)
        return way.spread(parts, tensors, name)

    def allreduce_start(
        self, tensors: Sequence[tf.Tensor], name: str, process_set: Any, *, scale: Scale, slot: str
    ) -> None:
        """Sums within each host, and starts the sum between the hosts, which a thread completes."""
        way = self._way(process_set)
        if len(way.between) == 1:
            return
        parts = way.own_parts([scaled(t, scale.before) for t in tensors], name)
        if not way.carries:
            return
        place = self._place(f"{name}.hosts" if way.host else name, parts[0].dtype, way.between, waits=False)
        with tf.device("CPU:0"):
            native.load().hvdkit_sockets_sum_start(parts, slot=slot, name=name, **way.factor(scale), **place)

    def allreduce_done(
        self,
        tensors: Sequence[tf.Tensor],
        name: str,
        process_set: Any,
        *,
        scale: Scale,
        slot: str,
        is_started: tf.Tensor,
    ) -> list[tf.Tensor]:
        """Waits for the sum between the hosts, and spreads the parts within each host."""
        way = self._way(process_set)

        def wait() -> list[tf.Tensor]:
            number = 1 if way.host else len(tensors)
            parts = [tf.zeros([0], tensors[0].dtype)]
            if way.carries:
                with tf.device("CPU:0"):
                    done = native.load().hvdkit_sockets_sum_done
                    parts = done(number=number, T=tensors[0].dtype, slot=slot, name=f"{name}.done")
            return way.spread(parts, tensors, name)

        def again() -> list[tf.Tensor]:
            return self.allreduce(tensors, f"{name}.again", process_set, scale=scale)

        if len(way.between) == 1:
            return again()
        found = tf.cond(is_started, wait, again)
        return [tf.ensure_shape(f, t.shape) for f, t in zip(found, tensors, strict=True)]

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
            return [scaled(t, float(after["after"]) / after["divisor"]) for t in tensors]
        place = self._place(name, tensors[0].dtype, ranks)
        if overlaps and not tf.executing_eagerly():
            place["spins"] = False  # the thread has other operations to run
        with tf.device("CPU:0"):
            return in_any_order(native.load().hvdkit_sockets_sum(list(tensors), name=name, **after, **place), overlaps)

    def _ranks(self, process_set: Any) -> list[int]:
        self._has_exchanged = True
        return list(range(len(self._hosts))) if process_set.process_set_id == 0 else list(process_set.ranks)

    def _way(self, process_set: Any, overlaps: bool = False) -> "_Way":
        """Returns how a sum reaches the ranks of a process set."""
        ranks = self._ranks(process_set)
        groups = self._groups(ranks)
        if all(len(group) == 1 for group in groups) or self._within is None:
            return _Way(len(ranks), ranks, overlaps=overlaps)
        mine = next(group for group in groups if self._rank in group)
        place, carriers = mine.index(self._rank), min(map(len, groups))
        between = [group[place] for group in groups] if place < carriers else [group[0] for group in groups]
        return _Way(len(ranks), between, mine, place, carriers, self._within, overlaps)

    def _groups(self, ranks: Sequence[int]) -> list[list[int]]:
        """Returns the ranks of each host, in the order of the hosts."""
        hosts = dict.fromkeys(self._hosts[rank] for rank in ranks)
        return [[rank for rank in ranks if self._hosts[rank] == host] for host in hosts]

    def _place(self, name: str, dtype: tf.DType, ranks: Sequence[int], waits: bool = True) -> dict[str, Any]:
        """Returns the identity of a collective and, if it waits, how."""
        digest = hashlib.sha256(f"{name} {dtype.name} {list(ranks)}".encode()).digest()
        return {
            "collective": int.from_bytes(digest[:7], "big"),
            "ranks": list(ranks),
            "rank": self._rank,
            **({"spins": self._spins, "blocks": may_block()} if waits else {}),
        }


@dataclasses.dataclass(frozen=True)
class _Way:
    """How a sum reaches all ranks: within each host, then a part per rank between the hosts, then within each host.

    Attributes:
        ranks: number of ranks whose tensors are summed.
        between: the ranks between which this rank sums over the sockets: one of each host.
        host: the ranks of this host, if they first sum in shared memory; otherwise empty.
        place: position of this rank in `host`.
        carriers: number of ranks of each host that send a part.
        within: shared memory of this host.
        overlaps: whether the rank has other work to do meanwhile.
    """

    ranks: int
    between: Sequence[int]
    host: Sequence[int] = ()
    place: int = 0
    carriers: int = 1
    within: SharedMemory | None = None
    overlaps: bool = False

    @property
    def carries(self) -> bool:
        """Whether this rank sends a part."""
        return self.place < self.carriers

    def factor(self, scale: Scale) -> dict[str, Any]:
        """Returns the attributes of the sum between the hosts."""
        return {"after": repr(float(scale.after)), "divisor": self.ranks if scale.average else 1}

    def sum_within(self, tensors: Sequence[tf.Tensor], name: str, scale: Scale) -> list[tf.Tensor]:
        """Sums over the ranks of this host."""
        if self.within is None:
            return list(tensors)
        return self.within.sum_over(self.host, tensors, name, scale, self.overlaps)

    def own_parts(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """Returns what this rank sums between the hosts: all tensors, or its part of the host's sum."""
        if not self.host:
            return list(tensors)
        sums = self.sum_within(tensors, f"{name}.host", Scale())
        flat = tf.concat([tf.reshape(s, [-1]) for s in sums], axis=0)
        if not self.carries:
            return [flat[:0]]
        length = tf.size(flat)
        return [flat[length * self.place // self.carriers : length * (self.place + 1) // self.carriers]]

    def spread(self, parts: Sequence[tf.Tensor], like: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """Returns the sums, of the shapes of `like`, on all ranks of this host."""
        if self.within is None:
            return list(parts)
        whole = self.within.gather_over(self.host, parts[0], f"{name}.spread", self.overlaps)
        sums = tf.split(whole, [tf.size(t) for t in like])
        return [tf.reshape(s, tf.shape(t)) for s, t in zip(sums, like, strict=True)]


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

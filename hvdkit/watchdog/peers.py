"""What this rank knows of all ranks, and what it tells of itself."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from hvdkit.watchdog import stacks
from hvdkit.watchdog.channel import Message
from hvdkit.watchdog.progress import Progress
from hvdkit.watchdog.states import RankState


class Peer:
    """What this rank knows of a rank.

    Args:
        host: its host's name.
        rank: its number.

    Attributes:
        state: as it was told last.
        heard: when that was, by the monotonic clock.
        still: seconds since it moved on, at that time.
        marks: its progress's.
        why: the error that it exited with.
    """

    def __init__(self, host: str, rank: int) -> None:
        self.state = RankState(rank, host)
        self.heard = time.monotonic()
        self.still = 0.0
        self.marks = -1
        self.why = ""

    @property
    def there(self) -> bool:
        """Whether it may still take part."""
        return self.state.status in ("living", "frozen")


class Peers(dict[int, Peer]):
    """All ranks of the job, this one included, by number.

    Args:
        hosts: their hosts' names.
        rank: this rank.
    """

    def __init__(self, hosts: Sequence[str], rank: int) -> None:
        super().__init__({number: Peer(host, number) for number, host in enumerate(hosts)})
        self._rank = rank

    def states(self, *, there: bool = False) -> list[RankState]:
        """What is known of the ranks, in their order; `there` leaves out those that are gone."""
        return [peer.state for _, peer in sorted(self.items()) if peer.there or not there]

    def living(self) -> set[int]:
        """The ranks that answer, as far as is known."""
        return {rank for rank, peer in self.items() if peer.state.status == "living"}

    def statuses(self) -> dict[int, str]:
        """The status of each rank that is not living."""
        return {rank: peer.state.status for rank, peer in self.items() if peer.state.status != "living"}

    def still(self) -> float:
        """Seconds for which no rank has moved on; one that is not heard of has not, either."""
        now = time.monotonic()
        return min(peer.still + now - peer.heard for peer in self.values() if peer.there)

    def marks(self) -> dict[int, int]:
        """The progress of the ranks that are there: what is equal twice has not moved meanwhile."""
        return {rank: peer.marks for rank, peer in self.items() if peer.there}

    def after(self, hub: int) -> int:
        """The rank to turn to when `hub` is no longer there; this rank itself is always there."""
        order = [(hub + step) % len(self) for step in range(1, len(self))]
        return next(rank for rank in order if rank == self._rank or rank in self.living())

    def hear(self, rank: int) -> None:
        """Notes that a rank was heard of just now."""
        self[rank].heard = time.monotonic()

    def set_status(self, rank: int, status: str) -> bool:
        """Notes a rank's status; returns whether it is news. This rank knows its own."""
        peer = self[rank]
        if peer.state.status == status or rank == self._rank:
            return False
        peer.state = dataclasses.replace(peer.state, status=status)
        return True

    def take_state(self, rank: int, message: Message) -> None:
        """Notes where a rank is; see `Own.beat_fields`."""
        peer = self[rank]
        fields = {k: message[k] for k in ("phase", "epoch", "step", "collective", "inside")}
        peer.state = dataclasses.replace(peer.state, **fields)
        peer.still, peer.marks = message["still"], message["marks"]

    def take_signature(self, rank: int, message: Message) -> None:
        """Notes a new signature of a rank's exchange."""
        peer = self[rank]
        traced = {name: list(signatures) for name, signatures in peer.state.traced.items()}
        known = traced.setdefault(message["name"], [])
        if message["number"] == len(known):
            known.append(message["signature"])
        peer.state = dataclasses.replace(peer.state, traced=traced)


class Own:
    """This rank: what it is doing, and what it wants to know.

    Args:
        rank: its number.
        host: its host's name.
        progress: what it is doing.

    Attributes:
        still: seconds since it has moved on.
        asked: since when the hub is told that it hangs; None where it does not.
        thrown: when it, or another rank, was thrown out of an exchange.
    """

    def __init__(self, rank: int, host: str, progress: Progress) -> None:
        self.rank = rank
        self.progress = progress
        self.still = 0.0
        self.asked: float | None = None
        self.thrown: float | None = None
        self._host = host
        self._marks = -1

    def look(self, seconds: float) -> None:
        """Sees whether it has moved on, `seconds` after the last look."""
        moved = self.progress.marks != self._marks
        self._marks = self.progress.marks
        self.still = 0.0 if moved else self.still + seconds
        if moved:
            self.asked = None

    def beat_fields(self) -> dict[str, Any]:
        """The little that the others always know of this rank."""
        p = self.progress
        wait = p.waits[-1] if p.waits else None
        return {
            "phase": p.phase,
            "epoch": p.epoch,
            "step": p.step,
            "collective": wait and wait.name,
            "inside": p.inside,
            "still": round(self.still, 1) if p.marks == self._marks else 0.0,
            "marks": p.marks,
        }

    def full_state(self, names: Sequence[str]) -> dict[str, Any]:
        """Where this rank is, with its stacks, and its calls of some collectives: looked up only if a rank asks."""
        p, main = self.progress, stacks.main_frame()
        wait = p.waits[-1] if p.waits else None
        return {
            **self.beat_fields(),
            "rank": self.rank,
            "host": self._host,
            "detail": str(wait.detail) if wait else "",
            "last": p.last and p.last.name,
            "last_detail": str(p.last.detail) if p.last else "",
            "calls": {name: p.calls.get(name, 0) for name in names},
            "line": stacks.own_line(main),
            "reading": stacks.reading(),
            "stack": stacks.readable(main),
            "threads": stacks.others(),
            "traced": p.traced,
        }

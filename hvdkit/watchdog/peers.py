"""What this rank knows about all ranks, and what it reports about itself."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from hvdkit.watchdog import stacks
from hvdkit.watchdog.channel import Message
from hvdkit.watchdog.progress import Progress
from hvdkit.watchdog.states import RankState


class Peer:
    """What this rank knows about one rank.

    Args:
        host: its host's name.
        rank: its number.

    Attributes:
        state: the last state that it sent.
        heard: monotonic time of its last message.
        still: seconds without progress, at that time.
        marks: its `Progress.marks`.
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
        """Whether the rank still takes part in the job."""
        return self.state.status in ("living", "frozen")


class Peers(dict[int, Peer]):
    """All ranks of the job, this one included, by number.

    Args:
        hosts: the ranks' host names.
        rank: this rank.
    """

    def __init__(self, hosts: Sequence[str], rank: int) -> None:
        super().__init__({number: Peer(host, number) for number, host in enumerate(hosts)})
        self._rank = rank

    def states(self, *, there: bool = False) -> list[RankState]:
        """The known states in rank order; `there` leaves out the ranks that are gone."""
        return [peer.state for _, peer in sorted(self.items()) if peer.there or not there]

    def living(self) -> set[int]:
        """The ranks that respond, as far as is known."""
        return {rank for rank, peer in self.items() if peer.state.status == "living"}

    def statuses(self) -> dict[int, str]:
        """The status of each rank that is not living."""
        return {rank: peer.state.status for rank, peer in self.items() if peer.state.status != "living"}

    def still(self) -> float:
        """Seconds in which no rank has made progress. A silent rank counts as one without progress."""
        now = time.monotonic()
        return min(peer.still + now - peer.heard for peer in self.values() if peer.there)

    def marks(self) -> dict[int, int]:
        """The progress marks of the present ranks; equal results mean that no rank has made progress in between."""
        return {rank: peer.marks for rank, peer in self.items() if peer.there}

    def after(self, hub: int) -> int:
        """The next hub when `hub` is lost; this rank itself counts as present."""
        order = [(hub + step) % len(self) for step in range(1, len(self))]
        return next(rank for rank in order if rank == self._rank or rank in self.living())

    def hear(self, rank: int) -> None:
        """Records that a rank has just sent something."""
        self[rank].heard = time.monotonic()

    def set_status(self, rank: int, status: str) -> bool:
        """Records a rank's status; returns whether it has changed. The own status is never changed."""
        peer = self[rank]
        if peer.state.status == status or rank == self._rank:
            return False
        peer.state = dataclasses.replace(peer.state, status=status)
        return True

    def take_state(self, rank: int, message: Message) -> None:
        """Records the state in a rank's heartbeat; see `Own.beat_fields`."""
        peer = self[rank]
        fields = {k: message[k] for k in ("phase", "epoch", "step", "collective", "inside")}
        peer.state = dataclasses.replace(peer.state, **fields)
        peer.still, peer.marks = message["still"], message["marks"]

    def take_signature(self, rank: int, message: Message) -> None:
        """Records a new signature that a rank has traced."""
        peer = self[rank]
        traced = {name: list(signatures) for name, signatures in peer.state.traced.items()}
        known = traced.setdefault(message["name"], [])
        if message["number"] == len(known):
            known.append(message["signature"])
        peer.state = dataclasses.replace(peer.state, traced=traced)


class Own:
    """This rank: what it is doing, and its pending requests.

    Args:
        rank: its number.
        host: its host's name.
        progress: what it is doing.

    Attributes:
        still: seconds without progress.
        asked: monotonic time since which it reports a stall to the hub; None if it does not stall.
        failed_at: monotonic time at which a collective failed, on this rank or one that reports to it.
    """

    def __init__(self, rank: int, host: str, progress: Progress) -> None:
        self.rank = rank
        self.progress = progress
        self.still = 0.0
        self.asked: float | None = None
        self.failed_at: float | None = None
        self._host = host
        self._marks = -1

    def look(self, seconds: float) -> None:
        """Checks for progress, `seconds` after the last check."""
        moved = self.progress.marks != self._marks
        self._marks = self.progress.marks
        self.still = 0.0 if moved else self.still + seconds
        if moved:
            self.asked = None

    def beat_fields(self) -> dict[str, Any]:
        """The part of this rank's state that every heartbeat carries."""
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
        """This rank's full state, with stacks and the call counts of some collectives; computed only on request."""
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

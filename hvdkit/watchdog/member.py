"""The two roles of a rank's watchdog, and the role of most: a member, which reports to the hub and does what it says.

What differs by role is in `Member` and `hub.Hub`; the thread (`watchman.Watchman`) asks whichever it has now.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from hvdkit.outcome import STALLED
from hvdkit.watchdog.channel import Message
from hvdkit.watchdog.ending import Ending
from hvdkit.watchdog.links import Links
from hvdkit.watchdog.peers import Own, Peers
from hvdkit.watchdog.states import Failure, Job, RankState

_SILENCE = 5.0  # seconds without a sign of life, after which the hub is taken for frozen, if the job hangs


@dataclasses.dataclass(frozen=True)
class Context:
    """What both roles work with.

    Attributes:
        job: what the job's watchdogs have in common.
        own: this rank.
        peers: what is known of all ranks.
        links: this rank's connections.
        ending: how this process ends.
        turn_to: turns to a rank as the hub, or to the next one that answers; returns the role that follows.
    """

    job: Job
    own: Own
    peers: Peers
    links: Links
    ending: Ending
    turn_to: Callable[[int], "Role"]


class Role(abc.ABC):
    """What the thread asks of a role.

    Args:
        context: what it works with.
    """

    def __init__(self, context: Context) -> None:
        self.job = context.job
        self.own = context.own
        self.peers = context.peers
        self.links = context.links
        self.ending = context.ending
        self.turn_to = context.turn_to

    # ---- This rank's own wishes -----------------------------------------------------------------------------------

    @abc.abstractmethod
    def fail(self, failure: Failure) -> None:
        """Makes this rank's own failure known to all, if it is the first."""

    @abc.abstractmethod
    def explain(self) -> None:
        """Has all ranks' states compared, for this rank, whose exchange was refused."""

    @abc.abstractmethod
    def trace(self, fields: Message) -> None:
        """Has a new signature of this rank compared with those of the others."""

    @abc.abstractmethod
    def hang(self, now: float) -> None:
        """Says that this rank hangs; called in every beat in which it does."""

    @abc.abstractmethod
    def ask(self, message: Message) -> None:
        """Sends a message to the hub, if that is another rank."""

    # ---- What happens to others -----------------------------------------------------------------------------------

    def set_status(self, rank: int, status: str) -> None:
        """Notes a rank's status."""
        self.peers.set_status(rank, status)

    @abc.abstractmethod
    def make_way(self, statuses: Mapping[int, str]) -> None:
        """A rank has joined, which takes this one for the hub, and told of the ranks that are gone."""

    @abc.abstractmethod
    def lose(self, rank: int) -> None:
        """A connection broke without a goodbye: an end in the middle of work is a death, any other may be an exit."""

    @abc.abstractmethod
    def forget(self, rank: int) -> None:
        """A rank has said goodbye."""

    @abc.abstractmethod
    def on_moved(self, rank: int, to: int) -> None:
        """A rank has turned to another hub."""

    def judge_death(self, rank: int) -> None:
        """By the phase, of which every rank tells at once: what is known of its collectives is a second old."""
        peer = self.peers[rank].state
        if peer.phase != "between":
            self.settle(death(peer))

    @abc.abstractmethod
    def settle(self, failure: Failure, report: str = "") -> None:
        """The first failure is the job's; what follows from it is not looked at."""

    # ---- What the hub finds out -----------------------------------------------------------------------------------

    def on_answer(self, rank: int, message: Message) -> None:
        """A rank has answered where it is."""
        self.peers.take_state(rank, message["state"])

    def on_traced(self, rank: int, message: Message) -> None:
        """A rank has traced an exchange."""
        self.peers.take_signature(rank, message)

    @abc.abstractmethod
    def inquire(self, limit: float | None = None, explains: bool = False) -> None:
        """Asks all ranks where they are."""

    @abc.abstractmethod
    def look_for_stall(self) -> None:
        """Sees whether the job hangs, because a rank says that it does."""

    @abc.abstractmethod
    def look_for_crossing(self, now: float) -> None:
        """Sees whether ranks are in different collectives."""

    @abc.abstractmethod
    def look_around(self) -> None:
        """Sees what has come of inquiries, and why a rank was thrown out of an exchange."""


class Member(Role):
    """A rank that is connected to the hub.

    Args:
        context: see `Role`.
        hub: the hub's rank.
    """

    def __init__(self, context: Context, hub: int) -> None:
        super().__init__(context)
        self.hub = hub

    def join(self) -> None:
        """Says to the hub what this rank knows and wants, when the connection is there."""
        self.peers.hear(self.hub)
        self.ask({"type": "join", "statuses": self.peers.statuses(), **self.own.beat_fields()})
        if self.own.asked is not None:
            self.ask({"type": "stall"})
        if self.own.thrown is not None:
            self.ask({"type": "thrown_out"})

    def ask(self, message: Message) -> None:
        """See `Role`."""
        if self.links.hub:
            self.links.hub.send(message)

    def fail(self, failure: Failure) -> None:
        """See `Role`: the hub makes it known, to this rank, too."""
        self.ask({"type": "failed", "failure": dataclasses.asdict(failure)})

    def explain(self) -> None:
        """See `Role`."""
        self.ask({"type": "explain"})

    def trace(self, fields: Message) -> None:
        """See `Role`."""
        self.ask(fields)

    def hang(self, now: float) -> None:
        """See `Role`: the hub does not answer while another rank moves on, but it gives signs of life."""
        self.own.asked = self.own.asked or now
        if now - max(self.own.asked, self.peers[self.hub].heard) > _SILENCE:
            self.set_status(self.hub, "frozen")
            self._leave_hub()
        else:
            self.ask({"type": "stall"})

    def make_way(self, statuses: Mapping[int, str]) -> None:
        """See `Role`: whoever is asked is the hub."""
        for rank, status in statuses.items():
            self.set_status(rank, status)
        self.links.drop_hub({"type": "moved", "to": self.own.rank})

    def lose(self, rank: int) -> None:
        """See `Role`: of the others' deaths the hub tells."""
        if rank != self.hub:
            self.links.drop_caller(rank)
            return
        self.set_status(rank, "dead")
        self._turn_away_from(rank).judge_death(rank)

    def forget(self, rank: int) -> None:
        """See `Role`."""
        if rank == self.hub:
            self._turn_away_from(rank)
        else:
            self.links.drop_caller(rank)

    def on_moved(self, rank: int, to: int) -> None:
        """See `Role`: the hub itself has turned to another one."""
        if rank == self.hub:
            self._leave_hub()

    def settle(self, failure: Failure, report: str = "") -> None:
        """See `Role`: known before the hub can tell."""
        self.ending.take(failure, at_once=False)

    def inquire(self, limit: float | None = None, explains: bool = False) -> None:
        """See `Role`: only the hub does. A rank that asks this one takes it for what it was."""

    def look_for_stall(self) -> None:
        """See `Role`: only the hub does."""

    def look_for_crossing(self, now: float) -> None:
        """See `Role`: only the hub does."""

    def look_around(self) -> None:
        """See `Role`: only the hub does."""

    def _turn_away_from(self, rank: int) -> Role:
        self.links.drop_caller(rank)
        self.links.drop_hub()
        return self.turn_to(self.peers.after(rank))

    def _leave_hub(self) -> None:
        """Turns to the next rank, and tells a hub that may only have been asleep."""
        to = self.peers.after(self.hub)
        self.links.drop_hub({"type": "moved", "to": to})
        self.turn_to(to)


def death(peer: RankState) -> Failure:
    """The failure of a rank whose connection broke."""
    where = f"in the collective {peer.collective!r}" if peer.collective else f"{peer.phase}, {peer.place}"
    text = f"died ({where}): its connection broke without a goodbye; look at its own output and exit code"
    return Failure(peer.rank, peer.host, "death", text, STALLED)


def ended(failure: Failure, at_once: bool) -> dict[str, Any]:
    """The hub's message that the job has failed."""
    return {"type": "ended", "at_once": at_once, "failure": dataclasses.asdict(failure)}

"""The base class of the two watchdog roles, and the role of most ranks: a member, which reports to the hub.

What differs by role is in `Member` and `hub.Hub`. The thread (`thread.WatchdogThread`) calls its current role.
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

_SILENCE = 5.0  # seconds without a heartbeat after which, in a stall, the hub counts as unresponsive


@dataclasses.dataclass(frozen=True)
class Context:
    """What both roles work with.

    Attributes:
        job: what the job's watchdogs have in common.
        own: this rank.
        peers: the known states of all ranks.
        links: this rank's connections.
        ending: how this process ends.
        turn_to: connects to a rank as the hub, or to the next one that answers; returns this rank's new role.
    """

    job: Job
    own: Own
    peers: Peers
    links: Links
    ending: Ending
    turn_to: Callable[[int], "Role"]


class Role(abc.ABC):
    """The interface of a role, which the watchdog's thread calls.

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

    # ---- Requests of this rank ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def fail(self, failure: Failure) -> None:
        """Tells all ranks of this rank's failure, if it is the first."""

    @abc.abstractmethod
    def explain(self) -> None:
        """Requests a comparison of all ranks' states, after Horovod has rejected a collective of this rank."""

    @abc.abstractmethod
    def trace(self, fields: Message) -> None:
        """Requests a comparison of a new signature of this rank with those of the other ranks."""

    @abc.abstractmethod
    def call_meeting(self) -> None:
        """Has all ranks agree on the execution after which they leave the training (see `meeting`)."""

    @abc.abstractmethod
    def report_stall(self, now: float) -> None:
        """Reports that this rank stalls; called at every heartbeat while it does."""

    @abc.abstractmethod
    def ask(self, message: Message) -> None:
        """Sends a message to the hub, if the hub is another rank."""

    # ---- Changes of other ranks -----------------------------------------------------------------------------------

    def set_status(self, rank: int, status: str) -> None:
        """Records a rank's status."""
        self.peers.set_status(rank, status)

    @abc.abstractmethod
    def on_join(self, statuses: Mapping[int, str]) -> None:
        """Handles a rank that joins with this one as the hub, and reports the status of lost ranks."""

    @abc.abstractmethod
    def lose(self, rank: int) -> None:
        """Handles a connection that broke without a goodbye: a death if the rank was busy, else possibly an exit."""

    @abc.abstractmethod
    def forget(self, rank: int) -> None:
        """Handles a rank's goodbye."""

    @abc.abstractmethod
    def on_moved(self, rank: int, to: int) -> None:
        """Handles a rank that has switched to another hub."""

    def judge_death(self, rank: int) -> None:
        """Ends the job if a lost rank was busy, by its phase: the rest of its state may be a second old."""
        peer = self.peers[rank].state
        if peer.phase != "between":
            self.settle(death(peer))

    @abc.abstractmethod
    def settle(self, failure: Failure, report: str = "") -> None:
        """Ends the job with its first failure. Later failures follow from it and are ignored."""

    # ---- Work of the hub ------------------------------------------------------------------------------------------

    def on_answer(self, rank: int, message: Message) -> None:
        """Handles a rank's answer to an inquiry."""
        self.peers.take_state(rank, message["state"])

    def on_traced(self, rank: int, message: Message) -> None:
        """Handles the signature of a collective that a rank has traced."""
        self.peers.take_signature(rank, message)

    @abc.abstractmethod
    def on_stand(self, rank: int, message: Message) -> None:
        """Handles the number of executions that a rank has done, for the meeting."""

    @abc.abstractmethod
    def inquire(self, limit: float | None = None, explains: bool = False) -> None:
        """Asks all ranks for their state."""

    @abc.abstractmethod
    def look_for_stall(self) -> None:
        """Checks whether the job stalls, after a rank has reported that it does."""

    @abc.abstractmethod
    def look_for_crossing(self, now: float) -> None:
        """Checks whether ranks are in different collectives."""

    @abc.abstractmethod
    def complete_inquiries(self) -> None:
        """Completes inquiries, and finds out why a collective has failed."""


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
        """Sends the hub this rank's state and pending requests, once it is connected."""
        self.peers.hear(self.hub)
        self.ask({"type": "join", "statuses": self.peers.statuses(), **self.own.beat_fields()})
        if self.own.asked is not None:
            self.ask({"type": "stall"})
        if self.own.failed_at is not None:
            self.ask({"type": "thrown_out"})

    def ask(self, message: Message) -> None:
        """See `Role`."""
        if self.links.hub:
            self.links.hub.send(message)

    def fail(self, failure: Failure) -> None:
        """See `Role`: the hub tells all ranks, including this one."""
        self.ask({"type": "failed", "failure": dataclasses.asdict(failure)})

    def explain(self) -> None:
        """See `Role`."""
        self.ask({"type": "explain"})

    def trace(self, fields: Message) -> None:
        """See `Role`."""
        self.ask(fields)

    def call_meeting(self) -> None:
        """See `Role`: the hub calls it."""
        self.ask({"type": "told"})

    def report_stall(self, now: float) -> None:
        """See `Role`. While another rank makes progress, the hub does not answer, but it sends heartbeats."""
        self.own.asked = self.own.asked or now
        if now - max(self.own.asked, self.peers[self.hub].heard) > _SILENCE:
            self.set_status(self.hub, "frozen")
            self._leave_hub()
        else:
            self.ask({"type": "stall"})

    def on_join(self, statuses: Mapping[int, str]) -> None:
        """See `Role`: a rank that another one joins becomes the hub."""
        for rank, status in statuses.items():
            self.set_status(rank, status)
        self.links.drop_hub({"type": "moved", "to": self.own.rank})

    def lose(self, rank: int) -> None:
        """See `Role`: the hub reports the deaths of other ranks."""
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
        """See `Role`: the hub itself has switched to another hub."""
        if rank == self.hub:
            self._leave_hub()

    def settle(self, failure: Failure, report: str = "") -> None:
        """See `Role`: recorded before the hub reports it."""
        self.ending.take(failure, at_once=False)

    def on_stand(self, rank: int, message: Message) -> None:
        """See `Role`: only the hub asks for it."""

    def inquire(self, limit: float | None = None, explains: bool = False) -> None:
        """See `Role`: only the hub does. A rank that asks this one still takes it for the hub."""

    def look_for_stall(self) -> None:
        """See `Role`: only the hub does."""

    def look_for_crossing(self, now: float) -> None:
        """See `Role`: only the hub does."""

    def complete_inquiries(self) -> None:
        """See `Role`: only the hub does."""

    def _turn_away_from(self, rank: int) -> Role:
        self.links.drop_caller(rank)
        self.links.drop_hub()
        return self.turn_to(self.peers.after(rank))

    def _leave_hub(self) -> None:
        """Switches to the next rank, and tells the old hub, which may only have been suspended."""
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

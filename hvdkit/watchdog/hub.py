"""The hub: receives all ranks' heartbeats, collects their stacks in a stall, finds the cause, and tells every rank."""

import time
from collections.abc import Mapping, Sequence

from hvdkit import outcome
from hvdkit.outcome import STALLED, Failed
from hvdkit.watchdog import stall_causes
from hvdkit.watchdog.channel import Message
from hvdkit.watchdog.member import Context, Role, death, ended
from hvdkit.watchdog.report import failure_sentence, stall_report
from hvdkit.watchdog.states import Failure, RankState, from_message

_ANSWER = 3.0  # seconds for a rank to report its state
_CROSSED = 2.0  # seconds in different collectives after which the ranks' calls are compared
_AGAIN = 5.0  # seconds between two such comparisons
_PATIENCE = 3  # factor for the limit if a rank that the others wait for may be busy in the user's code
_SETTLE = 1.0  # seconds for the report of the first cause to arrive after a collective has failed


class _Inquiry:
    """A request to all ranks for their state: after a stall, a possible deadlock, or a rejected collective."""

    def __init__(self, limit: float | None, explains: bool) -> None:
        self.limit = limit  # None: not about a stall
        self.explains = explains  # a rank waits for the explanation
        self.until = time.monotonic() + _ANSWER
        self.answers: dict[int, RankState] = {}


class Hub(Role):
    """The role of this rank while it is the hub.

    Args:
        context: see `Role`.

    Attributes:
        reported: the ranks' progress marks when a stall was reported.
        compare_after: monotonic time after which ranks in different collectives are compared again.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.reported: dict[int, int] = {}
        self.compare_after = 0.0
        self._inquiry: _Inquiry | None = None
        self._stands: dict[int, int] = {}  # executions that ranks have done, for the meeting

    def welcome(self, rank: int) -> None:
        """Sends a rank that has just joined what it has missed."""
        if self.ending.failure:
            self.links.callers[rank].send(ended(self.ending.failure, at_once=False))
        elif self._inquiry:
            self.links.callers[rank].send(self._question())

    def ask(self, message: Message) -> None:
        """See `Role`: this rank is the hub, so nothing is sent."""

    # ---- Requests of this rank ------------------------------------------------------------------------------------

    def fail(self, failure: Failure) -> None:
        """See `Role`."""
        self.settle(failure)

    def explain(self) -> None:
        """See `Role`."""
        self.inquire(explains=True)

    def trace(self, fields: Message) -> None:
        """See `Role`."""
        self.on_traced(self.own.rank, fields)

    def call_meeting(self) -> None:
        """See `Role`. A second call, as when all ranks were told to leave, is the same meeting."""
        meeting = self.own.progress.meeting
        if not meeting.is_called:
            self._stands = {}
            self.links.send_to_callers({"type": "leave"})
            self.on_stand(self.own.rank, {"done": meeting.call()})

    def on_stand(self, rank: int, message: Message) -> None:
        """See `Role`."""
        self._stands[rank] = message["done"]
        if self.peers.living() <= self._stands.keys():
            after = 1 + max(self._stands.values())
            self.links.send_to_callers({"type": "meet", "after": after})
            self.own.progress.meeting.agree(after)

    def report_stall(self, now: float) -> None:
        """See `Role`."""
        self.look_for_stall()

    # ---- Changes of other ranks -----------------------------------------------------------------------------------

    def set_status(self, rank: int, status: str) -> None:
        """See `Role`: the hub also tells the members."""
        if self.peers.set_status(rank, status):
            self.links.send_to_callers({"type": "status", "rank": rank, "status": status})

    def on_join(self, statuses: Mapping[int, str]) -> None:
        """See `Role`: this rank is the hub already and knows the statuses."""

    def lose(self, rank: int) -> None:
        """See `Role`."""
        if self.peers[rank].there:
            self.set_status(rank, "dead")
        self.links.drop_caller(rank)
        self.judge_death(rank)

    def forget(self, rank: int) -> None:
        """See `Role`."""
        self.links.drop_caller(rank)

    def on_moved(self, rank: int, to: int) -> None:
        """See `Role`: this rank was suspended, and the others have switched to another hub."""
        if to != self.own.rank:
            self._inquiry = None  # the answers go to the new hub
            self.turn_to(to)

    # ---- Inquiries ------------------------------------------------------------------------------------------------

    def look_for_crossing(self, now: float) -> None:
        """Starts an inquiry if main threads are in different collectives, in which Horovod would deadlock silently."""
        inside = {p.state.inside for p in self.peers.values() if p.there and p.still >= _CROSSED}
        if len(inside - {None}) > 1 and now > self.compare_after:
            self.compare_after = now + _AGAIN
            self.inquire()

    def look_for_stall(self) -> None:
        """Starts an inquiry if no rank has made progress within the limit. Each stall is reported once."""
        still, limit = self.peers.still(), self.job.limit
        again = self.reported != self.peers.marks()
        if still > limit and (again or (self.job.aborts and still > _PATIENCE * limit)):
            self.inquire(limit)

    def inquire(self, limit: float | None = None, explains: bool = False) -> None:
        """See `Role`. A request during an inquiry is added to it."""
        if self.ending.failure:
            return
        if self._inquiry:
            self._inquiry.limit = self._inquiry.limit or limit
            self._inquiry.explains = self._inquiry.explains or explains
            return
        self._inquiry = _Inquiry(limit, explains)
        question = self._question()
        self._inquiry.answers[self.own.rank] = from_message(self.own.full_state(question["names"]))
        self.links.send_to_callers(question)

    def _question(self) -> Message:
        """Requests a rank's full state, and its call counts of the collectives in which ranks are."""
        return {"type": "collect", "names": sorted({p.state.inside for p in self.peers.values() if p.state.inside})}

    def on_answer(self, rank: int, message: Message) -> None:
        """See `Role`."""
        super().on_answer(rank, message)
        if self._inquiry:
            self._inquiry.answers[rank] = from_message(message["state"], rank=rank)

    def complete_inquiries(self) -> None:
        """See `Role`."""
        inquiry = self._inquiry
        if inquiry and (self.peers.living() <= inquiry.answers.keys() or time.monotonic() > inquiry.until):
            self._inquiry = None
            self._conclude(inquiry)
        self._look_for_cause()

    def _conclude(self, inquiry: _Inquiry) -> None:
        for rank in self.peers.keys() - inquiry.answers.keys():
            if self.peers[rank].there:
                self.set_status(rank, "frozen")
        states = [inquiry.answers.get(state.rank, state) for state in self.peers.states()]
        if inquiry.explains:
            text = stall_causes.mismatch(states)
            self.ending.explain(text)
            self.links.send_to_callers({"type": "explanation", "text": text})
        crossing = stall_causes.crossed(states)
        if crossing:
            self.settle(Failure(None, None, "mismatch", crossing, 1))
        elif inquiry.limit is not None:
            self._conclude_stall(inquiry.limit, states)

    def _conclude_stall(self, limit: float, states: Sequence[RankState]) -> None:
        still = self.peers.still()
        if still <= limit:  # a rank has made progress while the ranks were asked
            return
        self.reported = self.peers.marks()
        may_be_busy = any(s.status == "living" and not s.busy for s in states)
        seconds = limit * (_PATIENCE if may_be_busy else 1)
        aborts = self.job.aborts and still > seconds
        report = stall_report(states, limit, self.job.aborts, STALLED, seconds if aborts else limit, seconds)
        if not aborts:
            outcome.show(report)
            return
        cause = stall_causes.likely_cause(states)
        failure = Failure(None, None, "stall", f"the job has made no progress for {seconds:g} s: {cause}", STALLED)
        self.settle(failure, report)

    def on_traced(self, rank: int, message: Message) -> None:
        """Compares at once: Horovod's grouped allreduce returns garbage for different shapes, without an error."""
        super().on_traced(rank, message)
        text = stall_causes.mismatch_of_signatures(self.peers.states(there=True))
        if text and not self.ending.failure:
            self.settle(Failure(None, None, "mismatch", text, 1))

    def _look_for_cause(self) -> None:
        """After a collective has failed on some rank, finds the rank that died or exited."""
        if self.own.failed_at is None or self.ending.failure:
            return
        states = self.peers.states()
        dead = next((s for s in states if s.status == "dead"), None)
        left = next((s for s in states if s.status == "left"), None)
        if dead:
            self.settle(death(dead))
        elif left and time.monotonic() > self.own.failed_at + _SETTLE:
            why = self.peers[left.rank].why
            text = f"ended its program after {left.place}, while other ranks still needed it"
            failure = Failure(left.rank, left.host, "left", text, STALLED)
            self.settle(Failure(left.rank, left.host, "error", f"failed: {why}", 1) if why else failure)

    # ---- The end --------------------------------------------------------------------------------------------------

    def settle(self, failure: Failure, report: str = "") -> None:
        """See `Role`.

        The members are told, and the exit is scheduled, before anything is shown: writing may block if nobody reads.
        """
        if self.ending.failure:
            return
        at_once = failure.kind in ("stall", "mismatch")
        self.links.send_to_callers(ended(failure, at_once))
        self.ending.make_sure(failure, at_once)
        text = report or ("" if self.job.elastic else failure_sentence(failure))
        if text:
            outcome.tell(Failed(failure.kind, failure.code, failure.message, failure.rank, failure.host), text)
        self.ending.take(failure, at_once)

"""The watchdog's thread: one a rank, connected to all others through one of them, the hub.

The hub is rank 0. It hears from every rank, asks all for their stacks when one stands still, decides why, prints, and
tells everyone how the job ends. If it dies, leaves or freezes, the others turn to the next rank that lives: each knows
the addresses of all, and all walk through them in the same order.

All that happens here happens in this one thread. Other threads only post work to it, or wait for the `Failure`.
"""

import contextlib
import dataclasses
import logging
import os
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from hvdkit import outcome
from hvdkit.outcome import STALLED, Failed
from hvdkit.watchdog import causes, stacks
from hvdkit.watchdog.channel import MOST_VISITORS, Connection, Gone, Message, Visitor, call
from hvdkit.watchdog.progress import Progress
from hvdkit.watchdog.report import failure_sentence, stall_report
from hvdkit.watchdog.states import Failure, RankState, from_message

_log = logging.getLogger(__name__)

_BEAT = 1.0  # seconds between two signs of life
_SILENCE = 5.0  # seconds without one, after which a rank is taken for frozen, if the job stands still
_ANSWER = 3.0  # seconds for a rank to tell where it is
_GRACE = 5.0  # seconds for a rank to leave by itself when another has failed
_CROSSED = 2.0  # seconds that ranks are in different collectives, after which their calls are compared
_PATIENCE = 3  # times the limit, where a rank that the others wait for may be busy with code of the user's
_AGAIN = 5.0  # seconds between two such comparisons
_LAST_WORDS = 2.0  # seconds to show them
_SETTLE = 1.0  # seconds for the news of a first cause to arrive, when a rank was thrown out of an exchange


@dataclasses.dataclass(frozen=True)
class Job:
    """What all watchdogs of a job have in common.

    Attributes:
        token: the secret that every connection must prove.
        hosts: the ranks' host names.
        doors: the ranks' addresses and ports.
        limit: seconds that a rank may stand still; 0 for no limit.
        aborts: whether a stall ends the job.
        elastic: whether the job goes on without a rank that was lost.
    """

    token: bytes
    hosts: Sequence[str]
    doors: Sequence[tuple[str, int]]
    limit: float
    aborts: bool
    elastic: bool


class _Peer:
    """What this rank knows of another."""

    def __init__(self, host: str, rank: int) -> None:
        self.state = RankState(rank, host)
        self.heard = time.monotonic()
        self.still = 0.0  # seconds since it moved on, when it was heard of last
        self.marks = -1
        self.why = ""  # the error that it left with

    @property
    def there(self) -> bool:
        return self.state.status in ("living", "frozen")


class _Inquiry:
    """The hub's question to all ranks where they are: for a stall, for ranks in different collectives, or for ranks
    whose exchange was refused.
    """

    def __init__(self, limit: float | None, explains: bool) -> None:
        self.limit = limit  # None: not about a stall
        self.explains = explains  # somebody waits for the answer
        self.until = time.monotonic() + _ANSWER
        self.answers: dict[int, RankState] = {}


class Watchman(threading.Thread):
    """Watches this rank, and the others if it is the hub.

    Args:
        rank: this rank.
        job: what the job's watchdogs have in common.
        door: where the other ranks reach this one.
        progress: what this rank is doing.
        end_process: ends this process with an exit code, whatever its other threads do.
    """

    def __init__(
        self,
        rank: int,
        job: Job,
        door: socket.socket,
        progress: Progress,
        end_process: Callable[[int], Any] = os._exit,
    ) -> None:
        super().__init__(name="hvdkit-watchdog", daemon=True)
        self.rank = rank
        self.host = job.hosts[rank]
        self.failure: Failure | None = None
        self.known = threading.Event()  # set with `failure`
        self.explained = threading.Event()  # set with `explanation`
        self.explanation: str | None = None
        self._job = job
        self._door = door
        self._progress = progress
        self._end_process = end_process
        self._peers = {r: _Peer(host, r) for r, host in enumerate(job.hosts)}
        self._hub = 0
        self._to_hub: Connection | None = None
        self._members: dict[int, Connection] = {}
        self._visitors: set[Visitor] = set()
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wakes, self._waker = socket.socketpair()
        self._inquiry: _Inquiry | None = None
        self._asked: float | None = None  # when the hub was told that this rank stands still
        self._thrown: float | None = None  # when this or another rank was thrown out of an exchange
        self._still = 0.0
        self._marks = -1
        self._reported: dict[int, int] = {}  # the ranks' marks when a stall was reported
        self._compare_after = 0.0
        self._leave: tuple[float, int] | None = None
        self._deadline: threading.Timer | None = None
        self._ends = False

    # ---- Called from other threads --------------------------------------------------------------------------------

    def post(self, work: Callable[[], None]) -> None:
        """Runs `work` in the watchdog's thread, soon."""
        self._work.put(work)
        with contextlib.suppress(OSError):  # closed: the thread has ended
            self._waker.send(b"!")

    def tell_phase(self) -> None:
        """Tells the hub at once that this rank is now busy or not: it may be gone before the next sign of life."""
        for connection in self._everyone():
            connection.send(self._beat())

    def tell_failure(self, failure: Failure) -> None:
        """Makes this rank's own failure known to all, if it is the first."""
        self.post(lambda: self._settle(failure) if self._is_hub else self._ask(_failed(failure)))

    def tell_thrown_out(self) -> None:
        """Says that this rank was thrown out of an exchange, and would like to know why."""
        self.post(lambda: self._on_thrown_out(self.rank, {}))

    def ask_to_explain(self) -> None:
        """Asks for a comparison of what all ranks brought to the exchange."""
        self.post(lambda: self._inquire(explains=True) if self._is_hub else self._ask({"type": "explain"}))

    def tell_signature(self, name: str, number: int) -> None:
        """Has the hub compare a new signature with those of the other ranks."""
        fields = {"type": "traced", "name": name, "number": number, "signature": self._progress.traced[name][number]}
        self.post(lambda: self._on_traced(self.rank, fields) if self._is_hub else self._ask(fields))

    def end(self, why: str = "") -> None:
        """Says goodbye and ends the thread; `why` is the error that this rank leaves with, if there is one."""
        self.post(lambda: self._say_goodbye(why))
        if threading.current_thread() is not self:
            self.join(2)

    def forget(self) -> None:
        """Closes this process's copies of the sockets: for a forked child, which must not keep them open."""
        self._selector.close()
        connected = [*(c.sock for c in self._everyone()), *(v.sock for v in self._visitors)]
        for sock in (self._door, self._wakes, self._waker, *connected):
            sock.close()

    # ---- The thread -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs until `end`."""
        try:
            self._selector.register(self._wakes, selectors.EVENT_READ, self._on_wake)
            self._selector.register(self._door, selectors.EVENT_READ, self._on_visitor)
            self._turn_to_hub()
            self._loop()
        except Exception:
            if not self._ends:
                _log.exception("hvdkit's watchdog has ended by a mistake of its own; the job goes on without it")
                with contextlib.suppress(Exception):  # so that the others do not take this rank for dead
                    self._say_goodbye("")
        finally:
            self._close()

    def _loop(self) -> None:
        beat = time.monotonic()
        while not self._ends:
            wait = min([beat + _BEAT, *([self._leave[0]] if self._leave else [])]) - time.monotonic()
            for key, _ in self._selector.select(max(0.0, wait)):
                key.data()
            self._watch_writing()
            if self._leave and time.monotonic() >= self._leave[0]:
                self._exit(self._leave[1])
            late = time.monotonic() - beat
            if late >= _BEAT:
                beat += late
                self._on_beat(min(late, 2 * _BEAT))  # a process that was suspended has not stood still meanwhile
            self._look_after_inquiry()
            self._look_for_cause()

    def _on_wake(self) -> None:
        self._wakes.recv(4096)
        while not self._ends:
            try:
                work = self._work.get_nowait()
            except queue.Empty:
                return
            work()

    def _on_beat(self, seconds: float) -> None:
        progress, now = self._progress, time.monotonic()
        moved = progress.marks != self._marks
        self._marks = progress.marks
        self._still = 0.0 if moved else self._still + seconds
        if moved:
            self._asked = None
        self._on_state(self.rank, self._beat_fields())
        self._peers[self.rank].heard = now
        if self._is_hub:
            self._look_for_crossing(now)
        for connection in self._everyone():
            connection.send(self._beat())
        for visitor in [v for v in self._visitors if v.until < now]:
            self._turn_away(visitor)
        if progress.busy and 0 < self._job.limit < self._still:
            self._on_own_stall(now)

    def _on_own_stall(self, now: float) -> None:
        """Asks in every beat: the hub does not answer while another rank still moves on."""
        if self._is_hub:
            self._look_for_stall()
            return
        self._asked = self._asked or now
        if now - max(self._asked, self._peers[self._hub].heard) > _SILENCE:
            self._set_status(self._hub, "frozen")
            self._leave_hub()
        else:
            self._ask({"type": "stall"})

    # ---- The hub and its members ----------------------------------------------------------------------------------

    @property
    def _is_hub(self) -> bool:
        return self._hub == self.rank

    def _everyone(self) -> list[Connection]:
        return [*list(self._members.values()), *([self._to_hub] if self._to_hub else [])]

    def _turn_to_hub(self) -> None:
        """Connects to the hub, or to the next rank that answers; this rank itself is always there."""
        while not self._is_hub:
            try:
                connection = call(self._job.doors[self._hub], self._job.token, mine=self.rank, theirs=self._hub)
            except OSError as error:
                _log.debug("rank %d does not answer: %s", self._hub, error)
                self._hub = self._next(self._hub)
            else:
                self._join(connection)
                return
        if self._asked is not None:
            self._look_for_stall()

    def _join(self, connection: Connection) -> None:
        self._to_hub = connection
        self._peers[self._hub].heard = time.monotonic()
        self._selector.register(connection.sock, selectors.EVENT_READ, lambda: self._on_message(connection))
        statuses = {r: p.state.status for r, p in self._peers.items() if p.state.status != "living"}
        connection.send({"type": "join", "statuses": statuses, **self._beat_fields()})
        if self._asked is not None:
            connection.send({"type": "stall"})
        if self._thrown is not None:
            connection.send({"type": "thrown_out"})

    def _next(self, hub: int) -> int:
        """The rank to turn to when `hub` is no longer there."""
        size = len(self._peers)
        order = [(hub + step) % size for step in range(1, size)]
        return next(r for r in order if r == self.rank or self._peers[r].state.status == "living")

    def _leave_hub(self) -> None:
        """Turns to the next rank, and tells a hub that may only have been asleep."""
        old, self._to_hub = self._to_hub, None
        self._hub = self._next(self._hub)
        if old is not None:
            old.send({"type": "moved", "to": self._hub})
            self._drop(old)
        self._turn_to_hub()

    def _on_message(self, connection: Connection) -> None:
        try:
            messages = connection.receive()
        except Gone:
            self._on_lost(connection)
            return
        for message in messages:
            peer = self._peers[connection.rank]
            peer.heard = time.monotonic()
            if peer.state.status == "frozen":
                self._set_status(connection.rank, "living")
            handler = self._handlers().get(str(message.get("type")))
            if handler:
                handler(connection.rank, message)

    def _handlers(self) -> dict[str, Callable[[int, Message], None]]:
        return {
            "join": self._on_join,
            "beat": self._on_state,
            "answer": self._on_answer,
            "stall": lambda rank, message: self._look_for_stall(),
            "explain": lambda rank, message: self._inquire(explains=True),
            "explanation": lambda rank, message: self._take_explanation(message["text"]),
            "collect": lambda rank, message: self._ask({"type": "answer", "state": self._full_state(message["names"])}),
            "traced": self._on_traced,
            "thrown_out": self._on_thrown_out,
            "failed": lambda rank, message: self._settle(Failure(**message["failure"])),
            "ended": lambda rank, message: self._take(Failure(**message["failure"]), message["at_once"]),
            "status": lambda rank, message: self._set_status(message["rank"], message["status"]),
            "bye": self._on_bye,
            "moved": self._on_moved,
        }

    def _ask(self, message: Message) -> None:
        if self._to_hub:
            self._to_hub.send(message)

    def _beat_fields(self) -> dict[str, Any]:
        """The little that the others always know of this rank."""
        p = self._progress
        wait = p.waits[-1] if p.waits else None
        still = round(self._still, 1) if p.marks == self._marks else 0.0
        return {
            "phase": p.phase, "epoch": p.epoch, "step": p.step, "collective": wait and wait.name, "inside": p.inside,
            "still": still, "marks": p.marks,
        }  # fmt: skip

    def _beat(self) -> Message:
        return {"type": "beat", **self._beat_fields()}

    def _on_state(self, rank: int, message: Message) -> None:
        peer = self._peers[rank]
        fields = {k: message[k] for k in ("phase", "epoch", "step", "collective", "inside")}
        peer.state = dataclasses.replace(peer.state, **fields)
        peer.still, peer.marks = message["still"], message["marks"]

    def _on_join(self, rank: int, message: Message) -> None:
        """A member that has lost its hub, or the first that comes: whoever is asked is the hub."""
        # What this rank has not seen itself, and will not where it leaves the old hub now.
        told = {int(absent): status for absent, status in message["statuses"].items()}
        dead = [r for r, status in told.items() if (self._peers[r].state.status, status) == ("living", "dead")]
        if not self._is_hub:
            for absent, status in told.items():
                self._set_status(absent, status)
            old, self._hub = self._hub, self.rank
            _log.debug("rank %d is now the hub, in place of rank %d", self.rank, old)
            if self._to_hub:
                self._to_hub.send({"type": "moved", "to": self.rank})
                self._drop(self._to_hub)
                self._to_hub = None
        self._on_state(rank, message)
        if self.failure:
            self._members[rank].send(_ended(self.failure, at_once=False))
        elif self._inquiry:
            self._members[rank].send(self._question())
        for absent in dead:
            self._judge_death(absent)

    def _on_moved(self, rank: int, message: Message) -> None:
        """This rank was the hub, and slept: the others have turned to another one."""
        if rank in self._members:
            self._drop(self._members.pop(rank))
        if self._is_hub and message["to"] != self.rank:
            self._hub = int(message["to"])
            self._turn_to_hub()
        elif not self._is_hub and self._hub == rank:
            self._leave_hub()

    def _on_bye(self, rank: int, message: Message) -> None:
        self._peers[rank].why = message["why"]
        self._set_status(rank, "left")
        self._forget(rank)

    def _on_lost(self, connection: Connection) -> None:
        """A connection broke without a goodbye: an end in the middle of work is a death, any other may be an exit."""
        rank = connection.rank
        if connection not in self._everyone():
            return
        if self._is_hub and self._peers[rank].there:
            self._set_status(rank, "dead")
        elif not self._is_hub:
            self._set_status(self._hub, "dead")
        was_hub = rank == self._hub
        self._forget(rank)
        if self._is_hub or was_hub:
            self._judge_death(rank)

    def _judge_death(self, rank: int) -> None:
        """By the phase, of which every rank tells at once: what is known of its collectives is a second old."""
        peer = self._peers[rank].state
        if peer.phase != "between":
            self._settle(self._death(peer))

    def _forget(self, rank: int) -> None:
        if rank in self._members:
            self._drop(self._members.pop(rank))
        if not self._is_hub and rank == self._hub:
            if self._to_hub:
                self._drop(self._to_hub)
            self._to_hub = None
            self._hub = self._next(rank)
            self._turn_to_hub()

    def _set_status(self, rank: int, status: str) -> None:
        peer = self._peers[rank]
        if peer.state.status == status or rank == self.rank:
            return
        peer.state = dataclasses.replace(peer.state, status=status)
        if self._is_hub:
            for member in self._members.values():
                member.send({"type": "status", "rank": rank, "status": status})

    # ---- What the hub finds out -----------------------------------------------------------------------------------

    def _look_for_crossing(self, now: float) -> None:
        """Are main threads in different collectives? Horovod would let them wait, without a word, for ever."""
        inside = {p.state.inside for p in self._peers.values() if p.there and p.still >= _CROSSED}
        if len(inside - {None}) > 1 and now > self._compare_after:
            self._compare_after = now + _AGAIN
            self._inquire()

    def _look_for_stall(self) -> None:
        """Some rank waits; that is a stall only if none has moved on within the limit, and is reported once."""
        still = self._all_still()
        again = self._reported != self._all_marks()
        if still > self._job.limit and (again or (self._job.aborts and still > _PATIENCE * self._job.limit)):
            self._inquire(self._job.limit)

    def _all_still(self) -> float:
        """Seconds for which no rank has moved on; one that is not heard of has not, either."""
        now = time.monotonic()
        return min(p.still + now - p.heard for p in self._peers.values() if p.there)

    def _all_marks(self) -> dict[int, int]:
        return {rank: p.marks for rank, p in self._peers.items() if p.there}

    def _question(self) -> Message:
        """Asks for a rank's whole state, and how often it has called what others are in."""
        return {"type": "collect", "names": sorted({p.state.inside for p in self._peers.values() if p.state.inside})}

    def _inquire(self, limit: float | None = None, explains: bool = False) -> None:
        if self.failure or not self._is_hub:
            return
        if self._inquiry:
            self._inquiry.limit = self._inquiry.limit or limit
            self._inquiry.explains = self._inquiry.explains or explains
            return
        self._inquiry = _Inquiry(limit, explains)
        question = self._question()
        self._inquiry.answers[self.rank] = from_message(self._full_state(question["names"]))
        for member in self._members.values():
            member.send(question)

    def _on_answer(self, rank: int, message: Message) -> None:
        self._on_state(rank, message["state"])
        if self._inquiry:
            self._inquiry.answers[rank] = from_message(message["state"], rank=rank)

    def _look_after_inquiry(self) -> None:
        inquiry = self._inquiry
        if not inquiry:
            return
        expected = {r for r, p in self._peers.items() if p.state.status == "living"}
        if expected <= inquiry.answers.keys() or time.monotonic() > inquiry.until:
            self._inquiry = None
            self._conclude(inquiry)

    def _conclude(self, inquiry: _Inquiry) -> None:
        for rank in self._peers.keys() - inquiry.answers.keys():
            if self._peers[rank].there:
                self._set_status(rank, "frozen")
        states = [inquiry.answers.get(r, p.state) for r, p in sorted(self._peers.items())]
        if inquiry.explains:
            text = causes.mismatch(states)
            self._take_explanation(text)
            for member in self._members.values():
                member.send({"type": "explanation", "text": text})
        crossing = causes.crossed(states)
        if crossing:
            self._settle(Failure(None, None, "mismatch", crossing, 1))
        elif inquiry.limit is not None:
            self._conclude_stall(inquiry.limit, states)

    def _conclude_stall(self, limit: float, states: Sequence[RankState]) -> None:
        still = self._all_still()
        if still <= limit:  # somebody has moved on while the ranks were asked
            return
        self._reported = self._all_marks()
        may_be_busy = any(s.status == "living" and not s.busy for s in states)
        seconds = limit * (_PATIENCE if may_be_busy else 1)
        aborts = self._job.aborts and still > seconds
        report = stall_report(states, limit, self._job.aborts, STALLED, seconds if aborts else limit, seconds)
        if not aborts:
            _say(report)
            return
        cause = causes.likely_cause(states)
        failure = Failure(None, None, "stall", f"the job has stood still for {seconds:g} s: {cause}", STALLED)
        self._settle(failure, report)

    def _on_traced(self, rank: int, message: Message) -> None:
        """Compares at once: Horovod's grouped exchange answers tensors of different shape with garbage, no error."""
        self._remember(rank, message)
        states = [p.state for _, p in sorted(self._peers.items()) if p.there]
        text = causes.mismatch_of_signatures(states)
        if text and self._is_hub and not self.failure:
            self._settle(Failure(None, None, "mismatch", text, 1))

    def _remember(self, rank: int, message: Message) -> None:
        peer = self._peers[rank]
        traced = {name: list(signatures) for name, signatures in peer.state.traced.items()}
        known = traced.setdefault(message["name"], [])
        if message["number"] == len(known):
            known.append(message["signature"])
        peer.state = dataclasses.replace(peer.state, traced=traced)

    def _on_thrown_out(self, rank: int, message: Message) -> None:
        self._thrown = self._thrown or time.monotonic()
        if not self._is_hub:
            self._ask({"type": "thrown_out"})

    def _look_for_cause(self) -> None:
        """Somebody was thrown out of an exchange: who is missing?"""
        if self._thrown is None or self.failure or not self._is_hub:
            return
        states = [p.state for _, p in sorted(self._peers.items())]
        dead = next((s for s in states if s.status == "dead"), None)
        left = next((s for s in states if s.status == "left"), None)
        if dead:
            self._settle(self._death(dead))
        elif left and time.monotonic() > self._thrown + _SETTLE:
            why = self._peers[left.rank].why
            text = f"ended its program after {left.place}, while other ranks were still exchanging with it"
            failure = Failure(left.rank, left.host, "left", text, STALLED)
            self._settle(Failure(left.rank, left.host, "error", f"failed: {why}", 1) if why else failure)

    def _death(self, peer: RankState) -> Failure:
        where = f"in the collective {peer.collective!r}" if peer.collective else f"{peer.phase}, {peer.place}"
        text = f"died ({where}): its connection broke without a goodbye; look at its own output and exit code"
        return Failure(peer.rank, peer.host, "death", text, STALLED)

    # ---- The end --------------------------------------------------------------------------------------------------

    def _settle(self, failure: Failure, report: str = "") -> None:
        """The first failure is the job's; what follows from it is not looked at.

        The others know before anything is shown, and the end is sure: nobody may read what this process writes.
        """
        if self.failure:
            return
        if not self._is_hub:  # known before the hub can tell
            self._take(failure, at_once=False)
            return
        at_once = failure.kind in ("stall", "mismatch")
        for member in self._members.values():
            member.send(_ended(failure, at_once))
        if not self._leaves_alone(failure, at_once):
            self._end_within(_LAST_WORDS + (0.0 if at_once else _GRACE), failure.code)
        text = report or ("" if self._job.elastic else failure_sentence(failure))
        if text:
            outcome.tell(Failed(failure.kind, failure.code, failure.message, failure.rank, failure.host), text)
        self._take(failure, at_once)

    def _take(self, failure: Failure, at_once: bool) -> None:
        if self.failure:
            return
        self.failure = failure
        self.known.set()
        self._take_explanation(None)
        if not self._leaves_alone(failure, at_once):
            self._leave = (time.monotonic() + (0.0 if at_once else _GRACE), failure.code)

    def _leaves_alone(self, failure: Failure, at_once: bool) -> bool:
        return failure.rank == self.rank or (self._job.elastic and not at_once)

    def _take_explanation(self, text: str | None) -> None:
        self.explanation = text
        self.explained.set()

    def _exit(self, code: int) -> None:
        """Ends the process: a main thread inside an exchange cannot be interrupted."""
        self._end_within(_LAST_WORDS, code)
        for connection in self._everyone():
            connection.flush()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self._leave = None
        if self._deadline:
            self._deadline.cancel()
        self._end_process(code)

    def _end_within(self, seconds: float, code: int) -> None:
        """Ends the process also if somebody holds the lock of a stream, or nobody reads what is written."""
        if self._deadline:
            self._deadline.cancel()
        self._deadline = threading.Timer(seconds, self._end_process, [code])
        self._deadline.daemon = True
        with contextlib.suppress(RuntimeError):  # Python 3.12 starts no thread any more while it shuts down
            self._deadline.start()

    def _say_goodbye(self, why: str) -> None:
        self._ends = True
        for connection in self._everyone():
            connection.send({"type": "bye", "why": why})

    def _close(self) -> None:
        self._ends = True
        self.known.set()
        self.explained.set()
        for connection in self._everyone():
            connection.close()
        self.forget()

    # ---- Sockets --------------------------------------------------------------------------------------------------

    def _on_visitor(self) -> None:
        try:
            sock, _ = self._door.accept()
        except OSError:
            return
        if len(self._visitors) >= max(MOST_VISITORS, 2 * len(self._peers)):
            sock.close()
            return
        try:
            visitor = Visitor(sock, self._job.token, len(self._peers))
        except OSError:
            sock.close()
            return
        self._visitors.add(visitor)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._on_proof(visitor))

    def _on_proof(self, visitor: Visitor) -> None:
        try:
            connection = visitor.receive()
        except Gone as error:
            _log.debug("a visitor was turned away: %s", error)
            self._turn_away(visitor)
            return
        if connection:
            self._visitors.discard(visitor)
            old = self._members.pop(connection.rank, None)
            if old:
                self._drop(old)
            self._members[connection.rank] = connection
            self._peers[connection.rank].heard = time.monotonic()
            self._selector.modify(visitor.sock, selectors.EVENT_READ, lambda: self._on_message(connection))

    def _turn_away(self, visitor: Visitor) -> None:
        self._visitors.discard(visitor)
        self._selector.unregister(visitor.sock)
        visitor.sock.close()

    def _drop(self, connection: Connection) -> None:
        connection.flush()
        self._selector.unregister(connection.sock)
        connection.close()

    def _watch_writing(self) -> None:
        for connection in self._everyone():
            connection.flush()

    def _full_state(self, names: Sequence[str]) -> dict[str, Any]:
        """Where this rank is, with its stacks, and its calls of some collectives: looked up only if somebody asks."""
        p, main = self._progress, stacks.main_frame()
        wait = p.waits[-1] if p.waits else None
        return {
            **self._beat_fields(),
            "rank": self.rank,
            "host": self._job.hosts[self.rank],
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


def _failed(failure: Failure) -> Message:
    return {"type": "failed", "failure": dataclasses.asdict(failure)}


def _ended(failure: Failure, at_once: bool) -> Message:
    return {"type": "ended", "at_once": at_once, "failure": dataclasses.asdict(failure)}


def _say(text: str) -> None:
    """Writes in one piece and past Python's buffers, whose locks the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))  # a file's name may hold surrogates

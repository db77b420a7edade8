"""The watchdog's thread: one for each rank, connected to the other ranks through one of them, the hub.

The hub is rank 0. It receives heartbeats from every rank, collects all stacks when a rank stalls, finds the cause,
prints it, and tells every rank how the job ends. If the hub dies, exits or stops responding, the ranks switch to the
next living rank. Each knows all addresses, and all try them in the same order.

    thread.py     the thread: waits for messages, timeouts and posted work, and passes them to its current role
    hub.py        what the hub does; member.py, what the other ranks do
    peers.py      what a rank knows about all ranks, and about itself
    meeting.py    how all ranks leave the training together
    links.py      its connections; channel.py, the messages on them
    ending.py     how its process ends when the job has failed

All of this runs in this one thread. Other threads only post work to it, or wait for the `Failure`.
"""

import contextlib
import logging
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from hvdkit.watchdog.channel import Connection, Gone, Message, call
from hvdkit.watchdog.ending import Ending
from hvdkit.watchdog.hub import Hub
from hvdkit.watchdog.links import Links
from hvdkit.watchdog.member import Context, Member, Role
from hvdkit.watchdog.peers import Own, Peers
from hvdkit.watchdog.progress import Progress
from hvdkit.watchdog.states import Failure, Job

_log = logging.getLogger(__name__)

_BEAT = 1.0  # seconds between two heartbeats


class WatchdogThread(threading.Thread):
    """Watches this rank, and the other ranks if it is the hub.

    Args:
        rank: this rank.
        job: what the job's watchdogs have in common.
        door: the listening socket for the other ranks.
        progress: what this rank is doing.
        end_process: ends this process with an exit code, whatever its other threads do.

    Attributes:
        ending: the job's failure as far as it is known, for threads that wait for it.
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
        self._job = job
        self._own = Own(rank, self.host, progress)
        self._peers = Peers(job.hosts, rank)
        self._selector = selectors.DefaultSelector()
        self._links = Links(
            self._selector, door, job.token, len(job.hosts), lambda c: self._peers.hear(c.rank), self._on_readable
        )
        self.ending = Ending(rank, job.elastic, end_process, self._links.flush)
        self._context = Context(job, self._own, self._peers, self._links, self.ending, self._turn_to)
        self._hub = Hub(self._context)
        self._role: Role = self._hub if rank == 0 else Member(self._context, 0)
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wakes, self._waker = socket.socketpair()
        self._ends = False

    # ---- Called from other threads --------------------------------------------------------------------------------

    @property
    def failure(self) -> Failure | None:
        """The job's failure; None while there is none."""
        return self.ending.failure

    @property
    def known(self) -> threading.Event:
        """Set with `failure`."""
        return self.ending.known

    def post(self, work: Callable[[], None]) -> None:
        """Runs `work` in the watchdog's thread, soon."""
        self._work.put(work)
        with contextlib.suppress(OSError):  # closed: the thread has ended
            self._waker.send(b"!")

    def tell_phase(self) -> None:
        """Sends the phase at once: this rank may be gone before the next heartbeat."""
        self._links.send(self._beat())

    def tell_failure(self, failure: Failure) -> None:
        """Tells all ranks of this rank's failure, if it is the first."""
        self.post(lambda: self._role.fail(failure))

    def tell_thrown_out(self) -> None:
        """Reports that a collective failed on this rank, and requests the reason."""
        self.post(self._on_thrown_out)

    def ask_to_explain(self) -> None:
        """Requests a comparison of all ranks' tensors in the collective."""
        self.post(lambda: self._role.explain())

    def tell_signature(self, name: str, number: int) -> None:
        """Requests a comparison of a new signature with those of the other ranks."""
        signature = self._own.progress.traced[name][number]
        self.post(lambda: self._role.trace({"type": "traced", "name": name, "number": number, "signature": signature}))

    def tell_to_leave(self) -> None:
        """Has all ranks agree on the execution after which they leave the training."""
        self.post(lambda: self._role.call_meeting())

    def end(self, why: str = "") -> None:
        """Says goodbye and ends the thread; `why` is the error that this rank exits with, if there is one."""
        self.ending.leave()
        self.post(lambda: self._say_goodbye(why))
        if threading.current_thread() is not self:
            self.join(2)

    def forget(self) -> None:
        """Closes this process's copies of the sockets: for a forked child, which must not keep them open."""
        self._selector.close()
        self._links.forget()
        self._wakes.close()
        self._waker.close()

    # ---- The thread -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs until `end`."""
        try:
            self._selector.register(self._wakes, selectors.EVENT_READ, self._on_wake)
            self._links.open()
            self._turn_to(0)
            self._loop()
        except Exception:
            if not self._ends:
                _log.exception("hvdkit's watchdog has failed (a bug in hvdkit); the job continues without it")
                with contextlib.suppress(Exception):  # otherwise the other ranks would report this one as dead
                    self._say_goodbye("")
        finally:
            self._close()

    def _loop(self) -> None:
        beat = time.monotonic()
        while not self._ends:
            wait = min(beat + _BEAT - time.monotonic(), self.ending.seconds_left)
            for key, _ in self._selector.select(max(0.0, wait)):
                key.data()
            self._links.flush()
            self.ending.keep_time()
            late = time.monotonic() - beat
            if late >= _BEAT:
                beat += late
                self._on_beat(min(late, 2 * _BEAT))  # time in which the process was suspended is not a stall
            self._role.complete_inquiries()

    def _on_wake(self) -> None:
        self._wakes.recv(4096)
        while not self._ends:
            try:
                work = self._work.get_nowait()
            except queue.Empty:
                return
            work()

    def _on_beat(self, seconds: float) -> None:
        now = time.monotonic()
        self._own.look(seconds)
        self._peers.take_state(self.rank, self._own.beat_fields())
        self._peers.hear(self.rank)
        self._role.look_for_crossing(now)
        self._links.send(self._beat())
        self._links.turn_late_away()
        if self._own.progress.busy and 0 < self._job.limit < self._own.still:
            self._role.report_stall(now)

    def _beat(self) -> Message:
        return {"type": "beat", **self._own.beat_fields()}

    def _turn_to(self, hub: int) -> Role:
        """Connects to the hub, or to the next rank that answers, and returns this rank's new role."""
        while hub != self.rank:
            try:
                connection = call(self._job.doors[hub], self._job.token, mine=self.rank, theirs=hub)
            except OSError as error:
                _log.debug("rank %d does not answer: %s", hub, error)
                hub = self._peers.after(hub)
            else:
                self._links.set_hub(connection)
                self._role = member = Member(self._context, hub)
                member.join()
                return member
        self._role = self._hub
        if self._own.asked is not None:
            self._hub.look_for_stall()
        return self._role

    def _say_goodbye(self, why: str) -> None:
        self._ends = True
        self._links.send({"type": "bye", "why": why})

    def _close(self) -> None:
        self._ends = True
        self.ending.release()
        self._links.close()
        self.forget()

    # ---- Messages -------------------------------------------------------------------------------------------------

    def _on_readable(self, connection: Connection) -> None:
        try:
            messages = connection.receive()
        except Gone:
            self._on_lost(connection)
            return
        for message in messages:
            self._peers.hear(connection.rank)
            if self._peers[connection.rank].state.status == "frozen":
                self._role.set_status(connection.rank, "living")
            handler = self._handlers().get(str(message.get("type")))
            if handler:
                handler(connection.rank, message)

    def _handlers(self) -> dict[str, Callable[[int, Message], None]]:
        role = self._role
        return {
            "join": self._on_join,
            "beat": self._peers.take_state,
            "answer": role.on_answer,
            "stall": lambda rank, message: role.look_for_stall(),
            "explain": lambda rank, message: role.inquire(explains=True),
            "explanation": lambda rank, message: self.ending.explain(message["text"]),
            "collect": lambda rank, message: self._answer(message["names"]),
            "traced": role.on_traced,
            "told": lambda rank, message: role.call_meeting(),
            "leave": lambda rank, message: role.ask({"type": "stand", "done": self._own.progress.meeting.call()}),
            "stand": role.on_stand,
            "meet": lambda rank, message: self._own.progress.meeting.agree(int(message["after"])),
            "thrown_out": lambda rank, message: self._on_thrown_out(),
            "failed": lambda rank, message: role.settle(Failure(**message["failure"])),
            "ended": lambda rank, message: self.ending.take(Failure(**message["failure"]), message["at_once"]),
            "status": lambda rank, message: role.set_status(message["rank"], message["status"]),
            "bye": self._on_bye,
            "moved": self._on_moved,
        }

    def _on_join(self, rank: int, message: Message) -> None:
        """Becomes the hub, because a member joins: a new one, or one that has lost its hub."""
        # Statuses that this rank has not seen itself, and would miss when it disconnects from the old hub.
        told = {int(absent): status for absent, status in message["statuses"].items()}
        dead = [r for r, status in told.items() if (self._peers[r].state.status, status) == ("living", "dead")]
        self._role.on_join(told)
        self._role = self._hub
        self._peers.take_state(rank, message)
        self._hub.welcome(rank)
        for absent in dead:
            self._hub.judge_death(absent)

    def _on_lost(self, connection: Connection) -> None:
        if connection in self._links.everyone():
            self._role.lose(connection.rank)

    def _on_bye(self, rank: int, message: Message) -> None:
        self._peers[rank].why = message["why"]
        self._role.set_status(rank, "left")
        self._role.forget(rank)

    def _on_moved(self, rank: int, message: Message) -> None:
        self._links.drop_caller(rank)
        self._role.on_moved(rank, int(message["to"]))

    def _on_thrown_out(self) -> None:
        """Handles a collective that failed on this rank, or on one that reports to it."""
        self._own.failed_at = self._own.failed_at or time.monotonic()
        self._role.ask({"type": "thrown_out"})

    def _answer(self, names: list[str]) -> None:
        self._role.ask({"type": "answer", "state": self._own.full_state(names)})

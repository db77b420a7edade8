"""Signals that ask a job to leave the machine: all ranks agree on a step, save, and leave.

Slurm sends SIGTERM, or whatever `--signal` says (often SIGUSR1), some time before it kills; Kubernetes sends SIGTERM.
It may reach all ranks or one, and each of them twice (from the scheduler, and from a launcher that passes it on).
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import numpy as np

from hvdkit import collectives, world
from hvdkit.compat import call_stack
from hvdkit.optimizers import heartbeat
from hvdkit.outcome import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_POLL_EVERY = 16  # executions, where no heartbeat carries the wish


class Preempted(SystemExit):
    """A signal asked the job to leave, and what it had to lose is saved: the process leaves with exit code 85.

    Attributes:
        message: what happened.
        agreed: all ranks leave at this step; otherwise the others must be told.
    """

    def __init__(self, message: str, agreed: bool = True) -> None:
        super().__init__(PREEMPTED)
        self.message = message
        self.agreed = agreed

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def leaving_at_once(signals: Iterable[int] = SIGNALS) -> Iterator[None]:
    """Raises `Preempted` where a signal comes: for parts of a job in which there is nothing to save.

    A `Listener` takes over while it listens.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise Preempted(f"{signal.Signals(number).name} came while nothing was to be saved", agreed=False)

    before = {number: signal.signal(number, leave) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Listener:
    """Hears of signals while a model's `fit` runs, and of those that other ranks got.

    Args:
        model: whose `fit`. One that ends by an exception calls nobody, so it is looked for when a signal comes.
        signals: which; the first one of them is noted, and later ones change nothing. SIGINT and SIGKILL still end.

    Attributes:
        heard: name of the signal that this rank got.
    """

    def __init__(self, model: Any, signals: Iterable[int] = SIGNALS) -> None:
        self._model = model
        self.heard: str | None = None
        self._signals = tuple(signals)
        self._before: dict[int, Any] = {}
        self._executions = 0
        self._proven = 0.0

    def start(self) -> None:
        """Listens, if this is the main thread: Python lets no other one."""
        self._executions, self._proven = 0, heartbeat.current().read()[0] if world.size() > 1 else 0.0
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._note) for number in self._signals}

    def stop(self) -> None:
        """Gives the signals back to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def after_execution(self) -> bool:
        """Whether some rank heard a signal: the same answer on all ranks, after the same step."""
        if world.size() == 1:
            return self.heard is not None
        beat = heartbeat.current()
        if self.heard:
            beat.wish_to_leave()
        self._executions += 1
        if beat.read()[0] > self._proven:  # gradients travel with a heartbeat; tf.distribute's do not
            return beat.leaving() > 0
        return self._executions % _POLL_EVERY == 0 and self.ask_all()

    def ask_all(self) -> bool:
        """The same, at a moment when nothing else is exchanged; a collective call."""
        if world.size() == 1:
            return self.heard is not None
        return bool(collectives.allreduce_sum(np.array([float(self.heard is not None)]), name="preemption")[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if call_stack.locals_of("fit", self._model, ()) is None:
            self.stop()
            os.kill(os.getpid(), number)  # to whom it belongs
            return
        self.heard = self.heard or signal.Signals(number).name

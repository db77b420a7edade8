"""Signals that preempt a job: all ranks agree on a step, save a checkpoint, and exit.

Slurm sends SIGTERM, or the signal in `--signal` (often SIGUSR1), some time before it kills. Kubernetes sends SIGTERM.
The signal may reach all ranks or only one, and a rank may get it twice: from the scheduler, and from a launcher that
forwards it.
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
_POLL_EVERY = 16  # executions between collective checks, if no heartbeat carries the stop request


class Preempted(SystemExit):
    """A signal preempted the job, and its state is saved: the process exits with code 85.

    Attributes:
        message: what happened.
        agreed: whether all ranks exit at this step; otherwise the other ranks must be told.
    """

    def __init__(self, message: str, agreed: bool = True) -> None:
        super().__init__(PREEMPTED)
        self.message = message
        self.agreed = agreed

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def leaving_at_once(signals: Iterable[int] = SIGNALS) -> Iterator[None]:
    """Raises `Preempted` as soon as a signal arrives: for parts of a job in which there is nothing to save.

    While a `Listener` is active, it handles the signals instead.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise Preempted(f"{signal.Signals(number).name} arrived while there was nothing to save", agreed=False)

    before = {number: signal.signal(number, leave) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Listener:
    """Receives signals while a model's `fit` runs, and learns which other ranks have received one.

    Args:
        model: the model that `fit` trains. A `fit` that ends with an exception calls no hook, so each signal checks
            whether `fit` still runs. None for a loop that calls `stop` in any case.
        signals: the signals to receive. The first is recorded and later ones are ignored. SIGINT and SIGKILL still end
            the process.

    Attributes:
        heard: name of the signal that this rank received.
    """

    def __init__(self, model: Any, signals: Iterable[int] = SIGNALS) -> None:
        self._model = model
        self.heard: str | None = None
        self._signals = tuple(signals)
        self._before: dict[int, Any] = {}
        self._executions = 0
        self._proven = 0.0

    def start(self) -> None:
        """Installs the handlers, if this is the main thread: Python allows it in no other thread."""
        self._executions, self._proven = 0, heartbeat.current().read()[0] if world.size() > 1 else 0.0
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._note) for number in self._signals}

    def stop(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def after_execution(self) -> bool:
        """Whether some rank received a signal: the same answer on all ranks, after the same step."""
        if world.size() == 1:
            return self.heard is not None
        beat = heartbeat.current()
        if self.heard:
            beat.wish_to_leave()
        self._executions += 1
        if beat.read()[0] > self._proven:  # hvdkit's gradient allreduce carries a heartbeat; tf.distribute's does not
            return beat.leaving() > 0
        return self._executions % _POLL_EVERY == 0 and self.ask_all()

    def ask_all(self) -> bool:
        """Like `after_execution`, with an allreduce of its own. A collective call."""
        if world.size() == 1:
            return self.heard is not None
        return bool(collectives.allreduce_sum(np.array([float(self.heard is not None)]), name="preemption")[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._model is not None and call_stack.locals_of("fit", self._model, ()) is None:
            self.stop()
            os.kill(os.getpid(), number)  # for the previous handler
            return
        self.heard = self.heard or signal.Signals(number).name

"""Signals that preempt a job: all ranks agree on a step, save a checkpoint, and exit.

Slurm sends SIGTERM, or the signal in `--signal` (often SIGUSR1), some time before it kills. Kubernetes sends SIGTERM.
The signal may reach all ranks or only one, and a rank may get it twice: from the scheduler, and from a launcher that
forwards it.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import numpy as np

from hvdkit import collectives, watchdog, world
from hvdkit.compat import call_stack
from hvdkit.optimizers import heartbeat
from hvdkit.signals import SIGNALS

_POLL_EVERY = 16  # executions between collective checks, if neither a heartbeat nor a watchdog carries the stop request


class Listener:
    """Receives signals while a model's `fit` runs, and learns which other ranks have received one.

    Python runs a signal's handler when the main thread returns from TensorFlow, which an execution of many steps
    delays. So a thread learns of the signal meanwhile, and the heartbeat of the next step already carries the request:
    all ranks stop after the execution in which it arrived.

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
        self._early: _EarlyNotice | None = None
        self._executions, self._has_told = 0, False
        self._proven = 0.0

    def start(self) -> None:
        """Installs the handlers, if this is the main thread: Python allows it in no other thread."""
        self._executions, self._has_told = 0, False
        self._proven = heartbeat.current().read()[0] if world.size() > 1 else 0.0
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._note) for number in self._signals}
            if world.size() > 1:
                self._early = _EarlyNotice(self._signals, heartbeat.current().wish_to_leave)

    def stop(self) -> None:
        """Restores the previous signal handlers."""
        if self._early:
            self._early.close()
            self._early = None
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        watchdog.forget_leaving()

    def after_execution(self) -> bool:
        """Whether some rank received a signal: the same answer on all ranks, after the same step.

        The request travels with the gradients; in an execution that exchanges none (local SGD between two
        synchronizations, `tf.distribute`) by the watchdogs, and without these in a collective now and then.
        """
        if world.size() == 1:
            return self.heard is not None
        beat = heartbeat.current()
        if self.heard:
            beat.wish_to_leave()
        self._executions += 1
        is_time = watchdog.is_time_to_leave(self._executions)
        proven, before = beat.read()[0], self._proven
        self._proven = proven
        if is_time or proven != before:
            return is_time or beat.leaving() > 0
        if not watchdog.is_there():
            return self._executions % _POLL_EVERY == 0 and self.ask_all()
        if self.heard and not self._has_told:
            self._has_told = True
            watchdog.tell_to_leave()
        return False

    def ask_all(self) -> bool:
        """Like `after_execution`, with an allreduce of its own. A collective call."""
        return self.ask_all_whether(False)[0]

    def ask_all_whether(self, mine: bool) -> tuple[bool, bool]:
        """Like `ask_all`, and in the same allreduce whether `mine` is true on some rank. A collective call."""
        said = np.array([self.heard is not None, mine], np.float64)
        if world.size() > 1:
            said = collectives.allreduce_sum(said, name="preemption")
        return bool(said[0]), bool(said[1])

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._model is not None and call_stack.locals_of("fit", self._model, ()) is None:
            self.stop()
            os.kill(os.getpid(), number)  # for the previous handler
            return
        self.heard = self.heard or signal.Signals(number).name


class _EarlyNotice:
    """Calls a function in a thread of its own as soon as a signal arrives, whatever the main thread does.

    Args:
        signals: numbers of signals that have a handler in Python.
        call: what to call.
    """

    def __init__(self, signals: Iterable[int], call: Callable[[], None]) -> None:
        self._signals, self._call = frozenset(signals), call
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._wait, name="hvdkit-signals", daemon=True).start()

    def close(self) -> None:
        """Ends the thread."""
        current = signal.set_wakeup_fd(-1)
        with contextlib.suppress(ValueError):  # its owner has closed it
            signal.set_wakeup_fd(self._before if current == self._writer.fileno() else current)
        self._writer.close()

    def _wait(self) -> None:
        with self._reader:
            while arrived := self._reader.recv(64):  # the numbers of signals, one byte each
                if self._signals.intersection(arrived):
                    self._call()

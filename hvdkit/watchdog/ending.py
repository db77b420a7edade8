"""How this process ends when the job fails: it has a few seconds to exit by itself, then the watchdog ends it."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from hvdkit.watchdog.states import Failure

_GRACE = 5.0  # seconds for a rank to exit by itself when another has failed
_LAST_WORDS = 2.0  # seconds to show the failure


class Ending:
    """The job's failure as this rank knows it, and how this process ends because of it.

    Args:
        rank: this rank.
        elastic: whether the job continues without a lost rank.
        end_process: ends this process with an exit code, whatever its other threads do.
        flush: sends the messages that other ranks must still receive.

    Attributes:
        failure: the first failure; later ones follow from it and are ignored.
        known: set with `failure`.
        explanation: which tensors the ranks had in a collective that Horovod rejected.
        explained: set with `explanation`.
    """

    def __init__(self, rank: int, elastic: bool, end_process: Callable[[int], Any], flush: Callable[[], None]) -> None:
        self.failure: Failure | None = None
        self.known = threading.Event()
        self.explanation: str | None = None
        self.explained = threading.Event()
        self._rank = rank
        self._elastic = elastic
        self._end_process = end_process
        self._flush = flush
        self._has_left = False
        self._exit_at: tuple[float, int] | None = None  # monotonic time, exit code
        self._deadline: threading.Timer | None = None

    @property
    def seconds_left(self) -> float:
        """Seconds until the process must exit; infinite if it need not."""
        return self._exit_at[0] - time.monotonic() if self._exit_at else float("inf")

    def take(self, failure: Failure, at_once: bool) -> None:
        """Records a failure; `at_once` if no rank can exit by itself."""
        if self.failure or self._has_left:
            return
        self.failure = failure
        self.known.set()
        self.explain(None)
        if not self._lets_alone(failure, at_once):
            self._exit_at = (time.monotonic() + (0.0 if at_once else _GRACE), failure.code)

    def leave(self) -> None:
        """Ignores failures from now on: this rank leaves a job that has not failed, and its process may go on.

        The watchdog's thread may live longer than the call that ends it, on a machine under load.
        """
        self._has_left = self.failure is None

    def explain(self, text: str | None) -> None:
        """Records why Horovod rejected a collective."""
        self.explanation = text
        self.explained.set()

    def make_sure(self, failure: Failure, at_once: bool) -> None:
        """Ends the process in time even if showing the failure blocks, for example on a full pipe."""
        if not self._lets_alone(failure, at_once) and not self._has_left:
            self._end_within(_LAST_WORDS + (0.0 if at_once else _GRACE), failure.code)

    def keep_time(self) -> None:
        """Ends the process when its time is over: a main thread inside a collective cannot be interrupted."""
        if self._exit_at is None or time.monotonic() < self._exit_at[0]:
            return
        _, code = self._exit_at
        self._end_within(_LAST_WORDS, code)
        self._flush()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self._exit_at = None
        if self._deadline:
            self._deadline.cancel()
        self._end_process(code)

    def release(self) -> None:
        """Wakes all waiting threads: the watchdog ends and will learn nothing more."""
        self.known.set()
        self.explained.set()

    def _lets_alone(self, failure: Failure, at_once: bool) -> bool:
        return failure.rank == self._rank or (self._elastic and not at_once)

    def _end_within(self, seconds: float, code: int) -> None:
        """Ends the process after `seconds`, even if another thread holds the lock of a stream."""
        if self._deadline:
            self._deadline.cancel()
        self._deadline = threading.Timer(seconds, self._end_process, [code])
        self._deadline.daemon = True
        with contextlib.suppress(RuntimeError):  # Python 3.12 starts no threads while it shuts down
            self._deadline.start()

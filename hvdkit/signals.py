"""The signals that tell a job to stop, before there is anything to save: while it loads, reads data, builds a model.

Slurm sends SIGTERM, or the signal in `--signal` (often SIGUSR1), some time before it kills. Kubernetes sends SIGTERM.
Training itself listens with `hvdkit.checkpoint.preemption`, which saves first. This module imports only the standard
library, so a job can use it before it loads TensorFlow.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from hvdkit.outcome import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


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

    Only the first signal raises: a scheduler and a launcher may both send one, and the second must not interrupt the
    clean-up. While a `preemption.Listener` is active, it handles the signals instead.
    """
    is_leaving = False

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal is_leaving
        if not is_leaving:
            is_leaving = True
            raise Preempted(f"{signal.Signals(number).name} arrived while there was nothing to save", agreed=False)

    with _handled_by(leave, signals):
        yield


@contextlib.contextmanager
def exiting_at_once(signals: Iterable[int] = SIGNALS) -> Iterator[None]:
    """Ends the process with exit code 85 as soon as a signal arrives: for imports, which may swallow an exception."""
    with _handled_by(lambda number, frame: os._exit(PREEMPTED), signals):
        yield


def ignore(signals: Iterable[int] = SIGNALS) -> None:
    """Ignores the signals from now on: the process is about to exit, and its exit code must not change."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], Any], signals: Iterable[int]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)

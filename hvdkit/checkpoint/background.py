"""Writes checkpoints in a thread, while training continues."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hvdkit import outcome
from hvdkit.checkpoint.store import Damaged

_log = logging.getLogger(__name__)


class Writer:
    """Writes one checkpoint at a time, in the background.

    Attributes:
        error: why the last checkpoint could not be written; None if it was.
        written: the last checkpoint that was written.
        count: how many were written.
        seconds: how long writing took in total.
        processor_seconds: processor time that the last one took, written or not.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.written: Path | None = None
        self.count = 0
        self.seconds = self.processor_seconds = 0.0
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, write: Callable[[], Path]) -> None:
        """Starts to write, after the previous checkpoint is written.

        Args:
            step: steps trained, for messages.
            write: writes the checkpoint and returns its folder.
        """
        self.wait()
        # Not a daemon thread: a program that exits waits until the checkpoint is written.
        self._thread = threading.Thread(target=self._run, args=(step, write), name="hvdkit-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _run(self, step: int, write: Callable[[], Path]) -> None:
        began, used = time.perf_counter(), time.thread_time()
        try:
            self.written, self.error = write(), None
            self.count += 1
            self.seconds += time.perf_counter() - began
        except (OSError, Damaged, ValueError, TypeError, MemoryError) as error:
            self.error = error
            why = f"{type(error).__name__}: {error}"
            outcome.tell(outcome.Unsaved(step, why))
            last = f"the last good one is {self.written}" if self.written else "none has been written in this run"
            _log.warning(
                f"The checkpoint of step {step} could not be written ({why}). Training continues; {last}. Free space "
                f"or fix the disk; the next checkpoint is tried as usual."
            )
        finally:
            self.processor_seconds = time.thread_time() - used

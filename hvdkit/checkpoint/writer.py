"""The thread that writes checkpoints while training goes on."""

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
        error: why the last one could not be written; None if it could.
        written: the last one that could be.
        count: how many were written.
        seconds: how long that took, all together.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.written: Path | None = None
        self.count = 0
        self.seconds = 0.0
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, write: Callable[[], Path]) -> None:
        """Begins to write, when the one before is done.

        Args:
            step: steps trained, for messages.
            write: does it, and returns the folder.
        """
        self.wait()
        # Not a daemon: a program that ends while it writes waits for it.
        self._thread = threading.Thread(target=self._run, args=(step, write), name="hvdkit-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _run(self, step: int, write: Callable[[], Path]) -> None:
        began = time.perf_counter()
        try:
            self.written, self.error = write(), None
            self.count += 1
            self.seconds += time.perf_counter() - began
        except (OSError, Damaged, ValueError, TypeError, MemoryError) as error:
            self.error = error
            outcome.tell(outcome.Unsaved(step, f"{type(error).__name__}: {error}"))
            last = f"the last good one is {self.written}" if self.written else "none has been written in this run"
            _log.warning(
                "The checkpoint of step %d could not be written (%s: %s). Training goes on; %s. Make room or mend the "
                "disk; the next checkpoint is tried as usual.",
                step, type(error).__name__, error, last,
            )  # fmt: skip

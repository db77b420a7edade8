"""`PulseCallback`: a file whose time tells from outside that a training moves."""

import time
from pathlib import Path

import keras


class PulseCallback(keras.callbacks.Callback):
    """Touches a file while steps of training or evaluation are taken: whoever watches need not know the process.

    Args:
        path: the file; its content is empty, its time of change counts.
        every: seconds between two touches, at least.
    """

    checkpointed = False

    def __init__(self, path: Path, every: float = 2.0) -> None:
        super().__init__()
        self._path = path
        self._every = every
        self._last = -every

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Beats."""
        self._beat()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Beats."""
        self._beat()

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Beats."""
        self._beat()

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._path.touch()

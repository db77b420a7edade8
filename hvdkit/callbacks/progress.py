"""`ProgressCallback`: one line with samples/s, loss, accuracy and time left."""

import os
import sys
import time
from typing import Any

import keras
from tqdm import tqdm


class ProgressCallback(keras.callbacks.Callback):
    """Shows one progress line for the whole training, and measures its speed.

    Metrics shown within an epoch are those of this rank; the line of a finished epoch shows those of all ranks.

    Args:
        steps: steps in all.
        steps_per_epoch: steps an epoch.
        global_batch: examples a step, over all replicas.
        show: draw the line; the speed is measured in any case.

    Attributes:
        samples_per_second: global examples a second, from the end of the first execution (which traces and compiles) to
            the end of the last step of training, with everything in between. A training that was interrupted is
            measured in each of its runs so.
    """

    def __init__(self, steps: int, steps_per_epoch: int, global_batch: int, show: bool = True) -> None:
        super().__init__()
        self.samples_per_second = 0.0
        self._steps = steps
        self._epochs = -(-steps // steps_per_epoch)
        self._steps_per_epoch = steps_per_epoch
        self._global_batch = global_batch
        self._show = show
        self._epoch = 0
        self._started: tuple[float, int] | None = None  # time and steps at the end of the first execution
        self._now = (0.0, 0)  # seconds and steps since then
        self._earlier = (0.0, 0)  # the same, of runs before this one
        self._seconds_earlier = 0.0
        self._began = self._ended = 0.0

    @property
    def seconds(self) -> float:
        """How long training has taken, with all its interrupted runs."""
        return self._seconds_earlier + (self._ended or time.perf_counter()) - self._began

    def checkpoint_state(self) -> dict[str, Any]:
        """What was measured so far."""
        seconds, steps = self._now[0] + self._earlier[0], self._now[1] + self._earlier[1]
        return {"seconds": self.seconds, "measured": (seconds, steps)}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Undoes `checkpoint_state`."""
        self._seconds_earlier, self._earlier = state["seconds"], state["measured"]
        self._rate()

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Draws the empty line."""
        self._began, self._ended = time.perf_counter(), 0.0
        # A launcher that knows of a terminal behind the pipe says so. A file gets a line an epoch instead of a bar.
        watched = sys.stderr.isatty() or os.environ.get("HVDKIT_PROGRESS") == "bar"
        self._bar = tqdm(
            total=self._steps * self._global_batch,
            unit=" samples",
            unit_scale=True,
            mininterval=0.5,
            disable=not (self._show and watched),
            dynamic_ncols=True,
            file=sys.stderr,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {rate_fmt}, {remaining} left{postfix}",
        )
        self._describe()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Names the epoch."""
        self._epoch = epoch
        self._describe()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Moves the line on to the end of step `batch` (from 0) of this epoch."""
        steps = self._epoch * self._steps_per_epoch + batch + 1
        if self._started is None:
            self._started = (time.perf_counter(), steps)
        elif steps > self._started[1]:
            self._now = time.perf_counter() - self._started[0], steps - self._started[1]
            self._rate()
        if not self._bar.disable:
            self._bar.set_postfix_str(_format(logs), refresh=False)
            self._bar.update(steps * self._global_batch - self._bar.n)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes the finished epoch's metrics above the line."""
        if self._show:
            left = (self._steps - (epoch + 1) * self._steps_per_epoch) * self._global_batch
            seconds = tqdm.format_interval(max(0, left) / self.samples_per_second) if self.samples_per_second else "?"
            line = f"epoch {epoch + 1}/{self._epochs}: {_format(logs)}, {self.samples_per_second:,.0f} samples/s"
            self._bar.write(f"{line}, {seconds} left", file=sys.stderr)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Leaves the finished line standing."""
        self._ended = time.perf_counter()
        self._bar.close()

    def _rate(self) -> None:
        seconds, steps = self._now[0] + self._earlier[0], self._now[1] + self._earlier[1]
        self.samples_per_second = steps * self._global_batch / seconds if seconds else 0.0

    def _describe(self) -> None:
        self._bar.set_description_str(f"epoch {self._epoch + 1}/{self._epochs}", refresh=False)


def _format(logs: dict | None) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in (logs or {}).items())

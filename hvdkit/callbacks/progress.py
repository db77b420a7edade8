"""`ProgressCallback`: one line with samples/s, loss, accuracy and time left."""

import os
import sys
import time
from typing import Any

import keras

from hvdkit import reporting

_DRAW_SECONDS = 0.5
_BAR = 20  # columns
_ERASE = "\r\x1b[2K"  # the terminal's line


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
        self._line: _Line | None = None
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
        self._line = _Line(self._steps) if self._show and _is_watched() else None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Names the epoch."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Moves the line on to the end of step `batch` (from 0) of this epoch."""
        steps = self._epoch * self._steps_per_epoch + batch + 1
        if self._started is None:
            self._started = (time.perf_counter(), steps)
        elif steps > self._started[1]:
            self._now = time.perf_counter() - self._started[0], steps - self._started[1]
            self._rate()
        if self._line and self._line.is_due():
            told = self._rate_and_time_left(steps), _format(logs)
            self._line.update(steps, f"epoch {self._epoch + 1}/{self._epochs}", ", ".join(filter(None, told)))
            self._line.draw()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes the finished epoch's metrics above the line."""
        if not self._show:
            return
        steps = min(self._steps, (epoch + 1) * self._steps_per_epoch)
        name = f"epoch {epoch + 1}/{self._epochs}"
        told = list(filter(None, (self._rate_and_time_left(steps), _format(logs))))
        finished = f"{name}: {', '.join(reversed(told))}"
        if self._line:
            self._line.update(steps, name, ", ".join(told))
            self._line.write_above(finished)
        else:
            print(finished, file=sys.stderr, flush=True)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Leaves the finished line standing."""
        self._ended = time.perf_counter()
        if self._line:
            self._line.end()

    def _rate_and_time_left(self, steps: int) -> str:
        """Returns both as a text, which is empty before the second execution ends: the first one traces."""
        if not self.samples_per_second:
            return ""
        left = (self._steps - steps) * self._global_batch
        return f"{self.samples_per_second:,.0f} samples/s, {_interval(left / self.samples_per_second)} left"

    def _rate(self) -> None:
        seconds, steps = self._now[0] + self._earlier[0], self._now[1] + self._earlier[1]
        self.samples_per_second = steps * self._global_batch / seconds if seconds else 0.0


class _Line:
    """The line on a terminal that moves in place.

    rich's own thread, which would draw it several times a second, is left out: on a rank that is bound to one core it
    would take time from training.
    """

    def __init__(self, steps: int) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn  # 0.1 s, only where it is drawn
        from rich.table import Column

        self._console = reporting.console_for(sys.stderr, is_terminal=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            TaskProgressColumn(),
            BarColumn(_BAR, complete_style="green", finished_style="green"),
            TextColumn("{task.fields[said]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            console=self._console,
            auto_refresh=False,
            expand=True,  # the last column is cut where the terminal ends: metrics may be many
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("", total=steps, said="")
        # rich would hide the cursor, and a rank that is killed could not show it again.
        self._console.show_cursor = lambda show=True: False  # type: ignore[method-assign]
        self._progress.start()
        self._is_piped = not sys.stderr.isatty()
        self._drawn = self._written = time.perf_counter()

    def is_due(self) -> bool:
        """Whether the line is to be drawn: that takes 1 ms, too much for each of many short steps."""
        return time.perf_counter() - self._drawn >= _DRAW_SECONDS

    def update(self, steps: int, name: str, said: str) -> None:
        self._progress.update(self._task, completed=steps, description=name, said=said)

    def draw(self) -> None:
        from rich.control import Control
        from rich.segment import ControlType

        self._drawn = time.perf_counter()
        self._progress.refresh()
        if self._is_piped:
            # The launcher passes on what ends in a carriage return, and knows that it is not a line of a log.
            self._console.control(Control(ControlType.CARRIAGE_RETURN))

    def write_above(self, text: str) -> None:
        """Writes a line in the place of this one, which moves down: after a short epoch when it is due, else now."""
        self._console.file.write(f"{_ERASE}{text}\n")
        self._console.file.flush()
        is_short = time.perf_counter() - self._written < _DRAW_SECONDS
        self._written = time.perf_counter()
        if not is_short:
            self.draw()

    def end(self) -> None:
        self._progress.stop()


def _is_watched() -> bool:
    """Whether a line can move: stderr is a terminal, or a launcher says that one is behind the pipe."""
    is_terminal = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return is_terminal or os.environ.get("HVDKIT_PROGRESS") == "bar"


def _interval(seconds: float) -> str:
    """As in 02:05 or 1:02:05."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def _format(logs: dict | None) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in (logs or {}).items())

"""The measurement that is the same for all peers, printed by rank 0 as one line of JSON."""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

STEPS_PER_CALL = 16
_WINDOWS = 5  # at most: where the shortest window takes longer than a fifth of the time, there are fewer


class Clock:
    """Measures windows of many steps, and in them executions, which run one step or several that look like one.

    Args:
        sees_steps: whether to measure executions. Callbacks that look at steps make some tools slower.

    Attributes:
        windows: seconds of each window.
        executions: seconds and number of steps of each execution.
    """

    def __init__(self, sees_steps: bool = False) -> None:
        self.sees_steps = sees_steps
        self.windows: list[float] = []
        self.executions: list[tuple[float, int]] = []
        self._began = self._last = 0.0

    def begin(self) -> None:
        """A window begins now, and its first execution. Each later one begins when the one before it ends."""
        self._began = self._last = time.perf_counter()

    def end_execution(self, steps: int) -> None:
        """An execution of this many steps ends now."""
        now = time.perf_counter()
        self.executions.append((now - self._last, steps))
        self._last = now

    def end(self) -> None:
        """A window ends now."""
        self.windows.append(time.perf_counter() - self._began)


def step_times(executions: Sequence[tuple[float, int]]) -> dict[str, float]:
    """Return the median and the 95th percentile of the step times, in seconds.

    The steps of an execution count as equally long, so the percentile of long executions hides single slow steps.
    `steps_per_execution` says how many steps most executions had.

    Args:
        executions: seconds and number of steps of each; at least one.
    """
    steps = sorted(seconds / number for seconds, number in executions for _ in range(number))
    return {
        "median": statistics.median(steps),
        "percentile_95": steps[-(-95 * len(steps) // 100) - 1],  # nearest rank
        "steps_per_execution": statistics.mode(number for _, number in executions),
        "steps": len(steps),
    }


def callback(keras: Any, clock: Clock) -> Any:
    """Create a callback for Keras 2 or 3 that measures each epoch as a window."""

    class Epochs(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            clock.begin()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            clock.end()

    class Steps(Epochs):
        sees_executions = True  # hvdkit: joined steps need not be divided for this callback

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            super().on_epoch_begin(epoch)
            self.done = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            clock.end_execution(batch + 1 - self.done)  # `batch` is the last one of the execution
            self.done = batch + 1

    return Steps() if clock.sees_steps else Epochs()


def measure(
    run: Callable[[int, int, Clock], Any],
    agree: Callable[[float], float],
    *,
    workload: str,
    rank: int,
    global_batch: int,
    weights: int,
) -> None:
    """Time some windows for samples per second, and as many steps once more for step times.

    Args:
        run: trains as many windows as the second number says, of as many steps as the first one says, and has the clock
            measure them.
        agree: returns the same number on all ranks, given a number that may differ among them.
        workload: its name.
        rank: this process's; rank 0 prints the result.
        global_batch: examples per step of all ranks together.
        weights: number of the model's trainable weights.
    """

    def windows(steps: int, number: int, sees_steps: bool = False) -> Clock:
        clock = Clock(sees_steps)
        run(steps, number, clock)
        return clock

    windows(STEPS_PER_CALL, 2)  # traces and compiles
    seconds = float(os.environ["HVDKIT_BENCH_SECONDS"])
    steps, number = _windows_in(seconds, lambda steps: agree(windows(steps, 1).windows[0]))
    rates = [steps * global_batch / taken for taken in windows(steps, number).windows]
    times = step_times(windows(steps, number, sees_steps=True).executions)
    if rank == 0:
        found = {"workload": workload, "weights": weights, "samples_per_second": rates, "step_seconds": times}
        print("BENCH " + json.dumps(found), flush=True)


def _windows_in(seconds: float, time_of: Callable[[int], float]) -> tuple[int, int]:
    """Return the steps of a window, a multiple of `STEPS_PER_CALL`, and how many windows take about this long.

    The first steps may be slow.
    """
    steps, wanted = STEPS_PER_CALL, seconds / _WINDOWS
    while (taken := time_of(steps)) < wanted / 4:
        steps *= 2
    chosen = max(1, round(steps * wanted / taken / STEPS_PER_CALL)) * STEPS_PER_CALL
    return chosen, min(_WINDOWS, max(1, round(seconds * steps / taken / chosen)))

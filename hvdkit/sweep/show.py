"""The output of a sweep: a live table on a terminal, plain lines elsewhere, and a table at the end."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Group
from rich.live import Live
from rich.text import Text

from hvdkit import reporting
from hvdkit.sweep import space, tasks
from hvdkit.sweep.coordinator import Coordinator
from hvdkit.sweep.options import Options
from hvdkit.sweep.study import Trial

_DRAW_SECONDS = 0.5
_MOST_ROWS = 30  # of the table at the end; result.json contains all trials


class Screen:
    """Print lines, and on a terminal draw the running tasks below them.

    Args:
        options: the options of the sweep.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._console = reporting.console_for(sys.stderr)
        self._began = self._drawn = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line about an event."""
        if self._console.is_terminal:
            self._console.print(text, soft_wrap=True)
        else:
            print(f"{time.monotonic() - self._began:7.1f} s  {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def live(self, coordinator: Coordinator) -> Iterator[Callable[[], None]]:
        """Yield a function that redraws the running tasks; call it repeatedly while the sweep runs."""
        if not self._console.is_terminal:
            yield lambda: None
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as live:

            def draw() -> None:
                if time.monotonic() - self._drawn > _DRAW_SECONDS:
                    self._drawn = time.monotonic()
                    live.update(self._tasks(coordinator), refresh=True)

            yield draw

    def _tasks(self, coordinator: Coordinator) -> Group:
        rows = []
        for task in list(coordinator.running()):
            if task.current is None:
                continue
            epochs = tasks.history(task.current.folder, f"val_{self._options.goal}")
            epochs = epochs or tasks.history(task.current.folder, self._options.goal)
            rows.append(
                [
                    task.name,
                    task.current.slot.name,
                    len(epochs),
                    f"{epochs[-1]:.4f}" if epochs else "",
                    f"{task.current.seconds():.0f}",
                    space.words(coordinator.open[task.trial][0].values) if task.trial in coordinator.open else "",
                ]
            )
        heads = ["task", "slot", "epoch", self._options.goal, "seconds", "flags"]
        return Group(reporting.draw(self._console, heads, rows), Text(self._summary(coordinator)))

    def _summary(self, coordinator: Coordinator) -> str:
        busy, slots = len(coordinator.running()), len(coordinator.slots())
        done = coordinator.ended
        text = f"{sum(done.values())} of {coordinator.number} trials over, {busy} of {slots} slots busy"
        text += "".join(f", {number} {state}" for state, number in done.items() if number and state != "done")
        best = coordinator.best
        return text + (f"; best {best.value:.4f}, trial {best.number}: {space.words(best.values)}" if best else "")


def final_table(trials: Sequence[Trial], options: Options) -> str:
    """Return a table of the best trials, at most `_MOST_ROWS`, the best one first."""
    sign = -1.0 if options.direction == "maximize" else 1.0

    def order(trial: Trial) -> tuple[bool, float, int]:
        return trial.state != "done", sign * (trial.value or 0.0), trial.number

    names = [parameter.flag for parameter in options.parameters]
    folds = [f"fold {fold}" for fold in range(options.folds)]
    heads = ["trial", *names, "state", options.goal, *folds, "seconds", "tries", "host"]
    rows = []
    for trial in sorted(trials, key=order)[:_MOST_ROWS]:
        each = trial.notes.get("values", []) if options.folds else []
        rows.append(
            [
                trial.number,
                *(space.short(trial.values.get(name, "")) for name in names),
                trial.state,
                "" if trial.value is None else f"{trial.value:.4f}",
                *([f"{value:.4f}" for value in each] or [""] * options.folds),
                f"{trial.notes.get('seconds', 0.0):.1f}",
                trial.notes.get("tries", 0),
                " ".join(trial.notes.get("hosts", [])),
            ]
        )
    more = f"\n... and {len(trials) - _MOST_ROWS} more, in result.json" if len(trials) > _MOST_ROWS else ""
    return reporting.table(heads, rows) + more

"""What this rank is doing now, written by the training thread and read by the watchdog's thread.

Nothing here takes a lock, reads a clock or makes a system call. The marks are set in every step, so they must cost
less than a microsecond.
"""

import collections
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from hvdkit.watchdog.meeting import Meeting

# Outside of these phases a rank has no time limit: it loads data, builds a model, or is done.
BUSY = ("training", "evaluating")

MOST_NAMES = 10_000  # limit of collectives whose calls are counted

# [shape, dtype name, variable path] for each tensor. A dimension that may differ is None, as is the dtype of no tensor.
Signature = list[list[Any]]


class Progress:
    """Phase, epoch, step and collective of this rank.

    Attributes:
        marks: increases whenever the rank makes progress; a value that stays the same means a stall.
        phase: "between", or one of `BUSY`.
        epoch: number of the epoch from 0, None before the first step.
        step: number of the step in the epoch from 0, None before the first step.
        waits: the collectives that the rank is in, the innermost last.
        last: the last collective that it finished.
        calls: how often this rank has entered each collective that all ranks must enter, the most recent last.
        traced: the signatures of each collective in graphs, in the order in which they were first traced.
        meeting: the execution after which all ranks leave the training.
    """

    def __init__(self) -> None:
        self.marks = 0
        self.phase = "between"
        self.epoch: int | None = None
        self.step: int | None = None
        self.waits: list[Waiting] = []
        self.last: Waiting | None = None
        self.calls: collections.OrderedDict[str, int] = collections.OrderedDict()
        self.traced: dict[str, list[Signature]] = {}
        self.meeting = Meeting()

    def begin(self) -> None:
        """Resets everything that belongs to an earlier world."""
        self.phase, self.epoch, self.step = "between", None, None
        self.waits.clear()
        self.last = None
        self.calls.clear()
        self.traced.clear()
        self.meeting.clear()

    def count(self, name: str) -> None:
        """Counts a call of a collective that all ranks must enter."""
        self.calls[name] = self.calls.pop(name, 0) + 1  # moves it to the end
        if len(self.calls) > MOST_NAMES:
            self.calls.popitem(last=False)

    @property
    def inside(self) -> str | None:
        """The collective for all ranks in which the main thread waits; None if it is in none."""
        main = threading.main_thread().ident
        return next((w.name for w in reversed(self.waits.copy()) if w.everyone and w.thread == main), None)

    @property
    def busy(self) -> bool:
        """Whether the other ranks may be waiting for this one."""
        return bool(self.waits) or self.phase in BUSY

    def sign(self, name: str, signature: Sequence[tuple[Any, Any, str]]) -> int | None:
        """Records a collective's signature and returns its number; None if it is already known."""
        plain = [[_dimensions(shape), _name(dtype), path] for shape, dtype, path in signature]
        known = self.traced.setdefault(name, [])
        if plain in known:
            return None
        known.append(plain)
        return len(known) - 1


class Waiting:
    """A context that marks this rank as being inside a collective.

    Args:
        progress: the rank's progress.
        name: the collective's name, the same on all ranks.
        detail: shapes and dtypes of this rank's tensors, for the report; converted with `str` only if needed.
        everyone: whether all ranks of the job must enter it.
    """

    __slots__ = ("detail", "everyone", "name", "progress", "thread")

    def __init__(self, progress: Progress, name: str, detail: object = "", everyone: bool = False) -> None:
        self.everyone = everyone
        self.progress = progress
        self.name = name
        self.detail = detail

    def __enter__(self) -> None:
        self.thread = threading.get_ident()
        if self.everyone:
            self.progress.count(self.name)
        self.progress.waits.append(self)
        self.progress.marks += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self in self.progress.waits:  # `begin` may have cleared the list meanwhile
            self.progress.waits.remove(self)
        self.progress.last = self
        self.progress.marks += 1


def _name(dtype: Any) -> str | None:
    return None if dtype is None else getattr(dtype, "name", str(dtype))


def _dimensions(shape: Any) -> list[int | None] | None:
    if shape is None or getattr(shape, "rank", 0) is None:
        return None
    return [None if n is None else int(n) for n in shape]

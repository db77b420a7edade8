"""A task: one training of a trial, with its folder, its tries, and what its files tell of it."""

import csv
import dataclasses
import json
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

from hvdkit.sweep.hosts import Slot, SweepHost
from hvdkit.sweep.runs import Run

_LAST_BYTES = 1 << 14  # of a log, to find in it what went wrong
# What a log begins with: the command, and what TensorFlow writes when it is loaded.
_BEGIN = re.compile(r"\$ |WARNING: All log|[IWE]\d{4} |To enable the following")


@dataclasses.dataclass
class Try:
    """A task's process and what the sweep knows of it.

    Attributes:
        run: the process.
        slot: where it runs.
        folder: its workdir.
        began: by the monotonic clock.
        why: the reason for which the sweep ends it; empty as long as it does not.
        ended_at: when it was told so.
    """

    run: Run
    slot: Slot
    folder: Path
    began: float = dataclasses.field(default_factory=time.monotonic)
    why: str = ""
    ended_at: float = 0.0
    _seen: Any = None
    _moved: float = dataclasses.field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self.began

    def still_for(self) -> float:
        """Seconds since a file of it has changed. Other hosts' clocks do not matter: it is change that counts."""
        seen = _states(self.folder)
        if seen != self._seen:
            self._seen, self._moved = seen, time.monotonic()
        return time.monotonic() - self._moved


@dataclasses.dataclass
class Task:
    """One training of a trial.

    Attributes:
        trial: the trial's number.
        fold: the fold that it tests on; None for the whole training split.
        folder: of all its tries.
        flags: of the training, apart from those that say where it writes.
        current: the try that runs.
        failures: how many tries have failed.
        avoided: hosts on which they did.
        result: the content of `result.json`, once it is done.
        hosts: where its tries ran, in order.
        seconds: of all tries.
        last: what the log said when a try failed.
    """

    trial: int
    fold: int | None
    folder: Path
    flags: list[str]
    current: Try | None = None
    failures: int = 0
    avoided: set[SweepHost] = dataclasses.field(default_factory=set)
    result: dict[str, Any] | None = None
    hosts: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    last: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return f"trial {self.trial}" + ("" if self.fold is None else f", fold {self.fold}")

    def tries(self) -> list[Path]:
        """The folders of its tries so far, in order; those of a sweep before this one, too."""
        return sorted(self.folder.glob("try-*"), key=lambda path: int(path.name.partition("-")[2]))

    def find_result(self) -> bool:
        """Whether a try has finished; a result is whole, or not there."""
        for folder in reversed(self.tries()):
            if (folder / "result.json").is_file():
                self.result = {**json.loads((folder / "result.json").read_text()), "folder": str(folder)}
                return True
        return False

    def next_try(self) -> tuple[Path, list[str]]:
        """A folder for a new try, and the flags that say so. It goes on from the last checkpoint of those before it.

        Each try has a folder of its own: one that was given up may write on for a moment, on a host that is cut off.
        """
        before = self.tries()
        number = int(before[-1].name.partition("-")[2]) + 1 if before else 1
        folder = self.folder / f"try-{number}"
        (folder / "logs").mkdir(parents=True)
        saved = next((path for path in reversed(before) if has_checkpoint(path)), None)
        return folder, [f"--workdir={folder}", *([f"--resume={saved}"] if saved else [])]

    def clean(self, *, keep_model: bool) -> None:
        """Removes what nobody needs of a task that is over: checkpoints, and models that are not the best."""
        for folder in self.tries():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            if not keep_model:
                (folder / "model.keras").unlink(missing_ok=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether a try has left an intact checkpoint."""
    from hvdkit.checkpoint import store

    return store.newest(folder / "checkpoints") is not None


def history(folder: Path, column: str) -> list[float]:
    """A column of a try's `history.csv`, a number an epoch; a line that is being written is left out."""
    try:
        text = (folder / "history.csv").read_text()
    except FileNotFoundError:
        return []
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    # Keras' CSVLogger writes NA where an epoch lacks a column that others have.
    return [float(row[column]) for row in rows if row.get(column) not in (None, "", "NA")]


def value(result: dict[str, Any], goal: str) -> float:
    """What a training has reached; NaN where it has not."""
    found = result.get(f"test_{goal}")
    return math.nan if found is None else float(found)


def outcome_file(folder: Path) -> Path:
    """Where a try tells how it ends; see `hvdkit.outcome`."""
    return folder / "logs" / "outcome.jsonl"


def last_words(log: Path) -> str:
    """The last line of a log that says something: of a try that ended without telling how."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _LAST_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip() and not _BEGIN.match(line)]
    return said[-1] if said else ""


def _states(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    for path in sorted([*folder.glob("*"), *folder.glob("logs/*"), *folder.glob("checkpoints/*")]):
        try:
            state = path.stat()
        except FileNotFoundError:
            continue
        found.append((str(path), state.st_mtime_ns, state.st_size))
    return found

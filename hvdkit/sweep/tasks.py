"""A task: one training of a trial, with its folder, its tries, and the state that its files show."""

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

_LAST_BYTES = 1 << 14  # end of a log in which to look for the error
# The first lines of a log: the command, and what TensorFlow writes when it is imported.
_BEGIN = re.compile(r"\$ |WARNING: All log|[IWE]\d{4} |To enable the following")


@dataclasses.dataclass
class Try:
    """A task's process and its state.

    Attributes:
        run: the process.
        slot: where it runs.
        folder: its workdir.
        began: monotonic time of its start.
        why: why the sweep ends it; empty while it does not.
        ended_at: when the sweep told it to end.
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
        """Seconds since one of its files changed. Compares states of files, so clocks of other hosts do not matter."""
        seen = _states(self.folder)
        if seen != self._seen:
            self._seen, self._moved = seen, time.monotonic()
        return time.monotonic() - self._moved


@dataclasses.dataclass
class Task:
    """One training of a trial.

    Attributes:
        trial: the trial's number.
        fold: the fold that it tests on; None without folds.
        folder: the folder of all its tries.
        flags: flags of the training, except those for where it writes.
        current: the running try.
        failures: how many tries have failed.
        avoided: hosts on which tries have failed.
        result: the content of `result.json`, once it is done.
        hosts: hosts of its tries, in order.
        seconds: total seconds of all tries.
        last: the last line of the log of a failed try.
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
        """The task's name in messages."""
        return f"trial {self.trial}" + ("" if self.fold is None else f", fold {self.fold}")

    def tries(self) -> list[Path]:
        """The folders of its tries so far, in order, including those of an earlier sweep."""
        return sorted(self.folder.glob("try-*"), key=lambda path: int(path.name.partition("-")[2]))

    def find_result(self) -> bool:
        """Whether a try has finished; then reads its result, which is written atomically."""
        for folder in reversed(self.tries()):
            if (folder / "result.json").is_file():
                self.result = {**json.loads((folder / "result.json").read_text()), "folder": str(folder)}
                return True
        return False

    def next_try(self) -> tuple[Path, list[str]]:
        """Creates the folder of a new try. Returns it with flags for this folder and the newest earlier checkpoint.

        Each try has its own folder: an abandoned try may still write for a while, on a disconnected host.
        """
        before = self.tries()
        number = int(before[-1].name.partition("-")[2]) + 1 if before else 1
        folder = self.folder / f"try-{number}"
        (folder / "logs").mkdir(parents=True)
        saved = next((path for path in reversed(before) if has_checkpoint(path)), None)
        return folder, [f"--workdir={folder}", *([f"--resume={saved}"] if saved else [])]

    def clean(self, *, keep_model: bool) -> None:
        """Removes the checkpoints of a finished task, and its model unless `keep_model`."""
        for folder in self.tries():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            if not keep_model:
                (folder / "model.keras").unlink(missing_ok=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether a try has left an intact checkpoint."""
    from hvdkit.checkpoint import store

    return store.newest(folder / "checkpoints") is not None


def history(folder: Path, column: str) -> list[float]:
    """A column of a try's `history.csv`, one number per epoch; an incomplete last line is skipped."""
    try:
        text = (folder / "history.csv").read_text()
    except FileNotFoundError:
        return []
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    # Keras' CSVLogger writes NA where an epoch lacks a column that others have.
    return [float(row[column]) for row in rows if row.get(column) not in (None, "", "NA")]


def value(result: dict[str, Any], goal: str) -> float:
    """The value of the goal that a training has reached: on the validation split or, if it has none, on its fold.

    NaN if there is none.
    """
    found = result.get(f"validation_{goal}", result.get(f"test_{goal}"))
    return math.nan if found is None else float(found)


def outcome_file(folder: Path) -> Path:
    """The file to which a try writes its outcome; see `hvdkit.outcome`."""
    return folder / "logs" / "outcome.jsonl"


def last_words(log: Path) -> str:
    """The last meaningful line of a log, for a try that ended without an outcome."""
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

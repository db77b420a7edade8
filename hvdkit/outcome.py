"""How a job ends: its exit codes, and the machine-readable line in which its processes tell each other of it.

A rank, its watchdog and the launcher say what happens in sentences for people. Programs that start them read this line
instead, and no sentence: the launcher, the sweep, the drill, verify_resume. A listener sets `HVDKIT_OUTCOME` for what
it starts, to "stderr" or to the path of a file. Where it is not set, as under `horovodrun` or `mpirun`, nothing is
written that a user could see.

    stderr   for ranks, on whichever host and under MPI, too: the launcher takes the line out of what it shows and logs
    a file   for what runs on the listener's own host, such as the launcher itself, which passes on what it has heard

A line is a record of RFC 7464: the control character RS, a word, a JSON object, a line feed:

    \\x1ehvdkit {"kind": "failed", "rank": 1, "host": "h2", "why": "error", "code": 1, "message": "failed: ..."}
"""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------------------------------------------------- Exit codes

USAGE = 2  # the user can fix it; to start again changes nothing
STALLED = 75  # EX_TEMPFAIL of sysexits.h: the job hung or lost a rank or a host, and may be started again
PREEMPTED = 85  # HTCondor's own for "checkpointed, start me again"; scripts that requeue a job look for it
UNFIT_SIZE = 86  # in an elastic job: this number of ranks cannot be used, and a smaller one could
SAID = (USAGE, STALLED, PREEMPTED, UNFIT_SIZE)  # of processes that have said all that there is to say

# ------------------------------------------------------------------------------------------------------------ The line

VARIABLE = "HVDKIT_OUTCOME"
STDERR = "stderr"
PREFIX = "\x1ehvdkit "
_MOST_BYTES = 4096  # PIPE_BUF: a pipe takes so many in one piece, whoever else writes to it


@dataclasses.dataclass(frozen=True)
class Failed:
    """The job, or the process that says so, fails.

    Attributes:
        why: "usage" (the user can fix it), "error" (an exception), "death", "left", "stall", "mismatch", "diverged";
            "launch" (the launcher's own: a host is lost or unfit) or "rank" (a rank ended, and did not say why).
        code: the exit code that follows.
        message: a sentence, without the rank.
        rank: whose failure it is; None where it is not one rank's.
        host: that rank's.
        lines: how many lines come next that say the same for people; they are to be shown, whichever rank wrote them.
    """

    why: str
    code: int
    message: str = ""
    rank: int | None = None
    host: str | None = None
    lines: int = 0

    def __str__(self) -> str:
        who = "" if self.rank is None or not self.host else f"rank {self.rank} on host {self.host} "
        return f"{who}{self.message}"


@dataclasses.dataclass(frozen=True)
class Unsaved:
    """A checkpoint could not be written; training continues.

    Attributes:
        step: of the checkpoint.
        message: the error.
    """

    step: int
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Resumed:
    """Training resumes from a checkpoint.

    Attributes:
        step: of the checkpoint, from the job's beginning.
    """

    step: int


@dataclasses.dataclass(frozen=True)
class Unknown:
    """What another version of hvdkit says; it is no output for people, either.

    Attributes:
        kind: as it is there.
    """

    kind: str


Outcome = Failed | Unsaved | Resumed | Unknown
_KINDS: dict[str, type[Failed | Unsaved | Resumed]] = {"failed": Failed, "unsaved": Unsaved, "resumed": Resumed}


def tell(outcome: Outcome, text: str = "") -> None:
    """Writes the line for whoever listens, and `text` for people on standard error.

    In one piece, and past Python's buffers: the main thread may hold their locks, and may never return.

    Args:
        outcome: what happens.
        text: the same for people, without the last line feed; empty if they hear of it elsewhere.
    """
    listener = os.environ.get(VARIABLE, "")
    if text and isinstance(outcome, Failed):
        outcome = dataclasses.replace(outcome, lines=text.count("\n") + 1)
    line = to_line(outcome).encode() if listener else b""
    if listener and listener != STDERR:
        with contextlib.suppress(OSError):
            _append(Path(listener), line)
        line = b""
    shown = f"{text}\n".encode(errors="backslashreplace") if text else b""  # a file's name may hold surrogates
    if line or shown:
        with contextlib.suppress(OSError):
            os.write(2, line + shown)


def heard(path: Path) -> list[Outcome]:
    """What has been told into a file, in order; half a line, of a process that was killed, is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [outcome for line in text.split("\n") if (outcome := split(line)[1])]


def failure(path: Path) -> Failed | None:
    """Why the job failed that told into a file, if it failed: what is said last is the launcher's, who knows most."""
    return next((told for told in reversed(heard(path)) if isinstance(told, Failed)), None)


def to_line(outcome: Outcome) -> str:
    """The line, with its line feed, in ASCII; a message is cut where the line would be too long for a pipe."""
    fields = {"kind": type(outcome).__name__.lower(), **dataclasses.asdict(outcome)}
    line = f"{PREFIX}{json.dumps(fields)}\n"
    while len(line) > _MOST_BYTES:
        fields["message"] = fields["message"][: len(fields["message"]) // 2]
        line = f"{PREFIX}{json.dumps(fields)}\n"
    return line


def split(line: str) -> tuple[str, Outcome | None]:
    """A line of output, divided into what is for people and the outcome that follows.

    Args:
        line: without its line feed, or with it.

    Returns:
        What comes before the outcome: another thread's unfinished line, such as a progress bar. All of the line, and
        None, where there is no outcome, or what is left of one.
    """
    before, mark, rest = line.partition(PREFIX)
    if not mark:
        return line, None
    try:
        fields = json.loads(rest)
        kind = _KINDS.get(fields["kind"])
        if kind is None:
            return before, Unknown(str(fields["kind"]))
        return before, kind(**_known(kind, fields))
    except (ValueError, TypeError, KeyError):
        return line, None


def _known(kind: type, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that this version knows, where they are of the type that it expects."""
    types = {"rank": int, "code": int, "step": int, "lines": int, "why": str, "message": str, "host": str}
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: fields[name] for name in names if type(fields.get(name)) is types[name]}


def _append(path: Path, line: bytes) -> None:
    target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(target, line)
    finally:
        os.close(target)

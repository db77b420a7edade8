"""How a job ends: its exit codes, and the machine-readable line with which its processes report the outcome.

Ranks, watchdogs and the launcher report to people in sentences. Programs that start them (the launcher, the sweep, the
drill, verify_resume) read this line instead, and no sentence. A listener sets `HVDKIT_OUTCOME` for the processes it
starts, to "stderr" or to the path of a file. If it is not set, as under `horovodrun` or `mpirun`, no line is written.

    stderr   for ranks, on any host and also under MPI: the launcher removes the line from what it shows and logs
    a file   for processes on the listener's own host, such as the launcher itself, which forwards what it received

A line is a record of RFC 7464: the control character RS, a word, a JSON object, a line feed:

    \\x1ehvdkit {"kind": "failed", "rank": 1, "host": "h2", "why": "error", "code": 1, "message": "failed: ..."}
"""

import contextlib
import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------------------------------------------------- Exit codes

USAGE = 2  # the user can fix it; a restart does not help
STALLED = 75  # EX_TEMPFAIL of sysexits.h: the job hung or lost a rank or a host, and may be restarted
PREEMPTED = 85  # HTCondor's code for "checkpointed, restart me"; scripts that requeue a job check for it
UNFIT_SIZE = 86  # in an elastic job: this number of ranks is not usable, but a smaller one may be
REPORTED = (USAGE, STALLED, PREEMPTED, UNFIT_SIZE)  # a process that exits with one has reported why

# ------------------------------------------------------------------------------------------------------------ The line

VARIABLE = "HVDKIT_OUTCOME"
STDERR = "stderr"
_PIPE = "HVDKIT_STDERR"  # number and inode of the launcher's pipe
PREFIX = "\x1ehvdkit "
_MOST_BYTES = 4096  # PIPE_BUF: writes of up to this size are atomic in a pipe with several writers


@dataclasses.dataclass(frozen=True)
class Failed:
    """The job, or the process that reports this, fails.

    Attributes:
        why: "usage" (the user can fix it), "error" (an exception), "death", "left", "stall", "mismatch", "diverged";
            "launch" (from the launcher: a host is lost or unfit) or "rank" (a rank exited without a reason).
        code: the exit code that follows.
        message: a sentence, without the rank.
        rank: the rank that failed; None if it is not a single rank.
        host: the host of that rank.
        lines: number of following lines with the same content for people; show them, whichever rank wrote them.
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
        step: step of the checkpoint.
        message: the error.
    """

    step: int
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Resumed:
    """Training resumes from a checkpoint.

    Attributes:
        step: step of the checkpoint, counted from the start of the job.
    """

    step: int


@dataclasses.dataclass(frozen=True)
class Unknown:
    """An outcome of another version of hvdkit; it is not output for people.

    Attributes:
        kind: its kind there.
    """

    kind: str


Outcome = Failed | Unsaved | Resumed | Unknown
_KINDS: dict[str, type[Failed | Unsaved | Resumed]] = {"failed": Failed, "unsaved": Unsaved, "resumed": Resumed}


def tell(outcome: Outcome, text: str = "") -> None:
    """Writes the line for the listener, and `text` for people to standard error.

    Writes both at once, and not through Python's buffers: the main thread may hold their locks forever.

    Args:
        outcome: what happens.
        text: the same for people, without the last line feed; empty if something else reports it.
    """
    listener = os.environ.get(VARIABLE, "")
    if text and isinstance(outcome, Failed):
        outcome = dataclasses.replace(outcome, lines=text.count("\n") + 1)
    line = to_line(outcome).encode() if listener else b""
    if listener and listener != STDERR:
        with contextlib.suppress(OSError):
            _append(Path(listener), line)
        line = b""
    show(text, line)


def show(text: str, line: bytes = b"") -> None:
    """Writes to standard error in one piece, also if the program has redirected it.

    Not through Python's buffers: the main thread may hold their locks forever.

    A test runner or a notebook that captures descriptor 2 would lose what is written before the process ends at once.
    So the launcher gives each rank its pipe under a second number, which is used if descriptor 2 is another file.

    Args:
        text: what is for people, without the last line feed; may be empty.
        line: what precedes it for the launcher, complete.
    """
    shown = f"{text}\n".encode(errors="backslashreplace") if text else b""  # a file name may contain surrogates
    pipe = _launchers_pipe()
    for number, content in ((2, line + shown),) if pipe is None else ((pipe, line + shown), (2, shown)):
        if content:
            with contextlib.suppress(OSError):
                os.write(number, content)


def _launchers_pipe() -> int | None:
    """Returns the second number of the launcher's pipe; None if descriptor 2 is that pipe, or there is none."""
    number, _, inode = os.environ.get(_PIPE, "").partition(":")
    try:
        pipe, now = os.fstat(int(number)), os.fstat(2)
    except (OSError, ValueError):
        return None
    is_it = stat.S_ISFIFO(pipe.st_mode) and str(pipe.st_ino) == inode  # a child of the rank may use the number anew
    return int(number) if is_it and (pipe.st_dev, pipe.st_ino) != (now.st_dev, now.st_ino) else None


def heard(path: Path) -> list[Outcome]:
    """Returns the outcomes in a file, in order; ignores an incomplete line, such as that of a killed process."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [outcome for line in text.split("\n") if (outcome := split(line)[1])]


def failure(path: Path) -> Failed | None:
    """Returns why the job of an outcome file failed, or None: the last report is the launcher's, which knows most."""
    return next((told for told in reversed(heard(path)) if isinstance(told, Failed)), None)


def to_line(outcome: Outcome) -> str:
    """Returns the line, with its line feed, in ASCII; cuts the message if the line would be too long for a pipe."""
    fields = {"kind": type(outcome).__name__.lower(), **dataclasses.asdict(outcome)}
    line = f"{PREFIX}{json.dumps(fields)}\n"
    while len(line) > _MOST_BYTES:
        fields["message"] = fields["message"][: len(fields["message"]) // 2]
        line = f"{PREFIX}{json.dumps(fields)}\n"
    return line


def split(line: str) -> tuple[str, Outcome | None]:
    """Splits a line of output into text for people and the outcome that follows.

    Args:
        line: a line, with or without its line feed.

    Returns:
        The text before the outcome, such as another thread's unfinished progress bar, and the outcome. The whole line
        and None if there is no outcome or only a fragment of one.
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
    """Returns the fields that this version knows, if they have the expected type."""
    types = {"rank": int, "code": int, "step": int, "lines": int, "why": str, "message": str, "host": str}
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: fields[name] for name in names if type(fields.get(name)) is types[name]}


def _append(path: Path, line: bytes) -> None:
    target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(target, line)
    finally:
        os.close(target)

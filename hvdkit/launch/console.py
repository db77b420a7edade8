"""What the launcher shows of the ranks' output, what it keeps in a log each, and what it remembers for the end."""

import collections
import contextlib
import re
import sys
import time
from pathlib import Path
from typing import IO

from hvdkit.errors import UsageError

MODES = ("rank0", "errors", "all")
# What hvdkit.watchdog says of the rank whose failure is the cause of the others': which ends first is chance.
_FAILED = re.compile(r"hvdkit: rank (\d+) on host \S+ (failed|died|ended).*?(?: exit code (\d+)\.)?\s*$", re.DOTALL)
_LEAVING = re.compile(r"hvdkit: .*\b[Aa]ll ranks leave with exit code (\d+)\.")
_DIED = re.compile(r"hvdkit: rank \d+ on host \S+ (?:died|ended)")
# TensorFlow writes these at every import, whatever TF_CPP_MIN_LOG_LEVEL says; the last where there is no GPU driver.
_NOTICES = re.compile(
    r"WARNING: All log messages before absl::InitializeLog\(\)"
    r"|I\d{4} .*(?:port|cpu_feature_guard|cudart_stub)\.cc:\d+\]"
    r"|To enable the following instructions: "
    r"|E\d{4} .*failed call to cuInit: .*\(303\)"
)
_TRACEBACK = re.compile(r"Traceback \(most recent call last\)|Fatal Python error|\*\*\* Process received signal \*\*\*")
_KEPT_LINES = 300  # of each rank, for what is shown at the end
_LAST_LINES, _MOST_LINES = 10, 80  # shown at the end: so many, or from a traceback's begin on
_LONGEST = 1 << 16  # bytes of a line that does not end
_ERASE = "\r\x1b[2K"  # the terminal's line
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and moves of the cursor: a log holds none


class Console:
    """Takes the ranks' output piece by piece, shows whole lines, and remembers who was to blame.

    Args:
        mode: `rank0` shows rank 0's output; `errors` also the other ranks' standard error, their number in front;
            `all` everything.
        logs: the folder for a log of each rank, `rank-NNNN.log`; None for no logs.
    """

    def __init__(self, mode: str = "all", logs: Path | None = None) -> None:
        self.cancelled = False  # by the user: ranks die then, which is no news
        self.cause: tuple[int, int | None] | None = None  # rank, and the exit code if the rank itself told it
        self.leaving: int | None = None  # the exit code with which, as a rank said, all ranks leave
        self.logs = logs
        self._mode = mode
        self._streams: dict[tuple[int, bool], _Stream] = {}
        self._files: dict[int, IO[str]] = {}
        self._last: dict[int, collections.deque[str]] = {}
        self._is_on_progress = False  # whether the terminal's cursor is on a progress line
        if logs is not None:
            try:
                logs.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"The logs' folder {logs} cannot be made ({error.strerror}). Choose another with --workdir=DIR."
                ) from None

    def feed(self, rank: int, data: bytes, *, is_error: bool) -> None:
        """Takes output as it came; a carriage return is passed on at once, so progress bars move."""
        stream = self._streams.setdefault((rank, is_error), _Stream())
        self._take(rank, is_error, stream, stream.pieces(data))

    def finish(self, rank: int) -> None:
        """Takes what a rank left without a line's end: nothing more will come."""
        for is_error in (False, True):
            if stream := self._streams.pop((rank, is_error), None):
                self._take(rank, is_error, stream, stream.rest())
        if file := self._files.pop(rank, None):
            file.close()

    def last_lines(self, rank: int) -> list[str]:
        """A rank's last lines, from the begin of its last traceback on where it ended with one."""
        lines = [line for line in self._last.get(rank, ()) if line.strip() and not _NOTICES.match(line)]
        begins = [number for number, line in enumerate(lines) if _TRACEBACK.match(line)]
        first = min([*begins[-1:], len(lines) - _LAST_LINES])
        return lines[max(first, len(lines) - _MOST_LINES, 0) :]

    def _take(self, rank: int, is_error: bool, stream: "_Stream", pieces: list[str]) -> None:
        for piece in pieces:
            self._show(rank, piece, is_error)
            if line := stream.line(piece):
                self._keep(rank, line)

    def _show(self, rank: int, piece: str, is_error: bool) -> None:
        failed = _FAILED.search(piece)  # it may follow a progress bar's unfinished line
        if failed and self.cause is None:
            self.cause = int(failed[1]), int(failed[3]) if failed[2] == "failed" and failed[3] else None
        if (leaving := _LEAVING.search(piece)) and self.leaving is None:
            self.leaving = int(leaving[1])
        hidden = rank != 0 and not failed and (self._mode == "rank0" or (self._mode == "errors" and not is_error))
        if hidden or (self.cancelled and _DIED.search(piece)) or _NOTICES.match(piece):
            return
        target = sys.stderr if is_error else sys.stdout
        with contextlib.suppress(BrokenPipeError):  # whoever read it has gone; the job goes on
            if self._is_on_progress and target.isatty():
                target.write(_ERASE)
            self._is_on_progress = piece.endswith("\r")
            target.write(piece if rank == 0 else f"[{rank}] {piece}")
            target.flush()

    def _keep(self, rank: int, line: str) -> None:
        line = _CONTROLS.sub("", line)
        self._last.setdefault(rank, collections.deque(maxlen=_KEPT_LINES)).append(line.rstrip("\n"))
        if self.logs is None:
            return
        if rank not in self._files:
            # Appended: a run that is started again must not destroy what the one before it said.
            self._files[rank] = (self.logs / f"rank-{rank:04d}.log").open("a", encoding="utf-8", buffering=1)
            self._files[rank].write(f"---- started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self._files[rank].write(line)


class _Stream:
    """One of a rank's two streams, cut into pieces that end in a line feed or a carriage return."""

    def __init__(self) -> None:
        self._begun = b""
        self._overwritable = ""

    def pieces(self, data: bytes) -> list[str]:
        *whole, self._begun = re.split(rb"(?<=[\n\r])", self._begun + data)
        if len(self._begun) > _LONGEST:
            whole.append(self._begun + b"\n")
            self._begun = b""
        return [piece.decode(errors="replace") for piece in whole]

    def rest(self) -> list[str]:
        begun, self._begun = self._begun, b""
        return [begun.decode(errors="replace") + "\n"] if begun else ["\n"] if self._overwritable.strip() else []

    def line(self, piece: str) -> str | None:
        """The line that a piece completes: what a progress bar overwrote is left out."""
        if piece.endswith("\r"):
            self._overwritable = piece[:-1]
            return None
        line = piece if piece.strip("\n") else self._overwritable + piece
        self._overwritable = ""
        return line

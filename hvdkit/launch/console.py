"""What the launcher shows of the ranks' output, what it keeps in a log each, and what it remembers for the end."""

import collections
import contextlib
import re
import sys
import time
from pathlib import Path
from typing import IO

from hvdkit import outcome
from hvdkit.errors import UsageError
from hvdkit.outcome import Failed, Outcome

MODES = ("rank0", "errors", "all")
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
    """Takes the ranks' output piece by piece, shows whole lines, and takes out what ranks tell the launcher.

    Args:
        mode: `rank0` shows rank 0's output; `errors` also the other ranks' standard error, their number in front;
            `all` everything. How the job fails is shown in all modes, whichever rank says it.
        logs: the folder for a log of each rank, `rank-NNNN.log`; None for no logs.

    Attributes:
        cancelled: by the user: ranks die then, which is no news.
        failures: those that ranks told, in order.
    """

    def __init__(self, mode: str = "all", logs: Path | None = None) -> None:
        self.cancelled = False
        self.failures: list[Failed] = []
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

    @property
    def cause(self) -> tuple[int, int | None] | None:
        """The rank whose failure the others follow from, and its exit code if it told that itself.

        Which rank's end is known first is chance; the watchdog says which failed first.
        """
        for failed in self.failures:
            if failed.rank is not None:
                return failed.rank, failed.code if failed.why == "error" else None
        return None

    @property
    def leaving(self) -> int | None:
        """The exit code with which, as a rank said, all ranks exit."""
        return self.failures[0].code if self.failures else None

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

    def _take(self, rank: int, is_error: bool, stream: "_Stream", pieces: list[str | Outcome]) -> None:
        for piece in pieces:
            if not isinstance(piece, str):
                self._hear(stream, piece)
                continue
            if not self._is_hidden(rank, piece, is_error, stream.announced(piece)):
                self._show(rank, piece, is_error)
            if line := stream.line(piece):
                self._keep(rank, line)

    def _hear(self, stream: "_Stream", told: Outcome) -> None:
        """A failure is told on when the job has ended, once: by the launcher, which knows more."""
        if isinstance(told, Failed):
            self.failures.append(told)
            stream.announce(told)
        else:
            outcome.tell(told)

    def _is_hidden(self, rank: int, piece: str, is_error: bool, announced: Failed | None) -> bool:
        if announced:
            return self.cancelled and announced.why in ("death", "left")
        others = rank != 0 and (self._mode == "rank0" or (self._mode == "errors" and not is_error))
        return others or bool(_NOTICES.match(piece))

    def _show(self, rank: int, piece: str, is_error: bool) -> None:
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
    """One of a rank's two streams, cut into outcomes and pieces that end in a line feed or a carriage return."""

    def __init__(self) -> None:
        self._begun = b""
        self._overwritable = ""
        self._announced: Failed | None = None
        self._lines = 0  # still to come of what was announced

    def pieces(self, data: bytes) -> list[str | Outcome]:
        *whole, self._begun = re.split(rb"(?<=[\n\r])", self._begun + data)
        if len(self._begun) > _LONGEST:
            whole.append(self._begun + b"\n")
            self._begun = b""
        found: list[str | Outcome] = []
        before = ""  # an outcome, in a line that another thread has not ended
        for piece in whole:
            text, told = outcome.split(before + piece.decode(errors="replace"))
            before = text if told else ""
            found.append(told or text)
        self._begun = before.encode() + self._begun
        return found

    def announce(self, told: Failed) -> None:
        """The next lines tell people of a failure."""
        self._announced, self._lines = told, told.lines

    def announced(self, piece: str) -> Failed | None:
        """The failure of which a piece tells people, if it does; asked once for each piece."""
        if not self._lines:
            return None
        self._lines -= piece.endswith("\n")
        return self._announced

    def rest(self) -> list[str | Outcome]:
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

"""The ranks' output: what the launcher shows, what it writes to each rank's log, and what it keeps for the end.

Output passes through byte by byte, in lines of any length: it need not be UTF-8, and the terminal's encoding does not
matter. Text that is decoded on the way has a surrogate for each byte that is not UTF-8 (PEP 383).
"""

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
# TensorFlow writes these at every import and ignores TF_CPP_MIN_LOG_LEVEL; the last one without a GPU driver.
_NOTICES = re.compile(
    r"WARNING: All log messages before absl::InitializeLog\(\)"
    r"|I\d{4} .*(?:port|cpu_feature_guard|cudart_stub)\.cc:\d+\]"
    r"|To enable the following instructions: "
    r"|E\d{4} .*failed call to cuInit: .*\(303\)"
)
_TRACEBACK = re.compile(r"Traceback \(most recent call last\)|Fatal Python error|\*\*\* Process received signal \*\*\*")
_KEPT_LINES = 300  # lines kept of each rank, to show at the end
_LAST_LINES, _MOST_LINES = 10, 80  # lines shown at the end: the last ones, or from the start of a traceback
_LONGEST = 64 << 20  # bytes after which the begin of a line is shown before its end has arrived: memory is finite
_ANY_BYTES = {"encoding": "utf-8", "errors": "surrogateescape"}
_ERASE = "\r\x1b[2K"  # erases the terminal's line
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colors and cursor moves, which are removed from logs


class Console:
    """Reads the ranks' output in pieces, shows whole lines, and extracts the outcomes that ranks report.

    Args:
        mode: `rank0` shows rank 0's output; `errors` also the other ranks' standard error, prefixed with the rank;
            `all` shows everything. A failure of the job is shown in all modes, whichever rank reports it.
        logs: the folder for the log of each rank, `rank-NNNN.log`; None for no logs.

    Attributes:
        cancelled: whether the user has cancelled the job: then deaths of ranks are expected and not shown.
        failures: the failures that ranks reported, in order.
    """

    def __init__(self, mode: str = "all", logs: Path | None = None) -> None:
        self.cancelled = False
        self.failures: list[Failed] = []
        self.logs = logs
        self._mode = mode
        self._streams: dict[tuple[int, bool], _Stream] = {}
        self._files: dict[int, IO[str]] = {}
        self._last: dict[int, collections.deque[str]] = {}
        self._is_log_lost = False  # whether it is said that logs cannot be written
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
        """The rank whose failure caused the others, and its exit code if that rank reported it itself.

        The order in which ranks end is random; the watchdog reports which rank failed first.
        """
        for failed in self.failures:
            if failed.rank is not None:
                return failed.rank, failed.code if failed.why == "error" else None
        return None

    @property
    def leaving(self) -> int | None:
        """The exit code of all ranks, as a rank reported it."""
        return self.failures[0].code if self.failures else None

    def feed(self, rank: int, data: bytes, *, is_error: bool) -> None:
        """Reads a piece of output. Text up to a carriage return is shown at once, so that progress bars move."""
        stream = self._streams.setdefault((rank, is_error), _Stream())
        self._take(rank, is_error, stream, stream.pieces(data))

    def finish(self, rank: int) -> None:
        """Reads a rank's last, incomplete lines, after its output has ended."""
        for is_error in (False, True):
            if stream := self._streams.pop((rank, is_error), None):
                self._take(rank, is_error, stream, stream.rest(ends_line=rank > 0 or is_error))
        if file := self._files.pop(rank, None):
            with contextlib.suppress(OSError):  # said before
                file.close()

    def last_lines(self, rank: int) -> list[str]:
        """A rank's last lines; if it ended with a traceback, from the start of the traceback."""
        kept = (line.encode(**_ANY_BYTES).decode(errors="replace") for line in self._last.get(rank, ()))
        lines = [line for line in kept if line.strip() and not _NOTICES.match(line)]
        begins = [number for number, line in enumerate(lines) if _TRACEBACK.match(line)]
        first = min([*begins[-1:], len(lines) - _LAST_LINES])
        return lines[max(first, len(lines) - _MOST_LINES, 0) :]

    def _take(self, rank: int, is_error: bool, stream: "_Stream", pieces: list[str | Outcome]) -> None:
        for piece in pieces:
            if not isinstance(piece, str):
                self._hear(stream, piece)
                continue
            if not self._is_hidden(rank, piece, is_error, stream.announced(piece)):
                self._show(rank if stream.begins_line(piece) else 0, piece, is_error)
            if line := stream.line(piece):
                self._keep(rank, line)

    def _hear(self, stream: "_Stream", told: Outcome) -> None:
        """Handles an outcome. Failures are kept: the launcher reports one when the job has ended, with more detail."""
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

    def _show(self, prefix: int, piece: str, is_error: bool) -> None:
        """Shows a piece of output, and before it a rank's number, if that is not 0."""
        target = sys.stderr if is_error else sys.stdout
        erase = _ERASE if self._is_on_progress and piece != "\n" and target.isatty() else ""
        self._is_on_progress = piece.endswith("\r")
        with contextlib.suppress(OSError):  # a full disk, or a pipe whose reader has closed it; the job continues
            _write(target, f"{erase}[{prefix}] {piece}" if prefix else erase + piece)

    def _keep(self, rank: int, line: str) -> None:
        line = _CONTROLS.sub("", line)
        self._last.setdefault(rank, collections.deque(maxlen=_KEPT_LINES)).append(line.rstrip("\n"))
        if self.logs is None:
            return
        try:
            self._log_of(rank, self.logs).write(line)
        except OSError as error:
            self._say_log_lost(self.logs, error)

    def _log_of(self, rank: int, folder: Path) -> IO[str]:
        if rank not in self._files:
            # Appended: a restarted run must keep the log of the run before.
            self._files[rank] = (folder / f"rank-{rank:04d}.log").open("a", buffering=1, **_ANY_BYTES)
            self._files[rank].write(f"---- started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        return self._files[rank]

    def _say_log_lost(self, folder: Path, error: OSError) -> None:
        """Says, once, that a log cannot be written. It is tried again with each line: space may be made."""
        if not self._is_log_lost:
            self._is_log_lost = True
            text = f"hvdkit.launch: a log in {folder} cannot be written ({error.strerror}); the job continues.\n"
            with contextlib.suppress(OSError):
                sys.stderr.write(text)
                sys.stderr.flush()


class _Stream:
    """One of a rank's two streams, cut into outcomes and pieces that end in a line feed or a carriage return."""

    def __init__(self) -> None:
        self._begun: list[bytes] = []  # of a line whose end has not arrived
        self._is_in_line = False  # whether the end of a shown line has not arrived
        self._overwritable = ""
        self._announced: Failed | None = None
        self._lines = 0  # remaining lines of the announced failure

    def pieces(self, data: bytes) -> list[str | Outcome]:
        *whole, begun = re.split(rb"(?<=[\n\r])", data)
        if whole:
            whole[0] = self._join(whole[0])
        self._begun.append(begun)
        if sum(map(len, self._begun)) > _LONGEST:
            whole.append(self._join(b""))
        found: list[str | Outcome] = []
        before = ""  # text before an outcome, in a line that another thread has not ended
        for piece in whole:
            text, told = outcome.split(before + piece.decode(**_ANY_BYTES))
            before = text if told else ""
            found.append(told or text)
        self._begun.insert(0, before.encode(**_ANY_BYTES))
        return found

    def _join(self, end: bytes) -> bytes:
        """Returns what has begun, with its end."""
        begun, self._begun = self._begun, []
        return b"".join([*begun, end])

    def begins_line(self, piece: str) -> bool:
        """Whether a piece begins a line on the screen. Call it once for each piece that is shown."""
        begins = not self._is_in_line and not (piece == "\n" and self._overwritable)
        self._is_in_line = not piece.endswith(("\n", "\r"))
        return begins

    def announce(self, told: Failed) -> None:
        """Marks the next lines as the text of a failure."""
        self._announced, self._lines = told, told.lines

    def announced(self, piece: str) -> Failed | None:
        """The failure to whose text a piece belongs, if any. Call it once for each piece."""
        if not self._lines:
            return None
        self._lines -= piece.endswith("\n")
        return self._announced

    def rest(self, *, ends_line: bool) -> list[str | Outcome]:
        """The line that has begun when the output has ended, with a line feed if `ends_line`."""
        begun = self._join(b"").decode(**_ANY_BYTES)
        if begun:
            return [begun + "\n" * ends_line]
        return ["\n"] if ends_line and self._overwritable.strip() else []

    def line(self, piece: str) -> str | None:
        """The line that a piece completes, without text that a progress bar has overwritten."""
        if piece.endswith("\r"):
            self._overwritable = piece[:-1]
            return None
        line = piece if piece.strip("\n") else self._overwritable + piece
        self._overwritable = ""
        return line


def _write(target: IO[str], text: str) -> None:
    """Writes the bytes of a text, whatever encoding the target has."""
    binary = getattr(target, "buffer", None)
    if binary is None:  # not a file: a program's own stream in memory
        target.write(text)
    else:
        target.flush()
        binary.write(text.encode(**_ANY_BYTES))
    target.flush()

"""What the launcher shows of the ranks' output, and what it makes of the runner's own."""

import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import IO

_OF_A_RANK = re.compile(r"\[(?:\d+,)?(\d+)\]<(?:stdout|stderr)>:(.*)", re.DOTALL)
_ENDED_BY_ITSELF = re.compile(r"^hvdkit: rank (\d+) ended by itself, with exit code (\d+)$", re.MULTILINE)
# What hvdkit.watchdog says of the rank whose failure is the cause of the others': which ends first is chance.
_FAILED = re.compile(r"hvdkit: rank (\d+) on host \S+ (failed|died|ended).*?(?: exit code (\d+)\.)?\s*$", re.DOTALL)
_DIED = re.compile(r"hvdkit: rank \d+ on host \S+ (?:died|ended)")
_SAID = (2, 75)  # exit codes of ranks that have said all: what the user can mend, and a stall's report
# TensorFlow writes these at every import, whatever TF_CPP_MIN_LOG_LEVEL says; the last where there is no GPU driver.
_NOTICES = re.compile(
    r"WARNING: All log messages before absl::InitializeLog\(\)"
    r"|I\d{4} .*(?:port|cpu_feature_guard|cudart_stub)\.cc:\d+\]"
    r"|To enable the following instructions: "
    r"|E\d{4} .*failed call to cuInit: .*\(303\)"
)


class Console:
    """Copies the runner's output to this process's, rank by rank, and remembers what the runner itself said."""

    def __init__(self) -> None:
        self.cancelled: int | None = None  # the signal with which the user did: ranks die then, which is no news
        self._lock = threading.Lock()
        self._cause: tuple[int, int | None] | None = None  # rank, and the exit code if the rank itself told it
        self._of_the_runner: list[str] = []

    def copy(self, source: IO[bytes], target: IO[str]) -> None:
        """Copies until the source ends; a carriage return is passed on at once, so progress bars move."""
        for text in _pieces(source):
            with self._lock:
                self._show(text, target)

    def conclude(self, code: int) -> int:
        """Says which rank failed first, and returns its exit code; `code` is the runner's."""
        if code == 0:
            return 0
        if self.cancelled:
            return 128 + self.cancelled
        said = "".join(self._of_the_runner)
        codes = {int(rank): int(exit_code) for rank, exit_code in _ENDED_BY_ITSELF.findall(said)}
        if not codes:  # the runner failed by itself: what it said is all there is
            print(said, file=sys.stderr, end="")
            return code if code > 0 else 128 - code
        rank = min(codes, key=lambda rank: _in_the_wake(codes[rank]))  # the first of equals
        failed_with = codes[rank]
        if self._cause:
            rank, told = self._cause
            # One that fails with an exception may be ended by the runner while it cleans up.
            failed_with = told or codes.get(rank, failed_with)
        if failed_with not in _SAID:
            print(f"hvdkit.launch: rank {rank} was the first to fail, with exit code {failed_with}.", file=sys.stderr)
        return failed_with

    def _show(self, text: str, target: IO[str]) -> None:
        match = _OF_A_RANK.fullmatch(text)
        if not match:
            self._of_the_runner.append(text)
            return
        rank, line = int(match[1]), match[2]
        failed = _FAILED.search(line)  # it may follow a progress bar's unfinished line
        if failed and self._cause is None:
            self._cause = int(failed[1]), int(failed[3]) if failed[2] == "failed" and failed[3] else None
        if self.cancelled and _DIED.search(line):
            return
        if not _NOTICES.match(line):
            target.write(line if rank == 0 else f"[{rank}] {line}")
            target.flush()


def ended_by_itself(rank: int, code: int) -> str:
    """The line by which hvdkit.launch.runner tells the launcher of a rank that failed before it was ended."""
    return f"hvdkit: rank {rank} ended by itself, with exit code {code}"


def _in_the_wake(code: int) -> int:
    """How likely it is that a rank ended so because another one had: nobody kills himself with SIGKILL."""
    if code == 128 + signal.SIGKILL:
        return 0
    return 1 if code > 128 else 2


def _pieces(source: IO[bytes]) -> Iterator[str]:
    """Pieces of a stream that end in a line feed or a carriage return."""
    rest = b""
    while chunk := source.read1(65536):  # type: ignore[attr-defined]
        *whole, rest = re.split(rb"(?<=[\n\r])", rest + chunk)
        yield from (piece.decode(errors="replace") for piece in whole)
    if rest:
        yield rest.decode(errors="replace")

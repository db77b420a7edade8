"""Which rank failed first, and with which exit code the launcher exits.

The rank that the watchdog names as the cause is determined in `hvdkit.watchdog.hub`.
"""

import dataclasses
import importlib.util
import itertools
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import PurePath

_NOT_FOUND = re.compile(r"ModuleNotFoundError: No module named '(hvdkit|horovod|keras|tensorflow)'")


@dataclasses.dataclass(frozen=True)
class Failure:
    """A rank's end with a nonzero exit code. A negative `code` is a signal's number, as in `subprocess`."""

    rank: int
    code: int

    @property
    def exit_code(self) -> int:
        """The exit code that a shell would return: for a signal, 128 plus its number."""
        return self.code if self.code > 0 else 128 - self.code

    def words(self) -> str:
        """How the rank ended, in words."""
        if self.code > 0:
            return f"with exit code {self.code}"
        try:
            name = signal.Signals(-self.code).name
        except ValueError:
            name = f"signal {-self.code}"
        hint = " (often the kernel's, where memory has run out: see dmesg)" if self.code == -signal.SIGKILL else ""
        return f"killed by {name}{hint}, with exit code {self.exit_code}"


def first(
    failures: Sequence[Failure],
    cause: tuple[int, int | None] | None = None,
    known_before: int = 0,
    ends: Mapping[int, int] | None = None,
) -> Failure | None:
    """Returns the failure that caused the others.

    Args:
        failures: the failures in the order in which they became known, without ranks that the launcher itself ended.
        cause: the rank that the watchdog named, and its exit code if the watchdog reported it.
        known_before: how many of the failures were known when the watchdog named it.
        ends: the exit codes of all ranks, including those that the launcher ended.
    """
    # A rank killed by a signal could report nothing. Ranks that exit because of it may become known first. A rank that
    # aborts as a consequence is also ended by a signal, but never by SIGKILL.
    killed = sorted((f for f in failures if f.code < 0), key=lambda failure: failure.code != -signal.SIGKILL)
    # An exception on one rank never causes SIGKILL on another, whichever becomes known first.
    killed_by_others = [f for f in killed if cause and f.rank != cause[0] and f.code == -signal.SIGKILL]
    killed_before = [failure for failure in failures[:known_before] if failure.code < 0]
    if cause is not None and not killed_before and not killed_by_others:
        rank, reported = cause
        exited = next((failure.code for failure in failures if failure.rank == rank), None)
        # The launcher may end a rank that failed with an exception while it cleans up.
        code = reported or exited or (ends or {}).get(rank)
        if code:
            return Failure(rank, code)
    return next(iter(killed or failures), None)


def python_program(command: Sequence[str]) -> str | None:
    """Returns the Python script or module that a command runs; None if it runs something else."""
    has_python = False
    for word, following in itertools.zip_longest(command, command[1:]):
        if word.endswith(".py") and not word.startswith("-"):
            return word
        if has_python and word == "-m":
            return following
        has_python |= PurePath(word).name.startswith("python")
    return None


def missing_package(lines: Sequence[str]) -> str | None:
    """Returns the package that a program did not find, by its last lines, and that this Python has; else None."""
    found = _NOT_FOUND.search(lines[-1]) if lines else None
    return found[1] if found and importlib.util.find_spec(found[1]) else None

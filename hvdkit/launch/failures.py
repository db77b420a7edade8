"""Which rank was the first to fail, and with which exit code the launcher leaves."""

import dataclasses
import signal
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Failure:
    """A rank's end with anything but 0; `code` is negative for a signal's number, as Python has it."""

    rank: int
    code: int

    @property
    def exit_code(self) -> int:
        """As a shell would give it: 128 and the signal's number for a rank that a signal ended."""
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
    """The failure that the others followed from.

    Args:
        failures: in the order in which they became known, without those of ranks that the launcher itself ended.
        cause: the rank that the watchdog named, and its exit code where the watchdog told it.
        known_before: how many of the failures were known when it did.
        ends: how all ranks ended, those that the launcher ended included.
    """
    # A rank that a signal killed had no say; one that left in its wake did so by itself, and may be heard of first.
    # What aborts in the wake of another kills itself, too, but never with SIGKILL.
    killed = sorted((f for f in failures if f.code < 0), key=lambda failure: failure.code != -signal.SIGKILL)
    # Nor does SIGKILL follow from an exception elsewhere, in whichever order the two become known.
    killed_apart = [f for f in killed if cause and f.rank != cause[0] and f.code == -signal.SIGKILL]
    killed_before = [failure for failure in failures[:known_before] if failure.code < 0]
    if cause is not None and not killed_before and not killed_apart:
        rank, told = cause
        own = next((failure.code for failure in failures if failure.rank == rank), None)
        # One that fails with an exception may be ended by the launcher while it cleans up.
        code = told or own or (ends or {}).get(rank)
        if code:
            return Failure(rank, code)
    return next(iter(killed or failures), None)

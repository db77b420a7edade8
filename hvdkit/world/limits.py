"""The limits on stalls that the environment sets, and what Horovod's own check is told of them."""

import math
import os

from hvdkit.errors import UsageError


def stall_limit() -> float:
    """Seconds that a rank may wait for the others before the job ends; 0 for no limit.

    Raises:
        UsageError: `HVDKIT_STALL_SECONDS` is not a number from 0 up.
    """
    given = os.environ.get("HVDKIT_STALL_SECONDS") or os.environ.get("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS") or "600"
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < math.inf:
        raise UsageError(
            f"HVDKIT_STALL_SECONDS={given} is not a number of seconds. Give how long a rank may wait for the others "
            f"before the job ends, as in HVDKIT_STALL_SECONDS=600, or 0 for ever."
        )
    return limit


def stall_aborts() -> bool:
    """Whether a stall ends the job, or is only reported (`HVDKIT_STALL_ACTION=warn`).

    Raises:
        UsageError: `HVDKIT_STALL_ACTION` is neither.
    """
    action = os.environ.get("HVDKIT_STALL_ACTION") or "abort"
    if action not in ("abort", "warn"):
        raise UsageError(f"HVDKIT_STALL_ACTION={action} is unknown. Use abort, which is the default, or warn.")
    return action == "abort"


def leave_stalls_to_hvdkit() -> None:
    """Lets Horovod's own stall check, which knows less, speak only where the watchdog could not."""
    limit, aborts = stall_limit(), stall_aborts()
    os.environ["HVDKIT_STALL_SECONDS"] = f"{limit:g}"  # for a second `init`, which finds Horovod's changed
    if limit:
        latest = math.ceil(3 * limit)  # the watchdog gives a rank that may be busy three times the limit
        os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(latest + 30))
        os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] = str(latest + 60 if aborts else 0)

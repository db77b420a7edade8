"""Reads the stall limits from the environment, and configures Horovod's own stall check."""

import math
import os

from hvdkit.errors import UsageError


def stall_limit() -> float:
    """Returns how many seconds a rank may wait for the others before the job ends; 0 for no limit.

    Raises:
        UsageError: `HVDKIT_STALL_SECONDS` is not a number of at least 0.
    """
    given = os.environ.get("HVDKIT_STALL_SECONDS") or os.environ.get("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS") or "600"
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < math.inf:
        raise UsageError(
            f"HVDKIT_STALL_SECONDS={given} is not a number of seconds. Give how long a rank may wait for the others "
            f"before the job ends, for example HVDKIT_STALL_SECONDS=600, or 0 for no limit."
        )
    return limit


def stall_aborts() -> bool:
    """Returns whether a stall ends the job; with `HVDKIT_STALL_ACTION=warn` it is only reported.

    Raises:
        UsageError: `HVDKIT_STALL_ACTION` is neither `abort` nor `warn`.
    """
    action = os.environ.get("HVDKIT_STALL_ACTION") or "abort"
    if action not in ("abort", "warn"):
        raise UsageError(f"HVDKIT_STALL_ACTION={action} is unknown. Use abort, which is the default, or warn.")
    return action == "abort"


def leave_stalls_to_hvdkit() -> None:
    """Delays Horovod's own stall check, which reports less, until the watchdog must have reported the stall."""
    limit, aborts = stall_limit(), stall_aborts()
    os.environ["HVDKIT_STALL_SECONDS"] = f"{limit:g}"  # a second `init` must not read Horovod's changed variable
    if limit:
        latest = math.ceil(3 * limit)  # the watchdog allows three times the limit for a rank that may be busy
        os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(latest + 30))
        os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] = str(latest + 60 if aborts else 0)

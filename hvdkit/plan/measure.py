"""`plan measure`: each way to train, predicted and then tried on the hosts at hand."""

from collections.abc import Mapping, Sequence
from typing import Any

from hvdkit import reporting
from hvdkit.bench import jobs
from hvdkit.plan.cost import Mode

_MANY_STEPS = 10  # an execution, where steps are short: Python's part of them then does not count
_SHORT = 0.2  # seconds


def measure(
    predicted: Sequence[Mapping[str, Any]],
    modes: Mapping[str, Mode],
    flags: Sequence[str],
    launcher: Sequence[str],
    seconds: float,
) -> list[dict[str, Any]]:
    """Trains for some seconds in each mode, and puts the speed beside the prediction.

    Args:
        predicted: rows of `plan`, for the ranks that the launcher starts.
        modes: by name.
        flags: of hvdkit.train, with batch and threads.
        launcher: arguments of hvdkit.launch.
        seconds: of each measurement, and longer where two exchanges take longer.

    Returns:
        A row a mode: `case`, `predicted` and `measured` in samples a second, `dense` (how many times as fast as dense
        data parallelism), and bytes that a host sends a step, predicted and counted at its network interfaces.
    """
    found: list[dict[str, Any]] = []
    for row in predicted:
        mode = modes[row["mode"]]
        many = _MANY_STEPS if row["step_seconds"] < _SHORT else 1
        own = [*flags, *mode.flags.split(), f"--steps_per_execution={many}"]
        run = jobs.train(launcher, own, seconds)
        rate = run["mean_samples_per_second"]
        found.append(
            {
                "case": f"{mode.name}, {row['ranks']} ranks",
                "mode": mode.name,
                "ranks": row["ranks"],
                "predicted": row["samples_per_second"],
                "interval": row["interval"],
                "measured": rate,
                "dense": rate / found[0]["measured"] if found else 1.0,
                "predicted_wire_bytes": row["wire_bytes"],
                "sent_bytes": run["sent_bytes_per_step"],
            }
        )
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The table."""
    heads = [
        "case",
        "predicted samples/s",
        "measured samples/s",
        "error",
        "times dense",
        "predicted wire MB a step",
        "counted wire MB a step",
    ]
    lines = [
        [
            row["case"],
            f"{row['predicted']:,.0f}",
            f"{row['measured']:,.0f}",
            f"{row['predicted'] / row['measured'] - 1:+.0%}",
            f"{row['dense']:.1f}",
            f"{row['predicted_wire_bytes'] / 1e6:,.3f}",
            f"{row['sent_bytes'] / 1e6:,.3f}",
        ]
        for row in found
    ]
    return reporting.table(heads, lines)

"""`plan measure`: predict each training mode, then measure it on the given hosts."""

from collections.abc import Mapping, Sequence
from typing import Any

from hvdkit import reporting
from hvdkit.bench import jobs
from hvdkit.plan.cost import Mode
from hvdkit.plan.facts import together


def measure(
    predicted: Sequence[Mapping[str, Any]],
    modes: Mapping[str, Mode],
    flags: Sequence[str],
    launcher: Sequence[str],
    seconds: float,
) -> list[dict[str, Any]]:
    """Train for some seconds in each mode, and return the measured speed beside the prediction.

    One job trains in all modes, one after the other, because to start ranks takes longer than to measure them.

    Args:
        predicted: prediction rows for the ranks that the launcher starts.
        modes: the training modes by name.
        flags: flags of hvdkit.train, with batch size and threads.
        launcher: arguments of hvdkit.launch.
        seconds: duration of each measurement. It is longer if two synchronizations take longer.

    Returns:
        One row per mode: `case`, `predicted` and `measured` in samples per second, `dense` (speed relative to dense
        data parallelism), and the bytes that a host sends per step, both predicted and counted at its network
        interfaces.
    """
    several = [
        [*flags, *modes[row["mode"]].flags.split(), f"--steps_per_execution={together(row['step_seconds'])}"]
        for row in predicted
    ]
    found: list[dict[str, Any]] = []
    for row, run in zip(predicted, jobs.train_each(launcher, several, seconds), strict=True):
        rate = run["mean_samples_per_second"]
        found.append(
            {
                "case": f"{row['mode']}, {row['ranks']} ranks",
                "mode": row["mode"],
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
    """Format the measurements as a table."""
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

"""Recommend a training mode in one sentence, with the command to run."""

from collections.abc import Mapping, Sequence
from typing import Any

from hvdkit.plan.cost import Mode

WORTH = 1.1  # minimum speed-up over one process to recommend several
LOSSY_WORTH = 1.5  # minimum speed-up over the best exact mode to also name a lossy one


def advise(rows: Sequence[Mapping[str, Any]], modes: Mapping[str, Mode], flags: str, hosts: str) -> str:
    """Return the recommendation and the command to run.

    Args:
        rows: predictions with `mode`, `ranks`, `samples_per_second` and `speedup`.
        modes: the training modes by name.
        flags: the user's flags of hvdkit.train.
        hosts: hosts in the form of `-H`; empty for this host.
    """
    several = [row for row in rows if row["ranks"] > 1]
    training = [row for row in several if row["mode"] != "independent"]
    exact = max((row for row in training if modes[row["mode"]].exact), key=_rate, default=None)
    lossy = max((row for row in training if not modes[row["mode"]].exact), key=_rate, default=None)
    if exact and exact["speedup"] >= WORTH:
        text = f"Use {_told(exact)}: {_command(exact, modes, flags, hosts)}"
        if lossy and _rate(lossy) > LOSSY_WORTH * _rate(exact):
            text += f"\nIf the training bears it, {_told(lossy)}: {_command(lossy, modes, flags, hosts)}"
        return text
    if lossy and lossy["speedup"] >= LOSSY_WORTH:
        return (
            f"Dense data parallelism does not pay here; {_told(lossy)}, but trains another way, so compare its "
            f"accuracy: {_command(lossy, modes, flags, hosts)}"
        )
    best = (
        f" (the best, {exact['mode']} on {exact['ranks']} ranks, makes {exact['speedup']:.2f} of it)" if exact else ""
    )
    return (
        f"Not at all: train in one process{best}, or run independent tasks, one a rank: "
        f"python -m hvdkit.train --strategy=single {flags}"
    )


def _rate(row: Mapping[str, Any]) -> float:
    return float(row["samples_per_second"])


def _told(row: Mapping[str, Any]) -> str:
    return f"{row['mode']} on {row['ranks']} ranks, {row['speedup']:.1f} times as fast as one process"


def _command(row: Mapping[str, Any], modes: Mapping[str, Mode], flags: str, hosts: str) -> str:
    start = f"launch/hosts.sh -H {hosts}" if hosts else "launch/local.sh"
    return " ".join(f"{start} -np {row['ranks']} {flags} {modes[row['mode']].flags}".split())

"""Recommend a training mode in one sentence, with the command to run."""

from collections.abc import Mapping, Sequence
from typing import Any

from hvdkit.plan.cost import Mode

_NAMED_HOSTS = 4  # of more hosts, the command names only the first two and the last

WORTH = 1.1  # minimum speed-up over one process to recommend several
LOSSY_WORTH = 1.5  # minimum speed-up over the best exact mode to also name a lossy one


def advise(
    rows: Sequence[Mapping[str, Any]], modes: Mapping[str, Mode], flags: str, hosts: str, ranks_per_host: int
) -> str:
    """Return the recommendation and the command to run.

    Args:
        rows: predictions with `mode`, `ranks`, `samples_per_second` and `speedup`.
        modes: the training modes by name.
        flags: the user's flags of hvdkit.train.
        hosts: hosts in the form of `-H`; if empty, ranks beyond those of this host get names to fill in.
        ranks_per_host: maximum number of ranks on a host.
    """

    def command(row: Mapping[str, Any]) -> str:
        start = _launcher(row["ranks"], hosts, ranks_per_host)
        return " ".join(f"{start} -np {row['ranks']} {flags} {modes[row['mode']].flags}".split())

    several = [row for row in rows if row["ranks"] > 1]
    training = [row for row in several if row["mode"] != "independent"]
    exact = max((row for row in training if modes[row["mode"]].exact), key=_rate, default=None)
    lossy = max((row for row in training if not modes[row["mode"]].exact), key=_rate, default=None)
    if exact and exact["speedup"] >= WORTH:
        text = f"Use {_told(exact)}: {command(exact)}"
        if lossy and _rate(lossy) > LOSSY_WORTH * _rate(exact):
            text += f"\nIf the training bears it, {_told(lossy)}: {command(lossy)}"
        return text
    if lossy and lossy["speedup"] >= LOSSY_WORTH:
        return (
            f"Dense data parallelism does not pay here; {_told(lossy)}, but trains another way, so compare its "
            f"accuracy: {command(lossy)}"
        )
    best = (
        f" (the best, {exact['mode']} on {exact['ranks']} ranks, reaches {exact['speedup']:.2f} times its speed)"
        if exact
        else ""
    )
    return (
        f"Not at all: train in one process{best}, or run independent tasks, one a rank: "
        f"python -m hvdkit.train --strategy=single {flags}"
    )


def _rate(row: Mapping[str, Any]) -> float:
    return float(row["samples_per_second"])


def _told(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    ranks = "1 rank" if row["ranks"] == 1 else f"{row['ranks']} ranks"
    return (
        f"{row['mode']} on {ranks}, {row['speedup']:.1f} times as fast as one process ({low:,.0f} to {high:,.0f} "
        f"samples/s, the 90 % interval)"
    )


def _launcher(ranks: int, hosts: str, ranks_per_host: int) -> str:
    number = -(-ranks // ranks_per_host)
    if not hosts and number == 1:
        return "launch/local.sh"
    names = [f"HOST{n}:{ranks_per_host}" for n in range(1, number + 1)]
    names = names if number <= _NAMED_HOSTS else [*names[:2], "...", names[-1]]
    return f"launch/hosts.sh -H {hosts or ','.join(names)}"

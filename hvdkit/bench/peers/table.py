"""What the measurements say: a row per workload and peer, and hvdkit's script beside the best peer and one core."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hvdkit import reporting
from hvdkit.bench import statistic
from hvdkit.bench.peers.commands import ONE_CORE, OURS, SCRIPT

Measured = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]


def rows(measured: Measured, best: Mapping[tuple[str, str], Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return a row for each workload and peer.

    Args:
        measured: of each workload and peer, one measurement per round: `samples_per_second` and `step_seconds`.
        best: of each workload and peer, its thread setting.

    Returns:
        Rows with the median `samples_per_second`, the `lowest` and `highest` of the rounds, `slowest_round` (relative
        to the median), `slow_steps` (95th percentile of the step times over their median, median of the rounds),
        `ratio` (how many times as fast hvdkit's script was, in pairs of a round), `setting` and all `rounds`.
    """
    return [
        {
            "workload": name,
            "peer": peer,
            **_row(rounds, measured.get((name, SCRIPT))),
            "setting": dict(best[name, peer]),
        }
        for (name, peer), rounds in measured.items()
    ]


def _row(rounds: Sequence[Mapping[str, Any]], script: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    rates = _rates(rounds)
    middle = statistics.median(rates)
    return {
        "samples_per_second": middle,
        "lowest": min(rates),
        "highest": max(rates),
        "slowest_round": min(rates) / middle,
        "slow_steps": statistics.median(
            one["step_seconds"]["percentile_95"] / one["step_seconds"]["median"] for one in rounds
        ),
        "ratio": statistic.ratio(_rates(script), rates) if script else None,
        "rounds": [dict(one) for one in rounds],
    }


def _rates(rounds: Sequence[Mapping[str, Any]]) -> list[float]:
    return [one["samples_per_second"] for one in rounds]


def verdicts(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each workload, how many times as fast hvdkit's script was as the best peer, and as one core.

    The best peer is the one with the highest median, without hvdkit itself and one core. `best_peer`, its `ratio` and
    `one_core` are None if they were not measured.
    """
    made = []
    for name in dict.fromkeys(row["workload"] for row in found):
        by_peer = {row["peer"]: row for row in found if row["workload"] == name}
        others = [row for peer, row in by_peer.items() if peer not in (OURS, SCRIPT, ONE_CORE)]
        best = max(others, key=lambda row: row["samples_per_second"], default=None)
        made.append(
            {
                "workload": name,
                "best_peer": best and best["peer"],
                "ratio": best and best["ratio"],
                "one_core": by_peer.get(ONE_CORE, {}).get("ratio"),
            }
        )
    return made


def report(found: Mapping[str, Any]) -> str:
    """Format the results as two tables, with notes on the peers that were left out."""
    heads = [
        "workload",
        "peer",
        "samples/s",
        "lowest to highest",
        "slowest round / median",
        "p95 / median of step times",
    ]
    heads += ["steps per execution", f"{SCRIPT}, times as fast", "lowest to highest", "threads"]
    tables = [reporting.table(heads, [_cells(row) for row in found["rows"]])]
    judged = [
        [one["workload"], one["best_peer"] or "none", *_ratio(one["ratio"]), *_ratio(one["one_core"])]
        for one in found["verdicts"]
    ]
    beside = ["lowest to highest", "times as fast as one core", "lowest to highest"]
    tables.append(reporting.table([f"{SCRIPT}: workload", "best peer", "times as fast as it", *beside], judged))
    notes = [f"{peer} was left out: {why}" for peer, why in found["missing"].items()]
    return "\n\n".join([*tables, *(["\n".join(notes)] if notes else [])])


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["workload"],
        row["peer"],
        f"{row['samples_per_second']:,.0f}",
        f"{row['lowest']:,.0f} to {row['highest']:,.0f}",
        f"{row['slowest_round']:.2f}",
        f"{row['slow_steps']:.2f}",
        str(row["rounds"][-1]["step_seconds"]["steps_per_execution"]),
        *_ratio(row["ratio"]),
        _threads(row["setting"]),
    ]


def _ratio(ratio: Mapping[str, Any] | None) -> list[str]:
    if not ratio:
        return ["", ""]
    told = f"{ratio['median']:.2f}" + (" (noisy)" if ratio["noisy"] else "")
    return [told, f"{ratio['lowest']:.2f} to {ratio['highest']:.2f}"]


def _threads(setting: Mapping[str, str]) -> str:
    if not setting:
        return "its own"
    return setting["HVDKIT_BENCH_THREADS"] + (", bound" if setting["HVDKIT_BENCH_PIN"] == "1" else "")

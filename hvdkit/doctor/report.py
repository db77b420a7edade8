"""What the doctor shows: one table, the mends, one verdict; and the same for machines."""

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from hvdkit.doctor.checks.registry import FAILED, NOT_RUN, WARNING, Result
from hvdkit.doctor.findings import Findings

_HEAD = ("check", "result", "where", "found")
_WIDTH = 120


def show(found: Findings, results: Sequence[Result]) -> str:
    """The table, the mends and the verdict."""
    parts = [_table(results)]
    for status, head in ((FAILED, "To mend what failed:"), (WARNING, "To look into:")):
        mends = _mends(results, status)
        if mends:
            parts.append("\n".join([head, *mends]))
    return "\n\n".join([*parts, verdict(found, results)])


def verdict(found: Findings, results: Sequence[Result]) -> str:
    """One sentence."""
    hosts = ", ".join(f"{name}:{host.slots}" for name, host in found.hosts.items())
    checks = list(dict.fromkeys(result.check for result in results))
    bad = list(dict.fromkeys(result.check for result in results if result.status == FAILED))
    odd = list(dict.fromkeys(result.check for result in results if result.status == WARNING))
    ran = len(checks) - len({result.check for result in results if result.status == NOT_RUN})
    doubts = f", with {len(odd)} warning(s) ({', '.join(odd)})" if odd else ""
    if bad:
        return f"{hosts}: {len(bad)} of {ran} checks FAILED ({', '.join(bad)}){doubts}, in {found.seconds:.0f} s."
    return f"{hosts}: all is well{doubts}; {ran} checks in {found.seconds:.0f} s."


def as_json(found: Findings, results: Sequence[Result]) -> dict[str, Any]:
    """The results, and all that was found."""
    return {
        "ok": not any(result.status == FAILED for result in results),
        "verdict": verdict(found, results),
        "results": [dataclasses.asdict(result) for result in results],
        "findings": dataclasses.asdict(found),
    }


def _table(results: Sequence[Result]) -> str:
    rows = [_HEAD]
    for result in results:
        name = "" if rows[-1][0] == result.check or _last_named(rows) == result.check else result.check
        rows.append((name, result.status, result.where, result.found))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    room = max(40, min(_WIDTH, shutil.get_terminal_size((_WIDTH, 0)).columns) - sum(widths) - 6)
    lines = []
    for row in rows:
        first = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)) + "  "
        found = textwrap.wrap(row[3], room, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [(first if place == 0 else " " * len(first)) + text for place, text in enumerate(found)]
    return "\n".join(line.rstrip() for line in lines)


def _last_named(rows: Sequence[tuple[str, ...]]) -> str:
    return next((row[0] for row in reversed(rows) if row[0]), "")


def _mends(results: Sequence[Result], status: str) -> list[str]:
    """A line for each mend, in the order of the checks: what stands first is often the cause of what follows."""
    lines = []
    for result in results:
        for mend in result.mends if result.status == status else ():
            lines.append(f"  {result.check}: {f'on {mend.on}: ' if mend.on else ''}{mend.command}")
    return list(dict.fromkeys(lines))

"""What the doctor shows: one table, the mends, one verdict; and the same for machines."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hvdkit import reporting
from hvdkit.doctor.checks.registry import FAILED, NOT_RUN, WARNING, Result
from hvdkit.doctor.findings import Findings

_HEAD = ("check", "result", "where", "found")


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
    """A row for each result; a check that has several is named once."""
    rows, last = [], ""
    for result in results:
        rows.append(("" if result.check == last else result.check, result.status, result.where, result.found))
        last = result.check
    return reporting.table(_HEAD, rows)


def _mends(results: Sequence[Result], status: str) -> list[str]:
    """A line for each mend, in the order of the checks: what stands first is often the cause of what follows."""
    lines = []
    for result in results:
        for mend in result.mends if result.status == status else ():
            lines.append(f"  {result.check}: {f'on {mend.on}: ' if mend.on else ''}{mend.command}")
    return list(dict.fromkeys(lines))

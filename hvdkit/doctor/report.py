"""The doctor's report: a table, the fixes and a verdict, as text and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hvdkit import reporting
from hvdkit.doctor.checks.registry import FAILED, NOT_RUN, WARNING, Result
from hvdkit.doctor.findings import Findings

_HEAD = ("check", "result", "where", "found")


def show(found: Findings, results: Sequence[Result]) -> str:
    """Return the table, the fixes and the verdict as text."""
    parts = [_table(results)]
    for status, head in ((FAILED, "To fix what failed:"), (WARNING, "To look into:")):
        fixes = _fixes(results, status)
        if fixes:
            parts.append("\n".join([head, *fixes]))
    return "\n\n".join([*parts, verdict(found, results)])


def verdict(found: Findings, results: Sequence[Result]) -> str:
    """Return the verdict in one sentence."""
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
    """Return the results and all findings, ready for JSON."""
    return {
        "ok": not any(result.status == FAILED for result in results),
        "verdict": verdict(found, results),
        "results": [dataclasses.asdict(result) for result in results],
        "findings": dataclasses.asdict(found),
    }


def _table(results: Sequence[Result]) -> str:
    """Return a table with one row per result; only the first row of a check shows its name."""
    rows, last = [], ""
    for result in results:
        rows.append(("" if result.check == last else result.check, result.status, result.where, result.found))
        last = result.check
    return reporting.table(_HEAD, rows)


def _fixes(results: Sequence[Result], status: str) -> list[str]:
    """Return a line for each fix, in the order of the checks, because earlier failures often cause later ones."""
    lines = []
    for result in results:
        for fix in result.fixes if result.status == status else ():
            lines.append(f"  {result.check}: {f'on {fix.on}: ' if fix.on else ''}{fix.command}")
    return list(dict.fromkeys(lines))

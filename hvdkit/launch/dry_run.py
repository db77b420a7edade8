"""What `--dry-run` prints: the command, the environment and the ranks."""

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from hvdkit import reporting
from hvdkit.launch.binding import Binding
from hvdkit.launch.environment import SECRET, rank_environment


def describe(
    command: Sequence[str],
    common: Mapping[str, str],
    ranks: Sequence[tuple[Any, Binding, str]],
    started_by: Sequence[str] = (),
) -> str:
    """What `--dry-run` prints.

    Args:
        command: the command that each rank runs.
        common: the variables that all ranks have.
        ranks: each rank's slot, binding, and the way its host is reached.
        started_by: the command that starts all ranks, if the launcher does not start them itself.
    """
    lines = ["command of every rank:", f"    {shlex.join(command)}", "", "environment of every rank:"]
    if started_by:
        lines = ["started by:", f"    {shlex.join(started_by)}", "", *lines]
    lines += [f"    {name}={_shown(name, value)}" for name, value in sorted(common.items())]
    rows = []
    for slot, binding, reached in ranks:
        cores = _ranges(binding.cores) if binding.cores is not None else "shared"
        gpu = binding.gpu if binding.gpu is not None else f"local rank's ({slot.local_rank}), if any"
        rows.append([slot.rank, slot.hostname, cores, gpu, reached])
    drawn = reporting.table(["rank", "host", "cores", "GPU", "reached"], rows)
    lines += ["", "ranks:", textwrap.indent(drawn, "    ")]
    for slot, binding, _ in () if started_by else ranks:
        own = " ".join(f"{name}={value}" for name, value in sorted(rank_environment(slot, binding).items()))
        lines += ["", f"environment of rank {slot.rank} besides:", f"    {own}"]
    return "\n".join(lines)


def _shown(name: str, value: str) -> str:
    return value.rpartition("/")[0] + "/(the job's token)" if name == SECRET else value


def _ranges(cores: Sequence[int]) -> str:
    """`0-3,8` for 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][-1] + 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)

"""The environment, cores and GPU of each rank of a job."""

import dataclasses
import itertools
import os
import shlex
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from hvdkit import reporting
from hvdkit.errors import UsageError

SECRET = "HOROVOD_GLOO_RENDEZVOUS_ADDR"  # contains the job's token


@dataclasses.dataclass(frozen=True)
class Binding:
    """A rank's own cores and GPU; None if all ranks of the host share them."""

    cores: list[int] | None
    gpu: str | None


def bindings(
    about: Mapping[str, Any],
    ranks: int,
    bind: str,
    cores: Sequence[int] | None = None,
    gpus: Sequence[str] | None = None,
) -> list[Binding]:
    """Divides a host's cores and GPUs among its ranks.

    Each rank gets the same number of neighbouring cores. If the number does not divide, the first ranks get one more.
    With fewer cores than ranks, all ranks share all cores.

    Args:
        about: the agent's description of its host.
        ranks: number of ranks on the host.
        bind: `none`, `cores`, `gpus`, `both` or `auto`. `auto` binds whatever `cores` and `gpus` name, and cores on a
            host without GPUs that has several ranks: each rank then has its own caches and threads (1.3 times the
            speed of a small model on two cores).
        cores: the host's cores that the job may use; None for all. If they are fewer than ranks, all share them.
        gpus: likewise, by CUDA's names.

    Raises:
        UsageError: GPUs are to be bound and there are fewer than ranks, or the host lacks a named core or GPU.
    """
    if bind == "auto":
        parts = {(False, False): "none", (True, False): "cores", (False, True): "gpus", (True, True): "both"}
        bind = parts[cores is not None or (ranks > 1 and not about["gpus"]), gpus is not None]
    is_part = cores is not None
    cores = _those_named("cores", about, cores)
    gpus = _those_named("gpus", about, gpus)
    cores_each: list[list[int] | None] = [cores if is_part else None] * ranks
    if bind in ("cores", "both") and len(cores) >= ranks:
        ends = [(number * len(cores) + ranks - 1) // ranks for number in range(ranks + 1)]
        cores_each = [cores[begin:end] for begin, end in itertools.pairwise(ends)]
    if bind in ("gpus", "both") and len(gpus) < ranks:
        raise UsageError(
            f"--bind {bind} was given, but host {about['hostname']} shows {len(gpus)} GPU(s) for {ranks} ranks. Start "
            f"at most one rank for each GPU, or bind cores only: --bind cores."
        )
    binds_gpus = bind in ("gpus", "both")
    return [Binding(cores_each[number], gpus[number] if binds_gpus else None) for number in range(ranks)]


def _those_named(what: str, about: Mapping[str, Any], named: Sequence[Any] | None) -> list[Any]:
    """The named cores or GPUs in the host's order; all of them if none are named."""
    missing = [each for each in named or () if each not in about[what]]
    if missing:
        raise UsageError(
            f"--{what} names {', '.join(map(str, missing))}, and host {about['hostname']} has "
            f"{', '.join(map(str, sorted(about[what]))) or 'none'}. Name what every host has, or leave the option out."
        )
    return [each for each in about[what] if named is None or each in named]


def rank_environment(slot: Any, binding: Binding) -> dict[str, str]:
    """The variables of one rank, without those that all ranks have."""
    names = ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")
    variables = {f"HOROVOD_{name.upper()}": str(getattr(slot, name)) for name in names}
    variables["HOROVOD_HOSTNAME"] = slot.hostname
    if binding.cores is not None:
        variables["HVDKIT_OWN_CORES"] = "1"  # tells hvdkit.world to use all visible cores, not a part
    if binding.gpu is not None:
        variables["CUDA_VISIBLE_DEVICES"] = binding.gpu
    return variables


def job_environment(given: Mapping[str, str], *, start_limit: int, stall_limit: float | None) -> dict[str, str]:
    """The variables that all ranks have, on every host. The user's settings override the defaults here.

    Args:
        given: the launcher's own environment.
        start_limit: seconds for the ranks to find each other.
        stall_limit: seconds for the ranks to wait for each other; None for the environment's value, or ten minutes.
    """
    variables = {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "PYTHONUNBUFFERED": "1",  # a rank writes to a pipe, and its last output must not be lost when it dies
        # By default TensorFlow uses oneDNN only on CPUs with AVX512-VNNI or AMX. It is 2 to 6 times faster on others.
        "TF_ENABLE_ONEDNN_OPTS": given.get("TF_ENABLE_ONEDNN_OPTS") or "1",
    }
    # On a busy host, a rank may need more than Gloo's default of 30 s to load TensorFlow.
    variables["HOROVOD_GLOO_TIMEOUT_SECONDS"] = given.get("HOROVOD_GLOO_TIMEOUT_SECONDS") or str(max(start_limit, 30))
    if stall_limit is not None:
        variables["HVDKIT_STALL_SECONDS"] = f"{stall_limit:g}"
    # By default Horovod only warns of a stall. hvdkit.watchdog knows more and reports earlier.
    stall = given.get("HVDKIT_STALL_SECONDS") if stall_limit is None else f"{stall_limit:g}"
    shutdown = given.get("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS") or stall or "600"
    if shutdown.isdigit():
        variables["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] = shutdown
    return variables


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


def watched(is_terminal: bool) -> dict[str, str]:
    """Ranks write to a pipe, so only the launcher knows whether a person is watching, and how wide the terminal is."""
    if not is_terminal:
        return {}
    columns = str(shutil.get_terminal_size().columns)
    return {"HVDKIT_PROGRESS": os.environ.get("HVDKIT_PROGRESS", "bar"), "COLUMNS": columns}

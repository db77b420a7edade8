"""What each rank of a job is given: its place, its environment, its cores and its GPU."""

import dataclasses
import itertools
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from hvdkit.errors import UsageError

SECRET = "HOROVOD_GLOO_RENDEZVOUS_ADDR"  # it carries the job's token


@dataclasses.dataclass(frozen=True)
class Binding:
    """What of a host is a rank's own; None where all ranks of the host share it."""

    cores: list[int] | None
    gpu: str | None


def bindings(
    about: Mapping[str, Any],
    ranks: int,
    bind: str,
    cores: Sequence[int] | None = None,
    gpus: Sequence[str] | None = None,
) -> list[Binding]:
    """Shares a host's cores and GPUs out among its ranks.

    Cores are shared evenly, neighbours together, the first ranks having one more where they do not divide; with fewer
    cores than ranks nobody has a core of his own.

    Args:
        about: what the agent said of its host.
        ranks: number of ranks on the host.
        bind: `none`, `cores`, `gpus`, `both`; or `auto` for cores on a host without GPUs that has several ranks: each
            then has its caches, and its threads, to itself (1.3 times the speed of a small model on two cores); and
            for whatever was named.
        cores: those of the host's that the job may use; None for all. Where they are fewer than ranks, all share them.
        gpus: likewise, by CUDA's names.

    Raises:
        UsageError: GPUs are to be shared out, and there are fewer than ranks; or the host lacks a core or a GPU that
            was named.
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
    """What a host has of the cores or GPUs that were named, in the host's own order: all of it without names."""
    missing = [each for each in named or () if each not in about[what]]
    if missing:
        raise UsageError(
            f"--{what} names {', '.join(map(str, missing))}, and host {about['hostname']} has "
            f"{', '.join(map(str, sorted(about[what]))) or 'none'}. Name what every host has, or leave the option out."
        )
    return [each for each in about[what] if named is None or each in named]


def rank_environment(slot: Any, binding: Binding) -> dict[str, str]:
    """The variables of one rank, apart from those that all have."""
    names = ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")
    variables = {f"HOROVOD_{name.upper()}": str(getattr(slot, name)) for name in names}
    variables["HOROVOD_HOSTNAME"] = slot.hostname
    if binding.cores is not None:
        variables["HVDKIT_OWN_CORES"] = "1"  # hvdkit.world takes all that it sees, instead of a share
    if binding.gpu is not None:
        variables["CUDA_VISIBLE_DEVICES"] = binding.gpu
    return variables


def job_environment(given: Mapping[str, str], *, start_limit: int, stall_limit: float | None) -> dict[str, str]:
    """The variables that all ranks have, on every host: what the user set goes before the defaults here.

    Args:
        given: the launcher's own environment.
        start_limit: seconds for the ranks to find each other.
        stall_limit: seconds for the ranks to wait for each other; None for what is set, or ten minutes.
    """
    variables = {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "PYTHONUNBUFFERED": "1",  # a rank writes into a pipe, and what it said last must not die with it
        # TensorFlow itself uses oneDNN only on CPUs with AVX512-VNNI or AMX; on others it is 2 to 6 times faster, too.
        "TF_ENABLE_ONEDNN_OPTS": given.get("TF_ENABLE_ONEDNN_OPTS") or "1",
    }
    # Gloo's own 30 s are less than a rank may need to load TensorFlow on a host that does much else.
    variables["HOROVOD_GLOO_TIMEOUT_SECONDS"] = given.get("HOROVOD_GLOO_TIMEOUT_SECONDS") or str(max(start_limit, 30))
    if stall_limit is not None:
        variables["HVDKIT_STALL_SECONDS"] = f"{stall_limit:g}"
    # Horovod alone would only warn of a stall; hvdkit.watchdog, which knows more, speaks before it.
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
        command: what each rank runs.
        common: the variables that all ranks have.
        ranks: each rank's place, what is its own, and its host as it is reached.
        started_by: the command that starts them all, if it is not the launcher that does.
    """
    lines = ["command of every rank:", f"    {shlex.join(command)}", "", "environment of every rank:"]
    if started_by:
        lines = ["started by:", f"    {shlex.join(started_by)}", "", *lines]
    lines += [f"    {name}={_shown(name, value)}" for name, value in sorted(common.items())]
    lines += ["", "ranks:", "    rank  host                  cores            GPU              reached"]
    for slot, binding, reached in ranks:
        cores = _ranges(binding.cores) if binding.cores is not None else "shared"
        gpu = binding.gpu if binding.gpu is not None else f"local rank's ({slot.local_rank}), if any"
        lines.append(f"    {slot.rank:<5} {slot.hostname:<21} {cores:<16} {gpu:<16} {reached}")
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
    """Ranks write to a pipe, so only the launcher knows whether a person is watching."""
    return {"HVDKIT_PROGRESS": os.environ.get("HVDKIT_PROGRESS", "bar")} if is_terminal else {}

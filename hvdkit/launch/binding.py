"""The cores and GPU of each rank. The agent of its host binds the rank to them."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from hvdkit.errors import UsageError


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

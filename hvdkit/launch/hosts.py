"""The hosts of a job and their numbers of ranks: from -H, a host file, Slurm or a Kubernetes MPIJob.

This module only parses and connects to no host. `assign` gives each rank its slot with Horovod's own function, so ranks
and local ranks are those of `horovodrun`.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdkit.errors import UsageError

MPIJOB_HOSTFILE = "/etc/mpi/hostfile"  # Kubeflow's operator mounts it there (MPIJob v2beta1)
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")  # no leading dash, which ssh takes for an option
_GROUP = re.compile(r"([^,\[\]]*)(?:\[([^\]]+)\])?([^,\[\]]*)(?:,|$)")  # one part of Slurm's node list


@dataclasses.dataclass(frozen=True)
class Host:
    """A host's name and its number of slots: the most ranks that it runs."""

    name: str
    slots: int


def from_list(text: str) -> list[Host]:
    """The hosts of `h1:2,h2:2`. A name without a number has one slot.

    Raises:
        UsageError: the text has another form.
    """
    return _merged(_host(part.strip(), f"-H {text}") for part in text.split(","))


def from_file(path: str | Path) -> list[Host]:
    """The hosts of a file with one host per line: `h1 slots=2`, `h1:2` or `h1`; `#` starts a comment.

    A host on several lines gets the sum of the slots, as in MPI's machine files.

    Raises:
        UsageError: the file cannot be read, or a line has another form.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The host file {path} cannot be read ({error}). Give a file with lines like h1 slots=2."
        ) from None
    hosts = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if text:
            plain = re.sub(r"\s+max[-_]slots\s*=\s*\d+", "", text)
            hosts.append(_host(re.sub(r"\s+slots\s*=\s*", ":", plain), f"line {number} of {path}"))
    if not hosts:
        raise UsageError(f"The host file {path} names no host. Give a file with lines like h1 slots=2.")
    return _merged(hosts)


def from_slurm(environment: Mapping[str, str] = os.environ) -> list[Host]:
    """The nodes of this Slurm job, with one slot per Slurm task.

    Raises:
        UsageError: this is not a Slurm job, or its variables cannot be parsed.
    """
    nodes = environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_NODELIST")
    tasks = environment.get("SLURM_TASKS_PER_NODE") or environment.get("SLURM_STEP_TASKS_PER_NODE")
    if not nodes:
        raise UsageError(
            "--hosts-from slurm was given, but SLURM_JOB_NODELIST is not set. Start the launcher inside a job, with "
            "sbatch or salloc."
        )
    names = expand_nodes(nodes)
    slots = _tasks(tasks, len(names)) if tasks else [1] * len(names)
    return [Host(name, number) for name, number in zip(names, slots, strict=True)]


def from_kubernetes(environment: Mapping[str, str] = os.environ) -> list[Host]:
    """The workers of this MPIJob, from the host file that the operator mounts in the launcher's pod.

    Raises:
        UsageError: the file does not exist.
    """
    path = (
        environment.get("OMPI_MCA_orte_default_hostfile") or environment.get("I_MPI_HYDRA_HOST_FILE") or MPIJOB_HOSTFILE
    )
    if not Path(path).exists():
        raise UsageError(
            f"--hosts-from kubernetes was given, but there is no {path}. Start the launcher in the Launcher pod of a "
            f"Kubeflow MPIJob, or name the file: --hostfile FILE."
        )
    return from_file(path)


def expand_nodes(text: str) -> list[str]:
    """Expands Slurm's node lists: `gpu[01-03,7],login` is gpu01, gpu02, gpu03, gpu7, login.

    Raises:
        UsageError: the text has another form.
    """
    names: list[str] = []
    position = 0
    while position < len(text):
        part = _GROUP.match(text, position)
        if part is None or part.end() == position or not (part[1] or part[2]):
            raise UsageError(f"SLURM_JOB_NODELIST={text} is not understood; expected a form like gpu[01-03,7],login.")
        names += [f"{part[1]}{number}{part[3]}" for number in _numbers(part[2], text)] if part[2] else [part[1]]
        position = part.end()
    return [_host(name, f"SLURM_JOB_NODELIST={text}").name for name in names]


def numbers(text: str, option: str) -> list[int]:
    """Expands lists of cores as Linux writes them: `0-3,8` is 0, 1, 2, 3, 8.

    Raises:
        UsageError: the text has another form.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match or int(match[2] or match[1]) - int(match[1]) not in range(1 << 16):
            raise UsageError(f"{option} {text} is not understood: {part!r} is no number or range like 0-3.")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def assign(hosts: Sequence[Host], ranks: int) -> list[Any]:
    """Horovod's `SlotInfo` of each rank, in rank order.

    Raises:
        UsageError: there are fewer slots than ranks.
    """
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments

    total = sum(host.slots for host in hosts)
    if total < ranks:
        listed = ",".join(f"{host.name}:{host.slots}" for host in hosts)
        raise UsageError(
            f"-np {ranks} asks for more ranks than the hosts {listed} have slots ({total}). Give fewer ranks, or more "
            f"hosts or slots (-H {listed},another:{ranks - total})."
        )
    slots: list[Any] = get_host_assignments([HostInfo(host.name, host.slots) for host in hosts], ranks, ranks)
    return slots


def _host(text: str, where: str) -> Host:
    name, _, slots = text.partition(":")
    if not _NAME.fullmatch(name) or not re.fullmatch(r"[1-9]\d{0,5}", slots or "1"):
        raise UsageError(
            f"{where} has the host {text!r}; expected a name or IPv4 address and its number of ranks, as in h1:2."
        )
    return Host(name, int(slots or 1))


def _merged(hosts: Iterable[Host]) -> list[Host]:
    slots: dict[str, int] = {}
    for host in hosts:
        slots[host.name] = slots.get(host.name, 0) + host.slots
    return [Host(name, number) for name, number in slots.items()]


def _numbers(text: str, whole: str) -> list[str]:
    """`01-03,7` is 01, 02, 03, 7: Slurm keeps leading zeros."""
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match or int(match[2] or match[1]) - int(match[1]) not in range(1 << 16):
            raise UsageError(f"SLURM_JOB_NODELIST={whole} is not understood: {part!r} is no range like 01-03.")
        numbers += [str(n).zfill(len(match[1])) for n in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return numbers


def _tasks(text: str, nodes: int) -> list[int]:
    """`2(x3),1` is 2, 2, 2, 1."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)(?:\(x(\d+)\))?", part.strip())
        if match:
            tasks += [int(match[1])] * int(match[2] or 1)
    if len(tasks) != nodes:
        raise UsageError(
            f"SLURM_TASKS_PER_NODE={text} does not give the tasks of each of the {nodes} node(s); expected a form like "
            f"2(x3),1."
        )
    return tasks

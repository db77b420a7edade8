"""The resources of a host: shared memory, disks, open files."""

import shlex
from collections.abc import Iterator

from hvdkit.doctor.checks.registry import Fix, Result, check, failed, fine, not_run, sudo, summary
from hvdkit.doctor.findings import Findings

_MIB, _GIB = 1 << 20, 1 << 30
# NCCL and MPI pass messages within a host through /dev/shm. NCCL takes about 10 MiB per pair of ranks and channel.
SHM_BYTES, SHM_BYTES_FOR_GPUS = 64 * _MIB, 512 * _MIB
DISK_BYTES = _GIB
# Gloo keeps several connections to every other rank, and data sets have many files.
OPEN_FILES, OPEN_FILES_FOR_A_RANK = 1024, 8


@check("shm", asks="shm")
def shared_memory(found: Findings) -> Iterator[Result]:
    """/dev/shm has room for the messages between the ranks of a host."""
    for name, space in found.answered("shm").items():
        needed = SHM_BYTES_FOR_GPUS if found.hosts[name].answers.get("gpus", {}).get("gpus") else SHM_BYTES
        if space["free"] < needed:
            text = (
                f"{_size(space['free'])} of {_size(space['size'])} is free in /dev/shm, and {_size(needed)} is needed"
            )
            fix = Fix(f"{sudo(found, name)}mount -o remount,size=2G /dev/shm  # a container: --shm-size=2g", name)
            yield failed(name, text, fix)
    yield _free({name: space["free"] for name, space in found.answered("shm").items()})


@check("disk", asks="disk")
def disk(found: Findings) -> Iterator[Result]:
    """There is room in the workdir and for temporary files."""
    workdir = found.settings["workdir"]
    for name, places in found.answered("disk").items():
        for what, space in ((f"runs in {workdir}", places["workdir"]), ("temporary files", places["temporary"])):
            path = space["path"]
            if space["free"] < DISK_BYTES:
                text = f"{_size(space['free'])} is free for {what}, and {_size(DISK_BYTES)} is needed"
                yield failed(name, text, Fix(f"df -h {shlex.quote(path)}; du -xh / 2>/dev/null | sort -h | tail", name))
    yield _free({name: places["workdir"]["free"] for name, places in found.answered("disk").items()})


@check("workdir")
def workdir(found: Findings) -> Iterator[Result]:
    """The workdir is writable."""
    path = found.settings["workdir"]
    for name in found.reached:
        problem = found.hosts[name].problems.get("workdir")
        if problem:
            yield failed(
                name, f"{path} cannot be written: {problem.partition(': ')[2]}", _make_writable(found, name, problem)
            )
    seen = found.answered("marks")
    shared = len(seen) > 1 and all(len(marks) == len(seen) for marks in seen.values())
    own = "; each host has its own" if len(seen) > 1 else ""
    yield (
        fine(f"{path} is writable{'; all hosts share it' if shared else own}")
        if seen
        else not_run("no host was reached")
    )


def _make_writable(found: Findings, name: str, problem: str) -> Fix:
    path = shlex.quote(found.settings["workdir"])
    if "Read-only" in problem:
        path = shlex.quote(found.hosts[name].answers.get("disk", {}).get("workdir", {}).get("path", path))
        return Fix(f'{sudo(found, name)}mount -o remount,rw "$(df --output=target {path} | tail -n 1)"', name)
    if problem.startswith(("NotADirectoryError", "FileExistsError")):
        return Fix(f"ls -ld {path}  # a file is in the way: remove it, or name another place with --workdir=DIR", name)
    return Fix(f'{sudo(found, name)}install -d -o "$USER" {path}', name)


@check("files", asks="files")
def open_files(found: Findings) -> Iterator[Result]:
    """A process may open as many files and connections as a rank needs."""
    needed = max(OPEN_FILES, OPEN_FILES_FOR_A_RANK * sum(host.slots for host in found.hosts.values()))
    limits = found.answered("files")
    for name, limit in limits.items():
        if 0 <= limit["soft"] < needed:  # -1: no limit
            text = f"at most {limit['soft']:,} open files per process, and a rank needs {needed:,}"
            lines = "'* soft nofile 65536' '* hard nofile 65536'"
            target = "/etc/security/limits.d/90-hvdkit.conf"
            yield failed(
                name, text, Fix(f"printf '%s\\n' {lines} | {sudo(found, name)}tee {target}  # then log in again", name)
            )
    if limits:
        yield fine(
            summary({n: "no limit" if v["soft"] < 0 else f"{v['soft']:,} per process" for n, v in limits.items()})
        )
    else:
        yield not_run("no host was reached")


def _free(space: dict[str, int]) -> Result:
    if not space:
        return not_run("no host was reached")
    return fine(summary({name: f"{_size(free)} free" for name, free in space.items()}))


def _size(count: float) -> str:
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / _MIB:,.0f} MiB"

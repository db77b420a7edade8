"""Collectives between ranks on one host, through shared memory instead of the network.

Between CPU ranks of one host, Horovod only has TCP over loopback. It needs about 3 ms for the gradients of a small
model on two cores, where the model itself takes 1 ms. `hvdkit.native` needs 0.3 ms. It is selected when a job starts,
for all ranks together. It runs `collectives.reduce_dense` and `collectives.gather_rows`, over all ranks or a process
set. Everything else uses Horovod. So do jobs on several hosts, and jobs on GPUs (NCCL has its own shared memory).
Elastic jobs (`horovodrun --min-np`) do so, too: the death of a rank must end a collective, which only Horovod can do.
"""

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from hvdkit import native, watchdog
from hvdkit.collectives.transports.base import Kind, Scale, Transport, Usage, in_any_order, may_block
from hvdkit.errors import UsageError
from hvdkit.world.devices import usable_cores
from hvdkit.world.introduction import introduce
from hvdkit.world.ranks import World

_FOLDER = Path("/dev/shm")
SUMMED = {"float16", "bfloat16", "float32", "float64"}
GATHERED = {*SUMMED, "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"}
_BYTES_A_RANK = 1 << 20  # per segment: two chunks, as in shared_memory.cc
_SEGMENTS = 16  # number of segments that must fit at the start
_STALE = 3600.0  # seconds after which a segment where ranks have not met belongs to a killed job
_log = logging.getLogger(__name__)
_LACKING = (
    "The ranks of this host exchange over the loopback network, several times slower than through memory, because %s. "
    "HVDKIT_SHARED_MEMORY=0 says that this is meant."
)


class SharedMemory(Transport):
    """Shared memory segments of this host, one per name of a collective.

    Args:
        rank: the rank of this process.
        size: number of ranks; all of them are on this host.
        token: the same on all ranks; hides the segments from ranks of other jobs or users.
        own_core: whether this rank has a core of its own, so it may spin while it waits.
    """

    name = "shared memory"
    key = "shared"
    scatters_by_allreduce = True

    def __init__(self, rank: int, size: int, token: str, own_core: bool) -> None:
        self.token = token
        self._rank, self._size, self._own_core = rank, size, own_core
        self._has_exchanged = False
        watchdog.when_the_job_fails(self._remove_segments)

    @classmethod
    def start(cls, world: World, preferred: Sequence[Transport]) -> "SharedMemory | None":
        """Decides with all ranks whether they share memory, and no other transport is better."""
        answers, lack = _introduce(world, instead=_what_is_used_instead(world))
        instead = next((a["instead"] for a in answers if a["instead"]), "")
        if lack and not instead and world.is_root:
            _log.warning(_LACKING, lack)
        if instead or lack:
            return None
        return cls(world.rank, world.size, answers[0]["token"], owns_a_core(world))

    @classmethod
    def within_hosts(cls, world: World) -> "SharedMemory | None":
        """Returns shared memory among the ranks of this host, in a job on several hosts; None if a host has none."""
        disabled = "HVDKIT_SHARED_MEMORY=0 is set" if os.environ.get("HVDKIT_SHARED_MEMORY") == "0" else ""
        answers, lack = _introduce(world, instead=disabled)
        if any(a["instead"] for a in answers):
            return None
        if lack and world.is_root:
            _log.warning(_LACKING, lack)
        first = next(a for a in answers if a["host"] == world.cross_rank)
        return None if lack else cls(world.rank, world.size, first["token"], owns_a_core(world))

    def serves(self, kind: Kind, dtype: tf.DType, process_set: Any) -> bool:
        """Returns True for sums of floats, and for rows of all numeric dtypes."""
        return dtype.name in (SUMMED if kind == "allreduce" else GATHERED)

    def allreduce(
        self, tensors: Sequence[tf.Tensor], name: str, process_set: Any, *, scale: Scale, overlaps: bool = False
    ) -> list[tf.Tensor]:
        """Sums on every rank what all ranks have written, in rank order."""
        return self.sum_over(self._ranks(process_set), tensors, name, scale, overlaps)

    def allgather(self, tensors: Sequence[tf.Tensor], name: str, process_set: Any) -> list[tf.Tensor]:
        """Reads on every rank what all ranks have written."""
        return [self.gather_over(self._ranks(process_set), tensors[0], name)]

    def sum_over(
        self, ranks: Sequence[int], tensors: Sequence[tf.Tensor], name: str, scale: Scale, overlaps: bool = False
    ) -> list[tf.Tensor]:
        """Sums tensors over ranks of this host; see `allreduce`."""
        place = self._place(name, tensors[0].dtype, ranks)
        divisor = len(ranks) if scale.average else 1
        factors = {"before": repr(float(scale.before)), "after": repr(float(scale.after)), "divisor": divisor}
        with tf.device("CPU:0"):
            return in_any_order(native.load().hvdkit_shared_sum(list(tensors), name=name, **factors, **place), overlaps)

    def gather_over(self, ranks: Sequence[int], tensor: tf.Tensor, name: str, overlaps: bool = False) -> tf.Tensor:
        """Concatenates rows over ranks of this host; see `allgather`."""
        place = self._place(name, tensor.dtype, ranks)
        with tf.device("CPU:0"):
            return in_any_order([native.load().hvdkit_shared_gather(tensor, name=name, **place)], overlaps)[0]

    def refuse_to_join(self) -> None:
        """Raises if this rank stops calling collectives: in shared memory the other ranks would hang.

        Raises:
            UsageError: gradients of this rank went through shared memory.
        """
        if self._has_exchanged:
            raise UsageError(
                "hvdkit.join() was called after exchanges through shared memory, which need all ranks. Give every rank "
                "as many steps with hvdkit.data.shard(..., uneven='join'), or set HVDKIT_SHARED_MEMORY=0 for all ranks."
            )

    def usage(self) -> Usage:
        """Returns the statistics of the compiled operations."""
        in_all, waiting, number, brought = native.exchange_times()
        return Usage(in_all / 1e9, waiting / 1e9, number, brought)

    def describe(self) -> str:
        """Describes the folder, the ranks, and how they wait."""
        waits = "spin on cores of their own" if self._own_core else "sleep"
        return f"shared memory ({_FOLDER}, {self._size} ranks, which {waits} while they wait)"

    def _remove_segments(self) -> None:
        """Removes the names of segments where not all ranks have met: the others will not come."""
        for path in _FOLDER.glob(f"hvdkit-{self.token}-*"):
            path.unlink(missing_ok=True)

    def _ranks(self, process_set: Any) -> list[int]:
        return list(range(self._size)) if process_set.process_set_id == 0 else list(process_set.ranks)

    def _place(self, name: str, dtype: tf.DType, ranks: Sequence[int]) -> dict[str, Any]:
        """Returns the path of the segment, this rank's position among the ranks that use it, and how it waits."""
        self._has_exchanged = True
        key = hashlib.sha256(f"{name} {dtype.name} {list(ranks)}".encode()).hexdigest()[:16]
        return {
            "path": str(_FOLDER / f"hvdkit-{self.token}-{key}"),
            "rank": ranks.index(self._rank),
            "size": len(ranks),
            "own_core": self._own_core,
            "blocks": may_block(),
        }


def owns_a_core(world: World) -> bool:
    """Returns whether this rank has a core of its own, so it may spin while it waits."""
    return os.environ.get("HVDKIT_OWN_CORES") == "1" or usable_cores() >= world.local_size


def _introduce(world: World, instead: str) -> tuple[list[dict[str, Any]], str]:
    """Returns the answers of all ranks, and what the ranks of a host lack to share memory. A collective call."""
    if world.local_rank == 0:
        remove_stale()
    mine = {
        "instead": instead,
        "lack": _lack(world),
        "token": f"{_process_ids()}.{os.getpid()}.{secrets.token_hex(8)}",
        "where": _where(),
        "host": world.cross_rank,
    }
    answers = introduce(mine, "memory")
    lack = next((a["lack"] for a in answers if a["lack"]), "")
    if not lack and len({(a["host"], a["where"]) for a in answers}) > len({a["host"] for a in answers}):
        lack = f"they do not see the same {_FOLDER}: start them in one container, or with one volume for it"
    return answers, lack


def remove_stale() -> None:
    """Removes this user's segments of jobs that were killed before all their ranks had met.

    Once all ranks have met, a segment has no name any more, and disappears with its last process.
    """
    for path in _FOLDER.glob("hvdkit-*-*"):
        with contextlib.suppress(OSError):  # another job's rank may be faster
            found = path.stat()
            is_old = time.time() - found.st_mtime > _STALE
            if found.st_uid == os.getuid() and (is_old or _is_of_the_dead(path.name.split("-")[1])):
                path.unlink()


def _is_of_the_dead(token: str) -> bool:
    """Returns whether the process that made a token, a rank of this host, has ended."""
    ids, _, rest = token.partition(".")
    pid = rest.partition(".")[0]
    return ids == _process_ids() and pid.isdecimal() and not Path("/proc", pid).exists()


def _process_ids() -> str:
    """Returns which process ids these are: those of another container mean nothing here."""
    return str(Path("/proc/self/ns/pid").stat().st_ino)


def _what_is_used_instead(world: World) -> str:
    """Returns the reason to prefer Horovod for this job; empty if shared memory is preferable."""
    if os.environ.get("HVDKIT_SHARED_MEMORY") == "0":
        return "HVDKIT_SHARED_MEMORY=0 is set"
    if world.local_size != world.size:
        return "the ranks are on several hosts"
    if tf.config.list_physical_devices("GPU"):
        return "there are GPUs"
    return "ranks may come and go" if os.environ.get("HOROVOD_ELASTIC") == "1" else ""


def _lack(world: World) -> str:
    """Returns what is missing on this rank's host, with the fix."""
    if not native.is_built():
        return "hvdkit.native is not compiled for this TensorFlow: python -m hvdkit.native"
    needed = _SEGMENTS * world.local_size * _BYTES_A_RANK
    if not _FOLDER.is_dir() or shutil.disk_usage(_FOLDER).free < needed:
        return f"{_FOLDER} has less than {needed >> 20} MiB free: give it more (docker run --shm-size=1g)"
    return ""


def _where() -> str:
    """Returns an identifier of this host's folder, which differs between hosts and between containers."""
    boot, folder = Path("/proc/sys/kernel/random/boot_id"), _FOLDER.stat() if _FOLDER.is_dir() else None
    return f"{boot.read_text().strip() if boot.is_file() else ''} {folder and (folder.st_dev, folder.st_ino)}"

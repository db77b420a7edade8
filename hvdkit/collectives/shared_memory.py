"""Exchanges between ranks that share a host, through its memory instead of its network.

Horovod has no way between CPU ranks of one host but TCP over loopback: about 3 ms for the gradients of a small model on
two cores, where the model itself takes 1 ms. `hvdkit.native` does it in 0.3 ms. It is chosen when a job begins, for
all ranks alike, and carries what `collectives.reduce_dense` and `collectives.gather_rows` move, of all ranks or of a
process set. Everything else stays with Horovod, and so do jobs on several hosts, on GPUs (NCCL does this itself), and
those whose ranks come and go (`horovodrun --min-np`: there a death must end an exchange, which only Horovod can do).
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

from hvdkit import native
from hvdkit.errors import UsageError
from hvdkit.world.devices import usable_cores
from hvdkit.world.introduction import introduce
from hvdkit.world.ranks import World

_FOLDER = Path("/dev/shm")
_SUMMED = {"float16", "bfloat16", "float32", "float64"}
_GATHERED = {*_SUMMED, "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"}
_BYTES_A_RANK = 1 << 20  # of a segment: two chunks, as in shared_memory.cc
_SEGMENTS = 16  # that must fit, for a start
_STALE = 3600.0  # seconds after which a segment where ranks have not met is one of a job that was killed
_log = logging.getLogger(__name__)

_job: "_Job | None" = None


class _Job:
    """How this process takes part."""

    def __init__(self, world: World, token: str) -> None:
        self.rank, self.size = world.rank, world.size
        self.has_exchanged = False
        self._token = token
        # Who waits may spin if nobody else needs the core.
        self.own_core = os.environ.get("HVDKIT_OWN_CORES") == "1" or usable_cores() >= world.local_size

    def path(self, name: str) -> str:
        """The segment of an exchange; ranks of another job, or user, find none of its parts."""
        return str(_FOLDER / f"hvdkit-{self._token}-{hashlib.sha256(name.encode()).hexdigest()[:16]}")


def start(world: World) -> None:
    """Agrees with all ranks whether their exchanges go through memory. A collective call, before TensorFlow starts."""
    global _job
    if world.local_rank == 0:
        remove_stale()
    mine = {
        "instead": _what_is_used_instead(world),
        "lack": _lack(world),
        "token": secrets.token_hex(8),
        "where": _where(),
    }
    answers = introduce(mine, "memory")
    instead, lack = (next((a[what] for a in answers if a[what]), "") for what in ("instead", "lack"))
    if not lack and len({a["where"] for a in answers}) > 1:
        lack = f"they do not see the same {_FOLDER}: start them in one container, or with one volume for it"
    _job = None if instead or lack else _Job(world, answers[0]["token"])
    if lack and not instead and world.is_root:
        _log.warning(
            "The ranks of this host exchange over the loopback network, several times slower than through memory, "
            "because %s. HVDKIT_SHARED_MEMORY=0 says that this is meant.", lack,
        )  # fmt: skip


def stop() -> None:
    """Forgets the job; a segment goes with the last process that has it open."""
    global _job
    _job = None


def remove_stale() -> None:
    """Removes what jobs of this user have left that were killed before their ranks had met there.

    Where all have met, a segment has no name any more, and goes with its last process.
    """
    for path in _FOLDER.glob("hvdkit-*-*"):
        with contextlib.suppress(OSError):  # another job's rank may be faster
            found = path.stat()
            if found.st_uid == os.getuid() and time.time() - found.st_mtime > _STALE:
                path.unlink()


def is_used() -> bool:
    """Whether sums and rows go through shared memory in this job."""
    return _job is not None


def refuse_to_join() -> None:
    """Ends a job whose rank leaves the exchanges to the others: in shared memory they would wait for it.

    Raises:
        UsageError: gradients of this rank went through shared memory.
    """
    if _job is not None and _job.has_exchanged:
        raise UsageError(
            "hvdkit.join() was called after exchanges through shared memory, which need all ranks. Give every rank as "
            "many steps with hvdkit.data.shard(..., uneven='join'), or set HVDKIT_SHARED_MEMORY=0 for all ranks."
        )


def sums(dtype: tf.DType) -> bool:
    """Whether `reduce` takes the place of Horovod's allreduce; alike on all ranks."""
    return _job is not None and dtype.name in _SUMMED


def gathers(dtype: tf.DType) -> bool:
    """Whether `gather` takes the place of Horovod's allgather; alike on all ranks."""
    return _job is not None and dtype.name in _GATHERED


def reduce(
    tensors: Sequence[tf.Tensor], name: str, process_set: Any, *, before: float, after: float, divisor: int
) -> list[tf.Tensor]:
    """Sums tensors over the ranks of a process set, as part of the graph that is being traced.

    Args:
        tensors: dense, of one dtype that `sums`, in the same order and of the same shapes on all ranks.
        name: the same on all ranks, and in use for no other exchange of this graph.
        process_set: the Horovod process set that takes part; this rank is in it.
        before: factor before the sum.
        after: factor after the sum.
        divisor: what the sum is divided by, too.
    """
    place = _place(name, tensors[0].dtype, process_set)
    with tf.device("CPU:0"):
        return native.load().hvdkit_shared_sum(
            list(tensors), before=before, after=after, divisor=divisor, name=name, **place
        )


def gather(tensor: tf.Tensor, name: str, process_set: Any) -> tf.Tensor:
    """Puts the rows of the ranks of a process set one after another, as part of the graph that is being traced.

    Args:
        tensor: of a dtype that `gathers`; ranks' numbers of rows may differ, and the other dimensions are alike.
        name: the same on all ranks, and in use for no other exchange of this graph.
        process_set: the Horovod process set that takes part; this rank is in it.
    """
    with tf.device("CPU:0"):
        return native.load().hvdkit_shared_gather(tensor, name=name, **_place(name, tensor.dtype, process_set))


def _place(name: str, dtype: tf.DType, process_set: Any) -> dict[str, Any]:
    """Where the ranks meet, and who this one is among them."""
    if _job is None:
        raise RuntimeError("hvdkit.collectives.shared_memory is not in use.")
    _job.has_exchanged = True
    ranks = list(range(_job.size)) if process_set.process_set_id == 0 else list(process_set.ranks)
    return {
        "path": _job.path(f"{name} {dtype.name} {ranks}"),
        "rank": ranks.index(_job.rank),
        "size": len(ranks),
        "own_core": _job.own_core,
    }


def _what_is_used_instead(world: World) -> str:
    """Why Horovod is right for this job; empty if nothing but a lack speaks for it."""
    if os.environ.get("HVDKIT_SHARED_MEMORY") == "0":
        return "HVDKIT_SHARED_MEMORY=0 is set"
    if world.local_size != world.size:
        return "the ranks are on several hosts"
    if tf.config.list_physical_devices("GPU"):
        return "there are GPUs"
    return "ranks may come and go" if os.environ.get("HOROVOD_ELASTIC") == "1" else ""


def _lack(world: World) -> str:
    """What is missing on this rank's host, with the mend."""
    if not native.is_built():
        return "hvdkit.native is not compiled for this TensorFlow: python -m hvdkit.native"
    needed = _SEGMENTS * world.size * _BYTES_A_RANK
    if not _FOLDER.is_dir() or shutil.disk_usage(_FOLDER).free < needed:
        return f"{_FOLDER} has less than {needed >> 20} MiB free: give it more (docker run --shm-size=1g)"
    return ""


def _where() -> str:
    """Tells one host's folder from another's, and a container's from its neighbour's."""
    boot, folder = Path("/proc/sys/kernel/random/boot_id"), _FOLDER.stat() if _FOLDER.is_dir() else None
    return f"{boot.read_text().strip() if boot.is_file() else ''} {folder and (folder.st_dev, folder.st_ino)}"

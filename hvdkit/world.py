"""Who am I: this process among all processes of the job, and the GPU or the CPU cores that are its own.

This module owns the start and the end of Horovod, the `World` that describes the result, and the pinning of devices.
It does not move tensors: see `hvdkit.collectives`.
"""

import dataclasses
import logging
import math
import os
import socket
import sys
from typing import Any

from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class World:
    """This process's place in the job, in Horovod's words.

    Attributes:
        rank: number of this process, from 0 to `size - 1`.
        size: number of processes in the job.
        local_rank: number of this process on its host.
        local_size: number of processes on this host.
        cross_rank: number of this host among the hosts that run a process with this `local_rank`.
        cross_size: number of such hosts.
        host: this host's name.

    Raises:
        ValueError: a rank does not lie below its size.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    host: str

    def __post_init__(self) -> None:
        pairs = {
            "rank/size": (self.rank, self.size),
            "local_rank/local_size": (self.local_rank, self.local_size),
            "cross_rank/cross_size": (self.cross_rank, self.cross_size),
        }
        wrong = [f"{name} = {r}/{n}" for name, (r, n) in pairs.items() if not 0 <= r < n]
        if wrong:
            raise ValueError(f"Each rank must lie in 0..size-1, but {', '.join(wrong)} in {self}.")

    @classmethod
    def single(cls) -> "World":
        """The world of a process that runs alone: the null implementation, so that no caller asks "if distributed"."""
        return cls(0, 1, 0, 1, 0, 1, socket.gethostname())

    @property
    def is_root(self) -> bool:
        """Whether this process is rank 0: the one that shows progress and writes artefacts."""
        return self.rank == 0


_world: World | None = None
_has_devices = False  # TensorFlow takes them once a process, also where `init` is called again


def init(*args: Any, **kwargs: Any) -> World:
    """Starts Horovod and takes this rank's share of the host: its GPU, or its part of the CPU cores.

    Call it before TensorFlow makes its first tensor: devices and threads are fixed from then on. With GPUs, the one
    whose number is the local rank is made the only visible one, with memory growth. Without, TensorFlow's
    intra-op threads are set to this rank's share of the cores that the process may use. If a rank waits for others in
    an exchange for ten minutes, the job ends (`HVDKIT_STALL_SECONDS` sets another limit, 0 none; see
    `hvdkit.watchdog`).

    Args:
        *args: passed to `horovod.tensorflow.init` (process sets, for example).
        **kwargs: likewise.

    Returns:
        The `World` of this process. Calling `init` again returns the same world.

    Raises:
        ImportError: Horovod is not installed, or was built for another TensorFlow.
        UsageError: this host has GPUs, but fewer than ranks; or its own name does not resolve; or a limit in the
            environment is not a number.
    """
    global _world, _has_devices
    if _world is None:
        _check_own_name()
        _leave_stalls_to_hvdkit()
        hvd = horovod()
        hvd.init(*args, **kwargs)
        world = World(
            rank=hvd.rank(),
            size=hvd.size(),
            local_rank=hvd.local_rank(),
            local_size=hvd.local_size(),
            cross_rank=hvd.cross_rank(),
            cross_size=hvd.cross_size(),
            host=socket.gethostname(),
        )
        _world = world
        if not _has_devices:
            _take_devices(world)
            _has_devices = True
    return _world


def enter(world: World) -> World:
    """Makes `world` the current one without Horovod: for a process that trains alone, or in tests of one process."""
    global _world
    _world = world
    return world


def shutdown() -> None:
    """Leaves the job: no collective may follow. A second `init` starts anew."""
    global _world
    if _world is not None:
        if _world.size > 1 or "horovod" in sys.modules:
            horovod().shutdown()
        _world = None


def is_initialized() -> bool:
    """Whether `init` was called, and `shutdown` was not."""
    return _world is not None


def current() -> World:
    """The world that `init` returned.

    Raises:
        RuntimeError: `init` was not called.
    """
    if _world is None:
        raise RuntimeError("hvdkit is not initialised: call hvdkit.init() at the start of the script.")
    return _world


def rank() -> int:
    """Number of this process, from 0 to `size() - 1`."""
    return current().rank


def size() -> int:
    """Number of processes in the job."""
    return current().size


def local_rank() -> int:
    """Number of this process on its host."""
    return current().local_rank


def local_size() -> int:
    """Number of processes on this host."""
    return current().local_size


def cross_rank() -> int:
    """Number of this host among the hosts that run a process with this local rank."""
    return current().cross_rank


def cross_size() -> int:
    """Number of hosts that run a process with this local rank."""
    return current().cross_size


def launched_size() -> int:
    """How many processes the launcher started, before any library is loaded: 1 where there was no launcher."""
    return _launched("SIZE", 1)


def launched_rank() -> int:
    """The rank that the launcher gave this process, before any library is loaded: 0 where there was no launcher."""
    return _launched("RANK", 0)


def _launched(what: str, alone: int) -> int:
    launchers = (f"HOROVOD_{what}", f"OMPI_COMM_WORLD_{what}", f"PMI_{what}")
    return next((int(os.environ[v]) for v in launchers if os.environ.get(v, "").isdigit()), alone)


def usable_cores() -> int:
    """CPU cores that this process may run on (its affinity mask, which containers and `taskset` narrow)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def horovod() -> Any:
    """The module `horovod.tensorflow`, or an `ImportError` that says how to get it."""
    try:
        import horovod.tensorflow as hvd
    except (ImportError, OSError) as error:
        raise ImportError(
            f"hvdkit needs Horovod 0.28.1 built for the TensorFlow that is installed here, but importing it failed "
            f"with: {error}. `pip install horovod` does not compile against it; from a checkout of hvdkit run "
            f"`launch/bootstrap.sh --into PREFIX`, where PREFIX is this Python environment."
        ) from error
    return hvd


def stall_limit() -> float:
    """Seconds that a rank may wait for the others before the job ends; 0 for no limit.

    Raises:
        UsageError: `HVDKIT_STALL_SECONDS` is not a number from 0 up.
    """
    given = os.environ.get("HVDKIT_STALL_SECONDS") or os.environ.get("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS") or "600"
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < math.inf:
        raise UsageError(
            f"HVDKIT_STALL_SECONDS={given} is not a number of seconds. Give how long a rank may wait for the others "
            f"before the job ends, as in HVDKIT_STALL_SECONDS=600, or 0 for ever."
        )
    return limit


def stall_aborts() -> bool:
    """Whether a stall ends the job, or is only reported (`HVDKIT_STALL_ACTION=warn`).

    Raises:
        UsageError: `HVDKIT_STALL_ACTION` is neither.
    """
    action = os.environ.get("HVDKIT_STALL_ACTION") or "abort"
    if action not in ("abort", "warn"):
        raise UsageError(f"HVDKIT_STALL_ACTION={action} is unknown. Use abort, which is the default, or warn.")
    return action == "abort"


def _leave_stalls_to_hvdkit() -> None:
    """Lets Horovod's own stall check, which knows less, speak only where the watchdog could not."""
    limit, aborts = stall_limit(), stall_aborts()
    os.environ["HVDKIT_STALL_SECONDS"] = f"{limit:g}"  # for a second `init`, which finds Horovod's changed
    if limit:
        latest = math.ceil(3 * limit)  # the watchdog gives a rank that may be busy three times the limit
        os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(latest + 30))
        os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] = str(latest + 60 if aborts else 0)


def _check_own_name() -> None:
    """Gloo looks up this host's own name, and ends the process with a segmentation fault if there is no such host."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        if launched_size() > 1:
            raise UsageError(
                f"This host's own name, {name}, does not resolve, and Horovod's Gloo crashes on that. Add its address "
                f"to /etc/hosts: echo '127.0.0.1 {name}' >> /etc/hosts for a job on this host alone, the address by "
                f"which other hosts reach it otherwise."
            ) from None


def _take_devices(world: World) -> None:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    try:
        if gpus:
            _pin_gpu(tf, gpus, world)
        else:
            # A rank that the launcher bound to cores of its own sees those alone.
            share_cores(tf, 1 if os.environ.get("HVDKIT_OWN_CORES") == "1" else world.local_size)
    except RuntimeError:  # TensorFlow has already started: its devices and threads can no longer be changed
        _log.warning(
            "hvdkit.init() was called after TensorFlow had started, so this rank keeps TensorFlow's default devices "
            "and threads; call hvdkit.init() before the first tensor or model is made."
        )


def _pin_gpu(tf: Any, gpus: list[Any], world: World) -> None:
    # A launcher that already hides the other ranks' GPUs (CUDA_VISIBLE_DEVICES, Slurm's --gpus-per-task) leaves one.
    number = 0 if len(gpus) == 1 and world.local_size > 1 and _one_gpu_each() else world.local_rank
    if number >= len(gpus):
        raise UsageError(
            f"{world.local_size} ranks were started on host {world.host}, which shows {len(gpus)} GPU(s): each rank "
            f"needs one of its own. Start at most {len(gpus)} ranks on this host (for example -H {world.host}:"
            f"{len(gpus)}), or hide the GPUs with CUDA_VISIBLE_DEVICES='' to train on the CPU."
        )
    tf.config.set_visible_devices(gpus[number], "GPU")
    for gpu in gpus:  # all, so that a script that says so of each, as Horovod's examples do, changes nothing
        tf.config.experimental.set_memory_growth(gpu, True)


def _one_gpu_each() -> bool:
    return len([g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]) == 1


def share_cores(tf: Any, processes: int) -> None:
    """Gives TensorFlow one of `processes` equal shares of the usable cores, unless the user set threads himself."""
    threads = max(1, usable_cores() // processes)
    if "TF_NUM_INTRAOP_THREADS" not in os.environ:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
    if "TF_NUM_INTEROP_THREADS" not in os.environ:
        # Two at least: an exchange that waits for other ranks must not hold up the input pipeline.
        tf.config.threading.set_inter_op_parallelism_threads(max(2, threads))

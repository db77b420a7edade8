"""This process's rank among all processes of the job.

This module starts and stops Horovod, holds the `World`, and has the rank's devices assigned. It does not send tensors:
see `hvdkit.collectives`.
"""

import dataclasses
import logging
import os
import socket
import sys
from typing import Any

from hvdkit.errors import NotInitializedError, UsageError
from hvdkit.world.devices import take_devices
from hvdkit.world.limits import leave_stalls_to_hvdkit

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class World:
    """This process's position in the job, in Horovod's terms.

    Attributes:
        rank: index of this process, from 0 to `size - 1`.
        size: number of processes in the job.
        local_rank: index of this process on its host.
        local_size: number of processes on this host.
        cross_rank: index of this host among the hosts that run a process with this `local_rank`.
        cross_size: number of such hosts.
        host: this host's name.

    Raises:
        ValueError: a rank is not smaller than its size.
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
        """Returns the world of a single process: callers then need no special case without a launcher."""
        return cls(0, 1, 0, 1, 0, 1, socket.gethostname())

    @property
    def is_root(self) -> bool:
        """Whether this process is rank 0, which shows progress and writes artifacts."""
        return self.rank == 0


_world: World | None = None
_has_devices = False  # configure devices once per process, even if `init` is called again


def init(*args: Any, **kwargs: Any) -> World:
    """Starts Horovod and assigns this rank its GPU, or its share of the CPU cores.

    Call it before TensorFlow makes its first tensor, which fixes devices and threads. With GPUs, only the one whose
    index is the local rank stays visible, with memory growth. Without GPUs, TensorFlow gets as many intra-op threads as
    this rank's share of the cores that the process may use. If a rank waits in a collective for ten minutes, the job
    ends (set `HVDKIT_STALL_SECONDS` for a different limit, 0 for none; see `hvdkit.watchdog`).

    Args:
        *args: passed to `horovod.tensorflow.init` (process sets, for example).
        **kwargs: passed to `horovod.tensorflow.init`.

    Returns:
        The `World` of this process. Calling `init` again returns the same world.

    Raises:
        ImportError: Horovod is not installed, or was built for a different TensorFlow.
        UsageError: this host has GPUs, but fewer than ranks; or its own name does not resolve; or a limit in the
            environment is not a number.
    """
    global _world, _has_devices
    if _world is None:
        _check_own_name()
        leave_stalls_to_hvdkit()
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
            take_devices(world.local_rank, world.local_size, world.host)
            _has_devices = True
    return _world


def enter(world: World) -> World:
    """Makes `world` the current one without Horovod, for training or tests in a single process."""
    global _world
    _world = world
    return world


def shutdown() -> None:
    """Stops Horovod. Do not run collectives afterwards; you may call `init` again."""
    global _world
    if _world is not None:
        if _world.size > 1 or "horovod" in sys.modules:
            horovod().shutdown()
        _world = None


def is_initialized() -> bool:
    """Returns whether `init` was called, and `shutdown` was not called after it."""
    return _world is not None


def current() -> World:
    """Returns the world that `init` returned.

    Raises:
        NotInitializedError: `init` was not called.
    """
    if _world is None:
        raise NotInitializedError("hvdkit is not initialised: call hvdkit.init() at the start of the script.")
    return _world


def rank() -> int:
    """Returns the index of this process, from 0 to `size() - 1`."""
    return current().rank


def size() -> int:
    """Returns the number of processes in the job."""
    return current().size


def local_rank() -> int:
    """Returns the index of this process on its host."""
    return current().local_rank


def local_size() -> int:
    """Returns the number of processes on this host."""
    return current().local_size


def cross_rank() -> int:
    """Returns the index of this host among the hosts that run a process with this local rank."""
    return current().cross_rank


def cross_size() -> int:
    """Returns the number of hosts that run a process with this local rank."""
    return current().cross_size


def launched_size() -> int:
    """Returns the number of processes that the launcher started, 1 without a launcher. Needs no library."""
    return _launched("SIZE", 1)


def launched_rank() -> int:
    """Returns the rank that the launcher gave this process, 0 without a launcher. Needs no library."""
    return _launched("RANK", 0)


def _launched(what: str, alone: int) -> int:
    launchers = (f"HOROVOD_{what}", f"OMPI_COMM_WORLD_{what}", f"PMI_{what}")
    return next((int(os.environ[v]) for v in launchers if os.environ.get(v, "").isdigit()), alone)


def horovod() -> Any:
    """Returns the module `horovod.tensorflow`, or raises an `ImportError` that says how to install it."""
    try:
        import horovod.tensorflow as hvd
    except (ImportError, OSError) as error:
        raise ImportError(
            f"hvdkit needs Horovod 0.28.1 built for the TensorFlow that is installed here, but importing it failed "
            f"with: {error}. `pip install horovod` does not compile against it; from a checkout of hvdkit run "
            f"`launch/bootstrap.sh --into PREFIX`, where PREFIX is this Python environment."
        ) from error
    return hvd


def _check_own_name() -> None:
    """Checks that this host's own name resolves: otherwise Gloo ends the process with a segmentation fault."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        if launched_size() > 1:
            raise UsageError(
                f"This host's own name, {name}, does not resolve, which makes Horovod's Gloo crash. Add it to "
                f"/etc/hosts: echo '127.0.0.1 {name}' >> /etc/hosts for a job on this host only; otherwise with the "
                f"address that other hosts use for it."
            ) from None

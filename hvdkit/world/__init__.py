"""This process's rank among all processes of the job, and its GPU or CPU cores.

`ranks` starts and stops Horovod and holds the `World`, `devices` assigns this rank's GPU or cores, `limits` reads the
stall limits. `introduction` is not imported here, because it loads TensorFlow.
"""

from hvdkit.world.devices import gpu_available, share_cores, usable_cores
from hvdkit.world.limits import stall_aborts, stall_limit
from hvdkit.world.ranks import (
    World,
    cross_rank,
    cross_size,
    current,
    enter,
    horovod,
    init,
    is_initialized,
    launched_rank,
    launched_size,
    local_rank,
    local_size,
    rank,
    shutdown,
    size,
)

__all__ = [
    "World",
    "cross_rank",
    "cross_size",
    "current",
    "enter",
    "gpu_available",
    "horovod",
    "init",
    "is_initialized",
    "launched_rank",
    "launched_size",
    "local_rank",
    "local_size",
    "rank",
    "share_cores",
    "shutdown",
    "size",
    "stall_aborts",
    "stall_limit",
    "usable_cores",
]

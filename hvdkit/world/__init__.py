"""Who am I: this process among all processes of the job, and the GPU or the CPU cores that are its own.

`ranks` starts and ends Horovod and holds the `World`, `devices` takes this rank's GPU or cores, `limits` reads the
limits on stalls. `introduction` is not handed on here: it loads TensorFlow.
"""

from hvdkit.world.devices import share_cores, usable_cores
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

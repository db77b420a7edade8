"""hvdkit: Keras 3 on TensorFlow, trained across GPUs and hosts with Horovod.

`import hvdkit as hvd` is the whole public API. Names are loaded when they are first used (PEP 562), so that
`python -m hvdkit.launch` and a check of flags need not wait for TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hvdkit import callbacks, data, strategies
    from hvdkit.collectives import (
        allgather_object,
        average_variables,
        barrier,
        broadcast_object,
        broadcast_variables,
    )
    from hvdkit.compression import Compression
    from hvdkit.errors import ReplicasDiverged, UsageError
    from hvdkit.optimizer import Average, DistributedOptimizer, Sum, scaled
    from hvdkit.world import (
        World,
        cross_rank,
        cross_size,
        init,
        is_initialized,
        local_rank,
        local_size,
        rank,
        shutdown,
        size,
    )

_HOME = {
    "hvdkit.collectives": (
        "allgather_object", "average_variables", "barrier", "broadcast_object", "broadcast_variables",
    ),
    "hvdkit.compression": ("Compression",),
    "hvdkit.errors": ("ReplicasDiverged", "UsageError"),
    "hvdkit.optimizer": ("Average", "DistributedOptimizer", "Sum", "scaled"),
    "hvdkit.world": (
        "World", "cross_rank", "cross_size", "init", "is_initialized", "local_rank", "local_size", "rank",
        "shutdown", "size",
    ),
}  # fmt: skip
_MODULES = ("callbacks", "data", "strategies")
_NAMES = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Average",
    "Compression",
    "DistributedOptimizer",
    "ReplicasDiverged",
    "Sum",
    "UsageError",
    "World",
    "allgather_object",
    "average_variables",
    "barrier",
    "broadcast_object",
    "broadcast_variables",
    "callbacks",
    "cross_rank",
    "cross_size",
    "data",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "scaled",
    "shutdown",
    "size",
    "strategies",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"hvdkit.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'hvdkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""hvdkit: Keras 3 on TensorFlow, trained across GPUs and hosts with Horovod.

`import hvdkit as hvd` is the whole public API. Names are loaded when they are first used (PEP 562), so that
`python -m hvdkit.launch` and a check of flags need not wait for TensorFlow.
"""

import importlib
from typing import Any

from hvdkit import versions

versions.check()  # before anything that a wrong version would break in a way nobody understands

__version__ = "0.1.0"

# Where each public name lives.
_HOME = {
    "hvdkit.model.batch_normalization": ("SyncBatchNormalization", "synchronize_batch_normalization"),
    "hvdkit.collectives": (
        "allgather_object", "average_variables", "barrier", "broadcast_object", "broadcast_variables",
    ),
    "hvdkit.compression": ("Compression",),
    "hvdkit.errors": ("ReplicasDiverged", "UsageError"),
    "hvdkit.model.evaluation": ("evaluate", "predict"),
    "hvdkit.optimizers.gradient_tape": ("DistributedGradientTape", "PartialDistributedGradientTape"),
    "hvdkit.runtime": ("init", "shutdown"),
    "hvdkit.optimizers.local_sgd": ("LocalSGD",),
    "hvdkit.collectives.mesh": ("Mesh",),
    "hvdkit.collectives.operations": (
        "allgather", "allreduce", "alltoall", "broadcast", "broadcast_global_variables",
        "grouped_allgather", "grouped_allreduce", "grouped_reducescatter", "join", "reducescatter",
    ),
    "hvdkit.optimizers.distributed": ("DistributedOptimizer", "PartialDistributedOptimizer", "scaled"),
    "hvdkit.optimizers.sharded": ("ShardedOptimizer",),
    "hvdkit.model.saving": ("load_model",),
    "hvdkit.world": (
        "World", "cross_rank", "cross_size", "is_initialized", "local_rank", "local_size", "rank", "size",
    ),
    # Horovod's own, as they are.
    "horovod.tensorflow": (
        "Adasum", "Average", "Max", "Min", "ProcessSet", "Product", "Sum", "add_process_set", "ccl_built", "cuda_built",
        "ddl_built", "global_process_set", "gloo_built", "gloo_enabled", "is_homogeneous", "mpi_built", "mpi_enabled",
        "mpi_threads_supported", "nccl_built", "remove_process_set", "rocm_built", "start_timeline", "stop_timeline",
    ),
}  # fmt: skip
_MODULES = ("callbacks", "data", "elastic", "parallel", "strategies")
_NAMES = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "LocalSGD",
    "Max",
    "Mesh",
    "Min",
    "PartialDistributedGradientTape",
    "PartialDistributedOptimizer",
    "ProcessSet",
    "Product",
    "ReplicasDiverged",
    "ShardedOptimizer",
    "Sum",
    "SyncBatchNormalization",
    "UsageError",
    "World",
    "add_process_set",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "average_variables",
    "barrier",
    "broadcast",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_variables",
    "callbacks",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "data",
    "ddl_built",
    "elastic",
    "evaluate",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "load_model",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "parallel",
    "predict",
    "rank",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "scaled",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
    "strategies",
    "synchronize_batch_normalization",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"hvdkit.{name}")
    if name in _NAMES:
        home = _NAMES[name]
        if home == "horovod.tensorflow":
            from hvdkit import world

            return getattr(world.horovod(), name)  # which says what to do where Horovod is missing
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'hvdkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

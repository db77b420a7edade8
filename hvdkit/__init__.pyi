"""The public face: every name of `import hvdkit as hvd`, once, with its type.

`hvdkit/__init__.py` reads this page to know what there is and where to load it from when it is first used; editors and
type checkers read it for signatures. A line `from home import name as name` makes a name of hvdkit's public, and a
declaration makes one of Horovod's public, which is handed on as it is: Horovod ships no types.
"""

from collections.abc import Sequence
from typing import Any

__version__: str
__all__: list[str]

# Start and end, and who this process is.
from hvdkit.runtime import init as init
from hvdkit.runtime import shutdown as shutdown
from hvdkit.world import World as World
from hvdkit.world import cross_rank as cross_rank
from hvdkit.world import cross_size as cross_size
from hvdkit.world import is_initialized as is_initialized
from hvdkit.world import local_rank as local_rank
from hvdkit.world import local_size as local_size
from hvdkit.world import rank as rank
from hvdkit.world import size as size

def is_homogeneous() -> bool:
    """Whether all hosts have the same number of ranks."""

# Train with `model.fit`: data, optimizers, callbacks, and what `fit` and `evaluate` mean on many ranks.
from hvdkit import callbacks as callbacks
from hvdkit import data as data
from hvdkit.compression import Compression as Compression
from hvdkit.model.adapting import adapt as adapt
from hvdkit.model.batch_normalization import SyncBatchNormalization as SyncBatchNormalization
from hvdkit.model.batch_normalization import synchronize_batch_normalization as synchronize_batch_normalization
from hvdkit.model.evaluation import evaluate as evaluate
from hvdkit.model.evaluation import predict as predict
from hvdkit.model.saving import load_model as load_model
from hvdkit.optimizers.distributed import DistributedOptimizer as DistributedOptimizer
from hvdkit.optimizers.distributed import PartialDistributedOptimizer as PartialDistributedOptimizer
from hvdkit.optimizers.distributed import scaled as scaled
from hvdkit.optimizers.local_sgd import LocalSGD as LocalSGD
from hvdkit.optimizers.sharded import ShardedOptimizer as ShardedOptimizer

# Train with a loop, or a loss over all ranks' examples, of your own.
from hvdkit.collectives.whole_batch import whole_batch as whole_batch
from hvdkit.optimizers.gradient_tape import DistributedGradientTape as DistributedGradientTape
from hvdkit.optimizers.gradient_tape import PartialDistributedGradientTape as PartialDistributedGradientTape
from hvdkit.optimizers.weighing import shard_loss as shard_loss

# Choose how gradients meet, divide a model over ranks, go on when ranks come and go.
from hvdkit import elastic as elastic
from hvdkit import parallel as parallel
from hvdkit import strategies as strategies
from hvdkit.collectives.mesh import Mesh as Mesh

# Collectives: of tensors, of weights, of Python objects.
from hvdkit.collectives import allgather_object as allgather_object
from hvdkit.collectives import average_variables as average_variables
from hvdkit.collectives import barrier as barrier
from hvdkit.collectives import broadcast_object as broadcast_object
from hvdkit.collectives import broadcast_object_fn as broadcast_object_fn
from hvdkit.collectives import broadcast_variables as broadcast_variables
from hvdkit.collectives.operations import allgather as allgather
from hvdkit.collectives.operations import allreduce as allreduce
from hvdkit.collectives.operations import alltoall as alltoall
from hvdkit.collectives.operations import broadcast as broadcast
from hvdkit.collectives.operations import broadcast_global_variables as broadcast_global_variables
from hvdkit.collectives.operations import grouped_allgather as grouped_allgather
from hvdkit.collectives.operations import grouped_allreduce as grouped_allreduce
from hvdkit.collectives.operations import grouped_reducescatter as grouped_reducescatter
from hvdkit.collectives.operations import join as join
from hvdkit.collectives.operations import reducescatter as reducescatter
from hvdkit.collectives.variables import broadcast_ as broadcast_

Adasum: int
Average: int
Max: int
Min: int
Product: int
Sum: int

# Ranks and sizes as tensors, which a graph reads when it runs.
def rank_op(name: str | None = None) -> Any:
    """Index of this process, an int32 scalar."""

def size_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """Number of processes in a process set, an int32 scalar."""

def local_rank_op(name: str | None = None) -> Any:
    """Index of this process on its host, an int32 scalar."""

def local_size_op(name: str | None = None) -> Any:
    """Number of processes on this host, an int32 scalar."""

def process_set_included_op(process_set_id: int = 0, name: str | None = None) -> Any:
    """1 if this process is in a process set, else 0; an int32 scalar."""

# Process sets: collectives among some of the ranks.
class ProcessSet:
    """Ranks that run collectives among themselves: pass it to `init` or `add_process_set`, then as `process_set=`."""

    process_set_id: int | None
    ranks: list[int] | None
    def __init__(self, ranks_or_comm: Sequence[int] | Any) -> None: ...
    def size(self) -> int | None:
        """How many ranks are in it; None before it is initialized."""

    def rank(self) -> int | None:
        """This rank's number in it; None before it is initialized."""

    def included(self) -> bool | None:
        """Whether this rank is in it; None before it is initialized."""

global_process_set: ProcessSet

def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Adds a set after `init`, with HOROVOD_DYNAMIC_PROCESS_SETS=1: on all ranks, with the same ranks."""

def remove_process_set(process_set: ProcessSet) -> bool:
    """Removes a set that was added, on all ranks; whether that worked."""

# What went wrong.
from hvdkit.errors import ReplicasDiverged as ReplicasDiverged
from hvdkit.errors import UsageError as UsageError

# What Horovod records, how it was built, and what it uses.
from hvdkit.world import gpu_available as gpu_available

def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Records a timeline of the collectives, with HOROVOD_TIMELINE=DYNAMIC."""

def stop_timeline() -> None:
    """Ends the timeline, and closes its file."""

def ccl_built() -> bool:
    """Whether Horovod was built with oneCCL."""

def cuda_built() -> bool:
    """Whether Horovod was built with CUDA."""

def ddl_built() -> bool:
    """Whether Horovod was built with DDL."""

def gloo_built() -> bool:
    """Whether Horovod was built with Gloo."""

def gloo_enabled() -> bool:
    """Whether ranks meet over Gloo."""

def mpi_built() -> bool:
    """Whether Horovod was built with MPI."""

def mpi_enabled() -> bool:
    """Whether ranks meet over MPI."""

def mpi_threads_supported() -> bool:
    """Whether MPI may be used from several threads."""

def nccl_built() -> int:
    """NCCL's version if Horovod was built with it, else 0."""

def rocm_built() -> bool:
    """Whether Horovod was built with ROCm."""

"""Train Keras 3 models on TensorFlow with Horovod, on many GPUs and hosts: four lines of a Keras script change.

    import hvdkit as hvd
    hvd.init()                                  # who am I; my GPU, my cores
    dataset = hvd.data.shard(dataset)           # my even share, as many steps as everyone
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(hvd.scaled(1e-3))), loss=loss, metrics=metrics)
    model.fit(dataset, epochs=5, callbacks=hvd.callbacks.standard())

Start it with: hvdkit launch -np 4 -- python train_mine.py

What you want to do, and what does it:

    Start, and know which rank this is     init, rank, size, local_rank, local_size, shutdown, World
    Give each rank its share of the data   data.shard, data.even_share
    Average gradients in model.fit         DistributedOptimizer, scaled; PartialDistributedOptimizer for layers that
                                           stay each rank's own
    ... in a training loop of your own     DistributedGradientTape, shard_loss, broadcast_variables
    ... with a loss over all examples      whole_batch
    Add what fit needs on many ranks       callbacks.standard; callbacks has each by its name
    Learn vocabularies and statistics      adapt
    Evaluate and predict on all ranks      evaluate, predict
    Average metrics and BatchNorm          callbacks.MetricAverageCallback, synchronize_batch_normalization
    Save, and resume from a checkpoint     callbacks.CheckpointCallback, load_model
    Send less, or less often               Compression, LocalSGD
    Keep optimizer state once              ShardedOptimizer
    Divide a model over several ranks      Mesh, parallel.split_tensors, parallel.split_branches, parallel.pipeline
    Go on when ranks come and go           elastic.run, elastic.KerasState
    Move tensors between ranks             allreduce, allgather, broadcast, alltoall, reducescatter, barrier, join
    Move Python objects                    broadcast_object, allgather_object
    Use only some of the ranks             ProcessSet, add_process_set
    Find out what is wrong                 UsageError, ReplicasDiverged; nccl_built, gloo_built, mpi_built;
                                           start_timeline, callbacks.ProfileCallback

Names and arguments are Horovod's where Horovod has them, so an old script changes its import alone. A name is loaded
when it is first used: `import hvdkit` does not load TensorFlow.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

from hvdkit import versions

versions.check()  # before anything that a wrong version would break in a way nobody understands

__version__ = "0.1.0"


def _read_stub() -> dict[str, str]:
    """Each public name, and the module that has it, from `__init__.pyi`."""
    homes: dict[str, str] = {}
    for statement in ast.parse(Path(__file__).with_name("__init__.pyi").read_text("utf-8")).body:
        if isinstance(statement, ast.ImportFrom):
            homes.update({alias.asname: str(statement.module) for alias in statement.names if alias.asname})
        elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
            homes[statement.name] = "horovod.tensorflow"
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            homes[statement.target.id] = "horovod.tensorflow"
    return {name: home for name, home in homes.items() if not name.startswith("_")}


_HOMES = _read_stub()
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hvdkit' has no attribute {name!r}")
    home = _HOMES[name]
    if home == "hvdkit":
        return importlib.import_module(f"hvdkit.{name}")
    if home == "horovod.tensorflow":
        from hvdkit import world

        return getattr(world.horovod(), name)  # which says what to do where Horovod is missing
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__

"""Model parallelism: divide a model over several ranks by tensors, by branches, or by layers in a pipeline.

    mesh = hvd.Mesh(model=2)    # two ranks hold one copy of the model
    hvd.init(mesh=mesh)
    dataset = hvd.data.shard(dataset, mesh.data_index, mesh.data)    # a shard for each copy of the model
    model = hvd.parallel.split_tensors(model, mesh)    # or split_branches, or pipeline
    model.compile(hvd.DistributedOptimizer(...), ...)
    model.fit(dataset, callbacks=hvd.callbacks.standard())
    whole = hvd.parallel.gather(model)    # a plain Keras model, on rank 0

With `hvdkit.ShardedOptimizer`, every rank holds the whole model, and only the optimizer's state is divided.

Gradients, clipping, metrics, checkpoints and guards are those of the whole model.
"""

from hvdkit.collectives.mesh import Mesh
from hvdkit.parallel.branches import split_branches
from hvdkit.parallel.pipeline import PipelinedModel, pipeline
from hvdkit.parallel.sizes import divisions
from hvdkit.parallel.tensor import split_tensors
from hvdkit.parallel.whole_model import gather

__all__ = ["Mesh", "PipelinedModel", "divisions", "gather", "pipeline", "split_branches", "split_tensors"]

"""Which variables a training has, and whether each is common to all ranks, a rank's own, a metric's or a seed."""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from hvdkit.collectives.mesh import copy_index, mesh_of
from hvdkit.compat.keras3 import gradient_accumulators, is_seed, layers_of
from hvdkit.optimizers.distributed import keeps_local
from hvdkit.optimizers.parts import optimizers_of, parts_of
from hvdkit.optimizers.sharded import ShardedOptimizer
from hvdkit.optimizers.whole_slots import WholeSlot

COMMON, OWN, METRIC, SEED = "common", "own", "metric", "seed"


@dataclasses.dataclass(frozen=True)
class Kept:
    """A variable, and how ranks stand to it: one of the constants above."""

    variable: Any
    kind: str
    columns: int = 0  # ranks that hold the model between them, if it is divided: rank r has what rank r mod that has

    @property
    def signature(self) -> list[Any]:
        """What must be the same where it is restored: shape, dtype and kind; and the path, for messages."""
        return [self.variable.path, list(self.variable.shape), str(self.variable.dtype), self.kind]

    def parts(self) -> list[tf.Variable]:
        """The TensorFlow variables behind it: under `tf.distribute` one a replica; of a divided slot none."""
        if isinstance(self.variable, WholeSlot):
            return []
        native = getattr(self.variable, "value", self.variable)
        return list(getattr(native, "values", None) or [native])


def kept_of(model: keras.Model) -> list[Kept]:
    """All variables that training changes, each once, in an order that is the same in each run of a program."""
    optimizers = optimizers_of(model)
    frozen = {id(v) for layer in layers_of(model) if not layer.trainable for v in layer.weights}
    gathered = {id(v) for v in model.non_trainable_weights if "float" in str(v.dtype)} - frozen
    accumulators = {id(v) for o in optimizers for part in parts_of(o) for v in gradient_accumulators(part)}
    metrics = {id(v): v for metric in model.metrics for v in metric.variables}
    slots = [v for optimizer in optimizers for v in _slots(optimizer)]
    everything = {id(v): v for v in [*model.variables, *slots]}

    def kind(variable: Any) -> str:
        if isinstance(variable, WholeSlot):
            return COMMON
        if is_seed(variable):
            return SEED
        own = (
            id(variable) in accumulators
            or id(variable) in gathered
            or any(keeps_local(o, variable) for o in optimizers)
        )
        return OWN if own else COMMON

    kept = [Kept(v, kind(v)) for i, v in everything.items() if i not in metrics and v.dtype != "string"]
    kept += [Kept(v, METRIC) for v in metrics.values() if v.dtype != "string"]
    mesh = mesh_of(model.weights)
    return [dataclasses.replace(k, columns=mesh.model) for k in kept] if mesh else kept


def _slots(optimizer: Any) -> list[Any]:
    return optimizer.whole_variables() if isinstance(optimizer, ShardedOptimizer) else optimizer.variables


def seeds_of(model: keras.Model) -> list[Any]:
    """The states of a model's seed generators, int [seed, counter] each."""
    return [v for v in model.variables if is_seed(v)]


def tell_seeds_apart(model: keras.Model) -> None:
    """Makes seeds that are equal on all ranks different again: ranks would drop the same units of other examples."""
    for variable in seeds_of(model):
        seed = keras.ops.convert_to_numpy(variable)
        seed[0] += copy_index(model)  # ranks that hold one model between them drop the same units
        variable.assign(seed)

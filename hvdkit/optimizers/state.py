"""The variables of a training run, and whether each is synchronized, local to a rank, untracked, a metric or a seed."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from hvdkit.collectives.mesh import copy_index, mesh_of
from hvdkit.compat.keras3 import gradient_accumulators, is_seed, layers_of, native_variable
from hvdkit.compat.preprocessing import LEARNING
from hvdkit.optimizers.distributed import keeps_local
from hvdkit.optimizers.parts import leaves_of, optimizers_of, parts_of
from hvdkit.optimizers.sharded import ShardedOptimizer
from hvdkit.optimizers.whole_slots import WholeSlot

COMMON, OWN, METRIC, SEED, UNTRACKED = "common", "own", "metric", "seed", "untracked"


@dataclasses.dataclass(frozen=True)
class Kept:
    """A variable of a training run.

    Attributes:
        variable: the variable, or a `WholeSlot`.
        kind: one of the constants above.
        local: whether an optimizer keeps it local; then its kind is OWN, or SEED.
        columns: for a sharded model, how many ranks hold it together: rank r has the shards of rank r mod `columns`.
    """

    variable: Any
    kind: str
    local: bool = False
    columns: int = 0

    @property
    def signature(self) -> list[Any]:
        """What must match where the variable is restored: shape, dtype and kind; the path is for messages."""
        return [self.path, list(self.variable.shape), str(self.variable.dtype), self.kind]

    @property
    def path(self) -> str:
        """Its name in Keras, or in TensorFlow."""
        return getattr(self.variable, "path", None) or self.variable.name

    def parts(self) -> list[tf.Variable]:
        """Returns its TensorFlow variables: under `tf.distribute` one per replica; none for a sharded slot."""
        if isinstance(self.variable, WholeSlot):
            return []
        native = self.variable if isinstance(self.variable, tf.Variable) else self.variable.value
        return list(getattr(native, "values", None) or [native])


def kept_of(model: keras.Model) -> list[Kept]:
    """Returns all variables that training changes, each once, in an order that is the same in each run of a program."""
    optimizers = optimizers_of(model)
    frozen = {id(v) for layer in layers_of(model) if not layer.trainable for v in layer.weights}
    gathered = {id(v) for v in model.non_trainable_weights if "float" in str(v.dtype)} - frozen
    accumulators = {id(v) for o in optimizers for part in parts_of(o) for v in gradient_accumulators(part)}
    metrics = {id(v): v for metric in model.metrics for v in metric.variables}
    slots = [v for optimizer in optimizers for v in _slots(optimizer)]
    everything = {id(v): v for v in [*model.variables, *slots]}

    def describe(variable: Any) -> Kept:
        if isinstance(variable, WholeSlot):
            return Kept(variable, COMMON)
        local = any(keeps_local(o, variable) for o in optimizers)
        if is_seed(variable):
            return Kept(variable, SEED, local)
        own = local or id(variable) in accumulators or id(variable) in gathered
        return Kept(variable, OWN if own else COMMON, local)

    kept = [describe(v) for i, v in everything.items() if i not in metrics and v.dtype != "string"]
    known = {i for v in [*everything.values(), *metrics.values()] for i in (id(v), id(native_variable(v)))}
    kept += [Kept(v, UNTRACKED) for v in {id(v): v for v in _untracked(model) if id(v) not in known}.values()]
    kept += [Kept(v, METRIC) for v in metrics.values() if v.dtype != "string"]
    mesh = mesh_of(model.weights)
    return [dataclasses.replace(k, columns=mesh.model) for k in kept] if mesh else kept


def _untracked(model: keras.Model) -> Iterator[Any]:
    """Yields variables in attributes of layers, which are unknown to Keras: states of stateful RNNs, `tf.Variable`s."""
    for layer in layers_of(model):
        if isinstance(layer, LEARNING):
            continue
        for value in list(vars(layer).values()):
            for leaf in leaves_of(value):
                found = leaf.state if isinstance(leaf, tf.random.Generator) else leaf
                if isinstance(found, (keras.Variable, tf.Variable)) and found.dtype not in ("string", tf.string):
                    yield found


def _slots(optimizer: Any) -> list[Any]:
    return optimizer.whole_variables() if isinstance(optimizer, ShardedOptimizer) else optimizer.variables


def seeds_of(model: keras.Model) -> list[Any]:
    """Returns the states of a model's seed generators, int [seed, counter] each."""
    return [v for v in model.variables if is_seed(v)]


def make_seeds_differ(model: keras.Model) -> None:
    """Makes seeds that are equal on all ranks differ; otherwise all ranks would drop the same units."""
    for variable in seeds_of(model):
        seed = keras.ops.convert_to_numpy(variable)
        seed[0] += copy_index(model)  # ranks that hold one model together drop the same units
        variable.assign(seed)

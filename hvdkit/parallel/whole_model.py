"""From a divided model back to the whole one."""

import collections
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from hvdkit import collectives, world
from hvdkit.collectives.mesh import mesh_of, shard_of
from hvdkit.errors import UsageError


@dataclasses.dataclass(frozen=True)
class _Whole:
    """How to make the whole model anew. As an object: the dictionaries of a model's attributes would be Keras' own."""

    kind: type[keras.Model]
    config: dict[str, Any]
    custom: dict[str, type]
    paths: list[str]  # of its weights, in order

    def make(self) -> keras.Model:
        with keras.saving.custom_object_scope(self.custom):
            return self.kind.from_config(copy.deepcopy(self.config))  # Keras empties what it is given


def remember(divided: keras.Model, model: keras.Model) -> keras.Model:
    """Lets a divided model know what it is a part of, and keeps it from being saved as if it were all."""
    paths = [w.path for w in model.weights]
    twice = next((path for path, number in collections.Counter(paths).items() if number > 1), None)
    if twice:
        raise UsageError(
            f"Two weights of the model {model.name!r} have the path {twice!r}, so that it could not be put together "
            f"again. Give layers, also those of inner models, names of their own."
        )
    divided._hvdkit_whole = _Whole(type(model), model.get_config(), custom_classes(model), paths)

    def save(*args: Any, **kwargs: Any) -> None:
        raise UsageError(
            f"The model {divided.name!r} is divided over ranks, and this one has a part of it. Save the whole: call "
            f"whole = hvdkit.parallel.gather(model) on all ranks, and whole.save(...) on rank 0."
        )

    divided.save = save
    return divided


def gather(model: keras.Model, root_rank: int = 0) -> keras.Model | None:
    """Puts the whole of a divided model together. Call it on all ranks.

    Args:
        model: what `split_tensors`, `split_branches` or `pipeline` returned.
        root_rank: the rank that gets it.

    Returns:
        On the root rank a plain Keras model, not compiled, of layers and weights as the one that was divided; elsewhere
        None.

    Raises:
        UsageError: the model is not a divided one.
    """
    if not hasattr(model, "_hvdkit_whole"):
        raise UsageError(f"The model {model.name!r} is not divided: every rank has all of it.")
    whole = None
    if world.rank() == root_rank:
        whole = model._hvdkit_whole.make()
        # By place: a copy may name its weights otherwise.
        weights = dict(zip(model._hvdkit_whole.paths, whole.weights, strict=True))
    for path, value in _values(model):
        if whole is not None:
            weights.pop(path).assign(value)
    return whole


def custom_classes(layer: Any) -> dict[str, type]:
    """The user's classes among the layers in a layer or model, by name: without them it cannot be made anew."""
    if not isinstance(layer, keras.layers.Layer):  # an operation, such as x + y
        return {}
    classes = {type(inner) for inner in layer._flatten_layers(include_self=False)}
    # Keras knows its own, and has layers and operations of one name.
    return {cls.__name__: cls for cls in classes if not cls.__module__.startswith("keras.")}


def part_of(weight: Any, path: str) -> None:
    """Notes the path that a weight, or what this one is a part of, has in the whole model."""
    weight._hvdkit_path = path


def _values(model: keras.Model) -> Iterator[tuple[str, np.ndarray]]:
    """All weights with their paths, the parts of each put together; those of the first copy of the model.

    One after another: a rank that divides a model because it cannot hold it has no room for all of them twice.
    """
    mesh = mesh_of(model.weights)  # None also on a rank whose part has no weights
    mine = {getattr(weight, "_hvdkit_path", weight.path): weight for weight in model.weights}
    axes = {path: shard.axis if (shard := shard_of(weight)) else None for path, weight in mine.items()}
    everyone = collectives.allgather_object((mesh.model if mesh else 1, axes), name="whole.axes")
    columns = max(columns for columns, _ in everyone)
    row: list[dict[str, int | None]] = [axes for _, axes in everyone[:columns]]
    for path in dict.fromkeys(path for rank in row for path in rank):
        holders = [number for number, rank in enumerate(row) if path in rank]
        axis = row[holders[0]][path]
        needed = holders if axis is not None else holders[:1]
        part = keras.ops.convert_to_numpy(mine[path]) if world.rank() in needed else None
        parts = [part for part in collectives.allgather_object(part, name="whole.part") if part is not None]
        yield path, parts[0] if axis is None else np.concatenate(parts, axis)

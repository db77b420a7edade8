"""Gathers the parts of a divided model into the whole model."""

import collections
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from hvdkit import collectives, world
from hvdkit.collectives.mesh import mesh_of, shard_of
from hvdkit.compat.keras3 import layers_of
from hvdkit.errors import UsageError


@dataclasses.dataclass(frozen=True)
class _Whole:
    """What is needed to rebuild the whole model. An object, because Keras replaces dictionaries that are attributes."""

    kind: type[keras.Model]
    config: dict[str, Any]
    custom: dict[str, type]
    paths: list[str]  # paths of its weights, in order

    def make(self) -> keras.Model:
        with keras.saving.custom_object_scope(self.custom):
            return self.kind.from_config(copy.deepcopy(self.config))  # Keras modifies its argument


def remember(divided: keras.Model, model: keras.Model) -> keras.Model:
    """Stores in a divided model how to rebuild the whole one, and makes `save` of the divided model raise an error."""
    paths = [w.path for w in model.weights]
    twice = next((path for path, number in collections.Counter(paths).items() if number > 1), None)
    if twice:
        raise UsageError(
            f"Two weights of the model {model.name!r} have the path {twice!r}, so its parts could not be gathered. "
            f"Give all layers unique names, also those of inner models."
        )
    divided._hvdkit_whole = _Whole(type(model), model.get_config(), custom_classes(model), paths)

    def save(*args: Any, **kwargs: Any) -> None:
        raise UsageError(
            f"The model {divided.name!r} is divided over ranks, and this rank has only a part of it. Save the whole "
            f"model: call whole = hvdkit.parallel.gather(model) on all ranks, and whole.save(...) on rank 0."
        )

    divided.save = save
    return divided


def gather(model: keras.Model, root_rank: int = 0) -> keras.Model | None:
    """Gathers a divided model into a plain Keras model on one rank. Call it on all ranks.

    Args:
        model: the model that `split_tensors`, `split_branches` or `pipeline` returned.
        root_rank: the rank that gets the whole model.

    Returns:
        On the root rank a plain Keras model, not compiled, with the layers and weights of the model that was divided;
        None on the others.

    Raises:
        UsageError: the model is not divided.
    """
    if not hasattr(model, "_hvdkit_whole"):
        raise UsageError(f"The model {model.name!r} is not divided: every rank has all of it.")
    whole = None
    if world.rank() == root_rank:
        whole = model._hvdkit_whole.make()
        # By position: a copy may have different names for its weights.
        weights = dict(zip(model._hvdkit_whole.paths, whole.weights, strict=True))
    for path, value in _values(model):
        if whole is not None:
            weights.pop(path).assign(value)
    return whole


def custom_classes(layer: Any) -> dict[str, type]:
    """Returns the user's own layer classes in a layer or model, by name; they are needed to rebuild it."""
    if not isinstance(layer, keras.layers.Layer):  # an operation, such as x + y
        return {}
    classes = {type(inner) for inner in layers_of(layer, include_self=False)}
    # Leave out Keras' own classes: it knows them, and some layers and operations have the same name.
    return {cls.__name__: cls for cls in classes if not cls.__module__.startswith("keras.")}


def part_of(weight: Any, path: str) -> None:
    """Stores the path of a weight in the whole model; for a part, the path of the weight that it is a part of."""
    weight._hvdkit_path = path


def _values(model: keras.Model) -> Iterator[tuple[str, np.ndarray]]:
    """Yields path and complete value of each weight, taken from the first copy of the model.

    It gathers one weight at a time, because a rank may not have enough memory for the whole model.
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

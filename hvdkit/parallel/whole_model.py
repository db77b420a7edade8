"""Gathers the parts of a divided model into the whole model."""

import collections
import copy
import dataclasses
import itertools
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
    weights: list[tuple[str, tuple[int, ...]]]  # path, on this rank, and shape of each of its weights, in order

    def make(self) -> keras.Model:
        with keras.saving.custom_object_scope(self.custom):
            return self.kind.from_config(copy.deepcopy(self.config))  # Keras modifies its argument


def remember(divided: keras.Model, model: keras.Model) -> keras.Model:
    """Stores in a divided model how to rebuild the whole one, and makes `save` of the divided model raise an error."""
    weights = [(w.path, tuple(w.shape)) for w in model.weights]
    twice = next((path for path, number in collections.Counter(p for p, _ in weights).items() if number > 1), None)
    if twice:
        raise UsageError(
            f"Two weights of the model {model.name!r} have the path {twice!r}, so its parts could not be gathered. "
            f"Give all layers unique names, also those of inner models."
        )
    divided._hvdkit_whole = _Whole(type(model), model.get_config(), custom_classes(model), weights)

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
        UsageError: the model is not divided, or the ranks have divided different models; raised on all ranks.
    """
    if not hasattr(model, "_hvdkit_whole"):
        raise UsageError(f"The model {model.name!r} is not divided: every rank has all of it.")
    _refuse_different_models(model)
    whole = model._hvdkit_whole.make() if world.rank() == root_rank else None
    for place, value in _values(model):
        if whole is not None:
            whole.weights[place].assign(value)
    return whole


def custom_classes(layer: Any) -> dict[str, type]:
    """Returns the user's own layer classes in a layer or model, by name; they are needed to rebuild it."""
    if not isinstance(layer, keras.layers.Layer):  # an operation, such as x + y
        return {}
    classes = {type(inner) for inner in layers_of(layer, include_self=False)}
    # Leave out Keras' own classes: it knows them, and some layers and operations have the same name.
    return {cls.__name__: cls for cls in classes if not cls.__module__.startswith("keras.")}


def part_of(weight: Any, path: str) -> None:
    """Stores the path, on this rank, of a weight in the whole model; for a part, of the weight it is a part of."""
    weight._hvdkit_path = path


def _refuse_different_models(model: keras.Model) -> None:
    """Raises a `UsageError` unless the ranks' whole models have weights of the same shapes in the same order."""
    everyone = collectives.allgather_object(model._hvdkit_whole.weights, name="whole.weights")
    shapes = [[shape for _, shape in weights] for weights in everyone]
    for rank, theirs in enumerate(shapes):
        if theirs != shapes[0]:
            place = next(n for n, (a, b) in enumerate(itertools.zip_longest(shapes[0], theirs)) if a != b)
            one, other = (_described(weights[place : place + 1]) for weights in (everyone[0], everyone[rank]))
            raise UsageError(
                f"The ranks have divided different models, so their parts make no whole: weight {place} is {one} on "
                f"rank 0 and {other} on rank {rank}. Build the same model on all ranks."
            )


def _described(weights: list[tuple[str, tuple[int, ...]]]) -> str:
    return "".join(f"{path} {list(shape)}" for path, shape in weights) or "missing"


def _values(model: keras.Model) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the place of each weight in the whole model and its complete value, from the first copy of the model.

    Ranks match weights by place, because Keras numbers names per process: a rank that made one more layer before has
    other paths. It gathers one weight at a time, because a rank may not have enough memory for the whole model.
    """
    mesh = mesh_of(model.weights)  # None also on a rank whose part has no weights
    place_of = {path: place for place, (path, _) in enumerate(model._hvdkit_whole.weights)}
    mine = {place_of[getattr(weight, "_hvdkit_path", weight.path)]: weight for weight in model.weights}
    axes = {place: shard.axis if (shard := shard_of(weight)) else None for place, weight in mine.items()}
    everyone = collectives.allgather_object((mesh.model if mesh else 1, axes), name="whole.axes")
    columns = max(columns for columns, _ in everyone)
    row: list[dict[int, int | None]] = [axes for _, axes in everyone[:columns]]
    for place in dict.fromkeys(place for rank in row for place in rank):
        holders = [number for number, rank in enumerate(row) if place in rank]
        axis = row[holders[0]][place]
        needed = holders if axis is not None else holders[:1]
        part = keras.ops.convert_to_numpy(mine[place]) if world.rank() in needed else None
        parts = [part for part in collectives.allgather_object(part, name="whole.part") if part is not None]
        yield place, parts[0] if axis is None else np.concatenate(parts, axis)

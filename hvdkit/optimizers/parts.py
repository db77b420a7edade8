"""The optimizers of a model, and those inside an optimizer."""

from typing import Any

import keras


def optimizers_of(model: keras.Model) -> list[Any]:
    """Returns the optimizer that a model is compiled with, and those in its own attributes (GANs have two).

    They may be in lists, tuples and dicts.
    """
    candidates = [getattr(model, "optimizer", None)]
    for value in vars(model).values():
        candidates += leaves_of(value)
    found: list[Any] = [c for c in candidates if isinstance(c, keras.optimizers.Optimizer)]
    return list({id(o): o for o in found}.values())


def leaves_of(value: Any) -> list[Any]:
    """Returns what lists, tuples and dicts contain, at any depth; of another value the value."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in leaves_of(part)] if isinstance(value, (list, tuple)) else [value]


def parts_of(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """Returns an optimizer and those inside it (`LossScaleOptimizer`, `MultiOptimizer`)."""
    inside = [*getattr(optimizer, "optimizers", []), *filter(None, [getattr(optimizer, "inner_optimizer", None)])]
    return [optimizer, *(part for i in inside for part in parts_of(i))]

"""The optimizers of a model, and those inside of an optimizer."""

from typing import Any

import keras


def optimizers_of(model: keras.Model) -> list[Any]:
    """The optimizer that a model is compiled with, and those in attributes of its own (GANs have two)."""
    candidates = [getattr(model, "optimizer", None), *vars(model).values()]
    found: list[Any] = [c for c in candidates if isinstance(c, keras.optimizers.Optimizer)]
    return list({id(o): o for o in found}.values())


def parts_of(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """An optimizer and those inside of it (`LossScaleOptimizer`, `MultiOptimizer`)."""
    inside = [*getattr(optimizer, "optimizers", []), *filter(None, [getattr(optimizer, "inner_optimizer", None)])]
    return [optimizer, *(part for i in inside for part in parts_of(i))]

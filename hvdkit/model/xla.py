"""A training step compiled by XLA, except for its collectives."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdkit import world
from hvdkit.compat.keras3 import strategy_of


def make_train_function(make: Callable, model: keras.Model, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Splits a step for XLA: XLA compiles what comes before and after the collectives, but not the collectives.

    XLA's auto-clustering does the splitting. It compiles those of the marked nodes that it supports, so TensorFlow runs
    unsupported operations instead of failing.
    """
    if world.size() == 1 or not model.jit_compile or strategy_of(model) is not None:
        return make(*args, **kwargs)
    step, own = model.train_step, vars(model).get("train_step")

    def train_step(data: Any) -> Any:
        with tf.xla.experimental.jit_scope(compile_ops=lambda node: not node.op.startswith(("Horovod", "Hvdkit"))):
            return step(data)

    model.jit_compile, model.train_step = False, train_step
    try:
        return make(*args, **kwargs)
    finally:
        model.jit_compile = True
        del model.train_step
        if own is not None:
            model.train_step = own

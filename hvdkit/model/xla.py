"""A training step that XLA compiles, but for the exchange in it."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdkit import world
from hvdkit.compat.keras3 import strategy_of


def make_train_function(make: Callable, model: keras.Model, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Divides a step that XLA is to compile: what comes before and after the exchange is, the exchange is not.

    XLA's clustering does the dividing. It compiles what it can of the nodes that are marked for it, so operations that
    XLA does not know are left to TensorFlow instead of failing.
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

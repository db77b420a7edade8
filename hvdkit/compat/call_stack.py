"""The call stack: finds the Keras and TensorFlow objects around this code that nothing else shows.

An outer optimizer sets no reference on the inner one, and a `tf.function` none on what is traced in it. Use this module
only while something is built or traced, never in a step.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import keras
import tensorflow as tf

from hvdkit.compat.lookup import missing_in_tensorflow, private


def caller(kind: type, method: str) -> Any | None:
    """Returns the innermost object of class `kind` (not a proxy) whose method `method` is running, or None."""
    objects = (f.f_locals.get("self") for f in _frames() if f.f_code.co_name == method)
    return next((o for o in objects if issubclass(type(o), kind)), None)


def locals_of(method: str, owner: Any, names: Sequence[str]) -> dict[str, Any] | None:
    """Returns the local variables `names` of the innermost running call of `owner`'s `method`, or None."""
    for frame in _frames():
        here = frame.f_locals
        if frame.f_code.co_name == method and here.get("self") is owner and all(name in here for name in names):
            return {name: here[name] for name in names}
    return None


def is_running(method: str, owner: Any) -> bool:
    """Returns whether a call of `owner`'s method is running, also as AutoGraph has converted it."""
    return any(f.f_code.co_name in (method, f"tf__{method}") and f.f_locals.get("self") is owner for f in _frames())


def loss_scale_in_build() -> Any | None:
    """Returns the `LossScaleOptimizer` whose `build` is running, or None."""
    return caller(keras.optimizers.LossScaleOptimizer, "build")


def loss_scale_in_branch() -> Any | None:
    """Returns the `LossScaleOptimizer` whose branch "all gradients are finite" is running, or None.

    Raises:
        MissingNameError: Keras has no such branch.
    """
    method = private(keras.optimizers.LossScaleOptimizer, "_stateful_handle_finite_grads").__name__
    return caller(keras.optimizers.LossScaleOptimizer, method)


def is_in_xla() -> bool:
    """Returns whether this code is traced inside a `tf.function(jit_compile=True)`.

    Raises:
        MissingNameError: this TensorFlow does not provide this information.
    """
    if tf.executing_eagerly():
        return False
    kind: Any = _kind_of_function()
    functions: list[Any] = [f.f_locals.get("self") for f in _frames()]
    return any(type(function) is kind and function._jit_compile is True for function in functions)


@functools.cache
def _kind_of_function() -> type:
    function = tf.function(lambda: None)
    if not hasattr(function, "_jit_compile"):
        raise missing_in_tensorflow("attribute _jit_compile of a tf.function")
    return type(function)


def refuse_xla() -> None:
    """Raises a clear error before XLA reports a gradient allreduce as "unsupported operations".

    Raises:
        RuntimeError: this code is traced inside a `tf.function(jit_compile=True)`.
    """
    if is_in_xla():
        raise RuntimeError(
            "XLA cannot compile the exchange of gradients between ranks, but this step is inside of a "
            "tf.function(jit_compile=True). Compile the forward and backward pass in a tf.function of their own and "
            "call optimizer.apply outside of it; model.compile(jit_compile=True) divides the step so by itself."
        )


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back

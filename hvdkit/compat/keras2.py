"""Names of Keras 2 that Keras 3 removed: each use raises an error that says what to write instead.

For attributes of a wrapped optimizer, see `hvdkit.optimizers.distributed`.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras

# Arguments of Model.compile.
_COMPILE = {
    "experimental_run_tf_function": "Leave it out: only TensorFlow 2.0 needed it.",
    "sample_weight_mode": "Leave it out: weights of each time step are told by their shape.",
    "target_tensors": "Leave it out, and pass the targets to fit.",
}
# Arguments of every optimizer.
_OPTIMIZER = {"lr": "Write learning_rate=... instead."}
# Methods of a model, and their replacements.
_METHODS = {
    "fit_generator": "fit",
    "evaluate_generator": "evaluate",
    "predict_generator": "predict",
}


_undo: list[Callable[[], None]] = []


def explain_in_keras() -> None:
    """Makes Keras' errors say what to write instead: for `Model.compile`, `fit_generator` and optimizers.

    Changes no call that works: Keras rejects these arguments and classes, and lacks these methods.
    """
    if _undo:
        return
    _refuse_arguments(keras.Model, "compile", "Model.compile", _COMPILE, TypeError)
    _refuse_arguments(keras.optimizers.Optimizer, "__init__", "An optimizer", _OPTIMIZER, ValueError)
    _explain_legacy_optimizers()
    for name, instead in _METHODS.items():
        if not hasattr(keras.Model, name):
            setattr(keras.Model, name, _gone(name, instead))
            _undo.append(functools.partial(delattr, keras.Model, name))


def leave_keras_alone() -> None:
    """Undoes `explain_in_keras`."""
    while _undo:
        _undo.pop()()


def _refuse_arguments(owner: type, method: str, called: str, arguments: dict[str, str], error: type[Exception]) -> None:
    """Makes a method reject arguments with `error`, which is Keras' own type: a script may catch it."""
    owner = next(c for c in owner.__mro__ if method in vars(c))  # where Keras looks for it when it loads a model
    original = getattr(owner, method)

    @functools.wraps(original)
    def explaining(self: Any, *args: Any, **kwargs: Any) -> None:
        wrong = [f"{name}: {fix}" for name, fix in arguments.items() if name in kwargs]
        if wrong:
            raise error(f"{called} of Keras 3 does not take {' '.join(wrong)}")
        original(self, *args, **kwargs)

    setattr(owner, method, explaining)
    _undo.append(lambda: setattr(owner, method, original))


def _explain_legacy_optimizers() -> None:
    """Replaces Keras' own error, which asks for an environment variable that hvdkit rejects."""
    stub = keras.optimizers.legacy.Optimizer  # one class stands for them all
    original = stub.__init__

    def explain(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ImportError(
            "Keras 3 has no keras.optimizers.legacy. Write keras.optimizers.SGD(...) for keras.optimizers.legacy.SGD, "
            "and likewise for the others, with learning_rate for lr and a keras.optimizers.schedules schedule for "
            "decay."
        )

    stub.__init__ = explain
    _undo.append(lambda: setattr(stub, "__init__", original))


def _gone(name: str, instead: str) -> property:
    def explain(self: Any) -> None:
        raise AttributeError(f"Models of Keras 3 have no {name}. Write model.{instead}(...), which takes generators.")

    return property(explain)


REMOVED_FROM_OPTIMIZERS = {
    "lr": "Keras 3 has no optimizer.lr: read and set optimizer.learning_rate instead.",
    "get_gradients": "Keras 3 has no optimizer.get_gradients: take gradients with tf.GradientTape, and hand them to "
    "optimizer.apply(gradients, variables), which averages them over the ranks.",
    "compute_gradients": "Keras 3 has no optimizer.compute_gradients: take gradients with tf.GradientTape, and hand "
    "them to optimizer.apply(gradients, variables), which averages them over the ranks.",
    "minimize": "Keras 3 has no optimizer.minimize: take gradients with tf.GradientTape, and hand them to "
    "optimizer.apply(gradients, variables), which averages them over the ranks.",
}

"""What models of Keras 2 had and Keras 3 has not: each use gets an error that says what to write instead.

For optimizers, see `hvdkit.optimizer`.
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
# Methods of a model, and what does the same.
_METHODS = {
    "fit_generator": "fit",
    "evaluate_generator": "evaluate",
    "predict_generator": "predict",
}


_undo: list[Callable[[], None]] = []


def explain_in_keras() -> None:
    """Lets `Model.compile` and calls such as `model.fit_generator` say what to write instead, from now on.

    Changes no call that works: Keras refuses these arguments and lacks these methods.
    """
    if _undo:
        return
    owner = next(c for c in keras.Model.__mro__ if "compile" in vars(c))  # where Keras looks for it when it loads
    compile_ = owner.compile

    @functools.wraps(compile_)
    def explaining(self: Any, *args: Any, **kwargs: Any) -> None:
        wrong = [f"{name}: {mend}" for name, mend in _COMPILE.items() if name in kwargs]
        if wrong:
            raise TypeError(f"Model.compile of Keras 3 does not take {' '.join(wrong)}")
        compile_(self, *args, **kwargs)

    owner.compile = explaining
    _undo.append(lambda: setattr(owner, "compile", compile_))
    for name, instead in _METHODS.items():
        if not hasattr(keras.Model, name):
            setattr(keras.Model, name, _gone(name, instead))
            _undo.append(functools.partial(delattr, keras.Model, name))


def leave_keras_alone() -> None:
    """Undoes `explain_in_keras`."""
    while _undo:
        _undo.pop()()


def _gone(name: str, instead: str) -> property:
    def explain(self: Any) -> None:
        raise AttributeError(f"Models of Keras 3 have no {name}. Write model.{instead}(...), which takes generators.")

    return property(explain)

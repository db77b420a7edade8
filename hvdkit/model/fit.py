"""What `Model.fit` means on many ranks: it stays right even where the user's script forgets something.

While a job of several ranks runs, `keras.Model.fit` is wrapped (`install`, called by `hvdkit.init`; the way of tracing
tools such as MLflow's autologging). Each `fit` then

- has a model that is built, if the data tell how (`build`);
- runs the user's callbacks, with metrics of all ranks and each file written once (`user_callbacks`);
- has a first callback that tells the watchdog where this rank is (`marks`);
- has a last one that keeps the ranks together and proves that they exchange gradients (`guard`).

A model under a `tf.distribute` strategy is left alone: there TensorFlow does the exchange.
"""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import wrapt

from hvdkit import watchdog, world
from hvdkit.compat.keras3 import strategy_of
from hvdkit.model.build import build
from hvdkit.model.guard import FitGuard
from hvdkit.model.marks import Marks
from hvdkit.model.user_callbacks import for_all_ranks
from hvdkit.model.xla import make_train_function
from hvdkit.optimizers import heartbeat
from hvdkit.optimizers.distributed import all_ranks_train
from hvdkit.optimizers.exchanging import ExchangingOptimizer, exchanging_optimizers_of

_originals: dict[str, tuple[type, Any]] = {}


def install() -> None:
    """Wraps `keras.Model.fit` and the making of its training step; a second call does nothing."""
    for name, wrapper in (("fit", _GuardedFit()), ("make_train_function", make_train_function)):
        if name not in _originals:
            owner = next(c for c in keras.Model.__mro__ if name in vars(c))
            _originals[name] = (owner, vars(owner)[name])
            setattr(owner, name, wrapt.FunctionWrapper(vars(owner)[name], wrapper))


def uninstall() -> None:
    """Gives Keras its own functions back."""
    for name, (owner, original) in _originals.items():
        setattr(owner, name, original)
    _originals.clear()


class _GuardedFit:
    """The wrapper of `fit`, which knows whether it was called within a callback of another `fit`."""

    def __init__(self) -> None:
        self._running = 0

    def __call__(self, fit: Callable, model: keras.Model, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Calls Keras' `fit` of a model, guarded."""
        optimizers = exchanging_optimizers_of(model)
        unguarded = world.size() == 1 or strategy_of(model) is not None
        if unguarded or (self._running and not optimizers):
            return fit(*args, **kwargs)
        call = inspect.signature(fit).bind_partial(*args, **kwargs)
        _guard(model, optimizers, call.arguments)
        if not self._running:
            heartbeat.current().begin()
        self._running += 1
        phase = "interrupted"  # which may last, and still tells in which step it happened
        try:
            result = fit(*call.args, **call.kwargs)
            phase = "between"
            return result
        finally:
            self._running -= 1
            watchdog.in_phase("training" if self._running else phase)


def _guard(model: keras.Model, optimizers: list[ExchangingOptimizer], arguments: dict[str, Any]) -> None:
    """Replaces the callbacks among the arguments of `fit`."""
    given = arguments.get("callbacks")
    callbacks = keras.tree.flatten(given.callbacks if isinstance(given, keras.callbacks.CallbackList) else given or [])
    callbacks = [c for c in callbacks if not isinstance(c, (Marks, FitGuard))]
    if all_ranks_train(optimizers):
        build(model, arguments.get("x"))
        callbacks = for_all_ranks(callbacks)
    callbacks = [Marks(), *callbacks, FitGuard(optimizers)]
    if isinstance(given, keras.callbacks.CallbackList):
        given.callbacks = callbacks
        given.set_model(model)
        given.set_params(given.params)
    else:
        arguments["callbacks"] = callbacks

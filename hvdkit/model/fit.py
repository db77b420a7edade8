"""`Model.fit` on many ranks: training stays correct even if the user's script omits a call.

While a job of several ranks runs, `keras.Model.fit` is wrapped. `hvdkit.init` calls `install`; MLflow's autologging
works in the same way. Each `fit` then

- compares when the ranks train and validate, and what their layers hold outside of their variables (`same_layers`);
- starts with a callback that reports this rank's position to the watchdog (`marks`);
- builds the model first, if the data determine its shapes (`build`);
- runs the user's callbacks with metrics of all ranks, and writes each file once (`user_callbacks`);
- hands no work to other threads if the rank has one core (`one_core`);
- runs several steps of the graph at once, where nobody can see the difference (`executions`);
- weighs the ranks' losses by what they count (`losses`), and knows when their batches may differ (`batch_sizes`);
- warns of data that no rank has divided (`same_data`);
- ends with a callback that keeps the ranks together and checks that they allreduce gradients (`guard`).

`train_on_batch` makes the models the same at its first call (`on_batch`).

A model under a `tf.distribute` strategy is not changed: there TensorFlow reduces the gradients.
"""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
import wrapt

from hvdkit import collectives, watchdog, world
from hvdkit.callbacks import own_metrics
from hvdkit.collectives.agreement import check_equal_plans
from hvdkit.compat import preprocessing
from hvdkit.compat.keras3 import strategy_of
from hvdkit.compat.losses import replace_reduction
from hvdkit.model import same_data, same_layers
from hvdkit.model.batch_sizes import CompareBatchSizes
from hvdkit.model.build import BuildFirst
from hvdkit.model.executions import Executions, may_join
from hvdkit.model.guard import FitGuard
from hvdkit.model.losses import weigh_in
from hvdkit.model.marks import Marks
from hvdkit.model.on_batch import train_on_batch
from hvdkit.model.one_core import OneCore, inline_execution
from hvdkit.model.user_callbacks import check_averages, for_all_ranks
from hvdkit.model.xla import make_train_function
from hvdkit.optimizers import batch_sizes, heartbeat, weighing
from hvdkit.optimizers.distributed import DistributedOptimizer, all_ranks_train
from hvdkit.optimizers.exchanging import ExchangingOptimizer, exchanging_optimizers_of

_undo: list[Callable[[], None]] = []  # restores Keras' own functions


def install() -> None:
    """Wraps `keras.Model.fit`, the creation of its training step, and losses; a second call does nothing."""
    if _undo:
        return
    preprocessing.watch()
    _undo.append(preprocessing.stop_watching)
    _replace(keras.Model, "fit", lambda fit: wrapt.FunctionWrapper(fit, _GuardedFit()))
    _replace(keras.Model, "train_on_batch", lambda train: wrapt.FunctionWrapper(train, train_on_batch))
    _replace(keras.Model, "make_train_function", lambda make: wrapt.FunctionWrapper(make, make_train_function))
    # AutoGraph may convert a training step, but not functions of wrapt.
    _replace(keras.Model, "compute_loss", lambda compute: tf.autograph.experimental.do_not_convert(weigh_in(compute)))
    _replace(
        keras.losses.Loss, "__call__", lambda call: tf.autograph.experimental.do_not_convert(weighing.watch_calls(call))
    )
    _undo.append(replace_reduction(weighing.reduce))
    look = own_metrics.look_at_results
    _replace(
        keras.metrics.MeanMetricWrapper,
        "update_state",
        lambda update: tf.autograph.experimental.do_not_convert(look(update)),
    )


def uninstall() -> None:
    """Restores Keras' own functions."""
    while _undo:
        _undo.pop()()


def _replace(kind: type, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replaces a method of Keras by what `make` makes of it, until `uninstall`."""
    owner = next(c for c in kind.__mro__ if name in vars(c))
    original = vars(owner)[name]
    setattr(owner, name, make(original))
    _undo.append(lambda: setattr(owner, name, original))


class _GuardedFit:
    """The wrapper of `fit`, which knows whether a callback of another `fit` called it."""

    def __init__(self) -> None:
        self._running = 0

    def __call__(self, fit: Callable, model: keras.Model, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Calls Keras' `fit` of a model, with the guard."""
        optimizers = exchanging_optimizers_of(model)
        unguarded = world.size() == 1 or strategy_of(model) is not None
        if unguarded or (self._running and not optimizers):
            return fit(*args, **kwargs)
        call = inspect.signature(fit).bind_partial(*args, **kwargs)
        _guard(model, optimizers, call.arguments)
        if not self._running:
            heartbeat.current().begin()
            weighing.forget_unweighed()
        self._running += 1
        phase = "interrupted"  # this phase may last, and keeps the step at which it happened
        try:
            with inline_execution(), same_data.watched():
                result = fit(*call.args, **call.kwargs)
            phase = "between"
            return result
        finally:
            self._running -= 1
            if not self._running:
                batch_sizes.current().compare(True)
            watchdog.in_phase("training" if self._running else phase)


def _executions(model: keras.Model, callbacks: list[Any], optimizers: list[ExchangingOptimizer]) -> list[Executions]:
    """Returns the callback that joins steps, if all ranks may."""
    if not all_ranks_train(optimizers):
        return []
    everyone = collectives.allgather_object(may_join(model, callbacks), name="executions")
    return [Executions()] if all(everyone) else []


def _plan(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `fit` that say when it trains and validates."""
    validates = arguments.get("validation_data") is not None or bool(arguments.get("validation_split"))
    plan = {name: arguments.get(name, default) for name, default in (("epochs", 1), ("initial_epoch", 0))}
    return {**plan, "validation": validates, "validation_freq": arguments.get("validation_freq", 1)}


def _compare_batch_sizes(optimizers: list[ExchangingOptimizer]) -> list[CompareBatchSizes]:
    """Returns the callback that compares the sizes of batches, if this rank's gradients are reduced with others'."""
    exchanges = [o._self_gradients for o in optimizers if isinstance(o, DistributedOptimizer)]
    return [CompareBatchSizes(exchange) for exchange in exchanges[:1] if not exchange.is_alone()]


def _guard(model: keras.Model, optimizers: list[ExchangingOptimizer], arguments: dict[str, Any]) -> None:
    """Replaces the callbacks among the arguments of `fit`."""
    given = arguments.get("callbacks")
    callbacks = keras.tree.flatten(given.callbacks if isinstance(given, keras.callbacks.CallbackList) else given or [])
    callbacks = [c for c in callbacks if not isinstance(c, (Marks, BuildFirst, OneCore, CompareBatchSizes, FitGuard))]
    if all_ranks_train(optimizers):
        check_equal_plans(_plan(arguments))
        same_layers.check(model)
        check_averages(callbacks, optimizers)
        callbacks = [BuildFirst(), *for_all_ranks(callbacks)]
    executions, sizes = _executions(model, callbacks, optimizers), _compare_batch_sizes(optimizers)
    callbacks = [Marks(), OneCore(), *callbacks, *executions, *sizes, FitGuard(optimizers)]
    if isinstance(given, keras.callbacks.CallbackList):
        given.callbacks = callbacks
        given.set_model(model)
        given.set_params(given.params)
    else:
        arguments["callbacks"] = callbacks

"""`Model.train_on_batch` on many ranks: the first call makes the ranks' models the same, as `fit` does at its start."""

import weakref
from collections.abc import Callable
from typing import Any

import keras

from hvdkit import world
from hvdkit.compat.keras3 import strategy_of
from hvdkit.model import same_layers
from hvdkit.model.guard import make_common, make_common_seeds_differ, warn_of_no_exchange
from hvdkit.optimizers.distributed import all_ranks_train
from hvdkit.optimizers.exchanging import exchanging_optimizers_of

_begun: weakref.WeakKeyDictionary[keras.Model, Any] = weakref.WeakKeyDictionary()  # the job in which each began


def train_on_batch(keras_own: Callable, model: keras.Model, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Calls Keras' `train_on_batch`; the first time in a job, makes weights and slots those of rank 0."""
    job = world.current()
    if world.size() == 1 or _begun.get(model) is job or strategy_of(model) is not None:
        return keras_own(*args, **kwargs)
    _begun[model] = job
    optimizers = exchanging_optimizers_of(model)
    if not optimizers:
        warn_of_no_exchange(model)
    if not all_ranks_train(optimizers):
        return keras_own(*args, **kwargs)
    same_layers.check(model)
    built = bool(model.weights)
    if built:
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        make_common(model, optimizers, "when training begins")
        make_common_seeds_differ(model)
    result = keras_own(*args, **kwargs)
    if not built:
        make_common(model, optimizers, "after the step that built the model")
    return result

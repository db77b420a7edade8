"""What a loss means while `fit` trains a model on many ranks: the ranks are weighed by what they count.

`fit.install` replaces `keras.Model.compute_loss`. A call in a `train_step`, Keras' own or the user's, weighs each
compiled loss (see `hvdkit.optimizers.weighing`). A call in an evaluation notes what the losses count (see
`hvdkit.callbacks.batch_losses`). A call elsewhere changes nothing.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras

from hvdkit import world
from hvdkit.callbacks.batch_losses import noting
from hvdkit.collectives.mesh import mesh_of
from hvdkit.compat import call_stack
from hvdkit.compat.keras3 import strategy_of
from hvdkit.optimizers import weighing
from hvdkit.optimizers.distributed import DistributedOptimizer
from hvdkit.optimizers.exchanging import exchanging_optimizers_of
from hvdkit.optimizers.local_sgd import LocalSGD

_LOCAL = (
    "With hvd.LocalSGD each rank trains alone between synchronizations, so nothing can weigh the ranks by it, and they "
    "do not train as one process does. Use DistributedOptimizer, or batches that count alike."
)
_ADASUM = (
    "Adasum combines the ranks' updates and knows no weights, so the ranks count alike. Use op=hvd.Average, or batches "
    "that count alike."
)


def weigh_in(keras_compute: Callable) -> Callable:
    """Returns a replacement for `keras.Model.compute_loss`, which weighs losses in training."""
    signature = inspect.signature(keras_compute)

    @functools.wraps(keras_compute)
    def compute_loss(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        with _scope_of(self, given.get("training", True), given.get("x")):
            return keras_compute(self, *args, **kwargs)

    return compute_loss


def _scope_of(model: keras.Model, training: bool, x: Any) -> contextlib.AbstractContextManager[Any]:
    if weighing.is_active():  # a pipeline weighs its micro-batches
        return contextlib.nullcontext()
    if not training:
        return weighing.Scope() if world.size() == 1 or strategy_of(model) is not None else noting(model, x)
    exchanging = exchanging_optimizers_of(model)
    if not exchanging or not call_stack.is_running("train_step", model):
        return contextlib.nullcontext()
    optimizers = [o for o in exchanging if isinstance(o, DistributedOptimizer)]
    if not optimizers:  # of tf.distribute
        make = exchanging[0]._self_weighing
        return make() if make else contextlib.nullcontext()
    if strategy_of(model) is not None:
        return contextlib.nullcontext()
    exchange = optimizers[0]._self_gradients
    if exchange.is_alone():
        return weighing.Scope()
    if isinstance(optimizers[0], LocalSGD):
        return weighing.Unweighable(_LOCAL)
    if exchange.is_adasum():
        return weighing.Unweighable(_ADASUM)
    exchange.weighs = True
    mesh = mesh_of(model.weights)
    ranks = mesh.data_set if mesh else exchange.process_set  # ranks of one model see the same batch
    return weighing.Weighing(exchange.name, ranks, exchange.averages()) if ranks.size() > 1 else weighing.Scope()

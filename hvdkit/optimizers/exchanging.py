"""`ExchangingOptimizer`: a transparent proxy around a Keras optimizer that changes what reaches `apply`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import wrapt

from hvdkit.compat.keras2 import REMOVED_FROM_OPTIMIZERS
from hvdkit.optimizers.fused_update import fuse_updates
from hvdkit.optimizers.gradients import Gradient
from hvdkit.optimizers.parts import optimizers_of
from hvdkit.optimizers.weighing import Scope


class ExchangingOptimizer(wrapt.ObjectProxy):
    """A Keras optimizer that passes its gradients through `exchange` before `apply`.

    Args:
        optimizer: the wrapped optimizer, which does everything else.
        exchange: maps this replica's gradients (`tf.Tensor`, `tf.IndexedSlices` or None) to the ones to apply.
        weighing: makes the scope that weighs the replicas' losses in `fit` (see `hvdkit.optimizers.weighing`); None if
            nothing weighs them.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        exchange: Callable[[list[Gradient]], list[Gradient]],
        weighing: Callable[[], Scope] | None = None,
    ) -> None:
        super().__init__(optimizer)
        self._self_exchange = exchange
        self._self_weighing = weighing
        fuse_updates(optimizer)

    def apply(self, grads: Sequence[Gradient], trainable_variables: Sequence[Any] | None = None) -> None:
        """Passes `grads` through `exchange` and applies the result.

        Args:
            grads: this replica's gradients, one per variable: `tf.Tensor`, `tf.IndexedSlices` or None.
            trainable_variables: their variables; by default those that the optimizer was built with.
        """
        self.__wrapped__.apply(self._self_exchange(list(grads)), trainable_variables)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Gradient, Any]]) -> Any:
        """Reduces and applies `(gradient, variable)` pairs, and returns the iteration counter."""
        grads, variables = zip(*grads_and_vars, strict=True)
        self.apply(grads, list(variables))
        return self.iterations

    def __getattr__(self, name: str) -> Any:
        if name in REMOVED_FROM_OPTIMIZERS:
            raise AttributeError(REMOVED_FROM_OPTIMIZERS[name])
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in REMOVED_FROM_OPTIMIZERS:
            raise AttributeError(REMOVED_FROM_OPTIMIZERS[name])
        super().__setattr__(name, value)


def exchanging_optimizers_of(model: keras.Model) -> list[ExchangingOptimizer]:
    """Returns the model's exchanging optimizers, at any depth, including those in its attributes (GANs have two)."""
    found = {id(o): o for optimizer in optimizers_of(model) for o in _exchanging(optimizer)}
    return list(found.values())


def _exchanging(optimizer: Any) -> Iterable[ExchangingOptimizer]:
    if isinstance(optimizer, ExchangingOptimizer):
        yield optimizer
    elif getattr(optimizer, "inner_optimizer", None) is not None:
        yield from _exchanging(optimizer.inner_optimizer)

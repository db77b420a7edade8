"""The one hook into Keras optimizers: it runs after gradient accumulation and before the update.

Keras clips gradients at this point. With gradient accumulation, the gradients are allreduced here, before Keras clips
them. Where ranks hold shards, clipping needs the norms of the other ranks. Keras has no public API for this point, so
this module replaces one Keras function. It replaces it once and serves both purposes in that order.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras

from hvdkit.compat.keras3 import replace_clipping
from hvdkit.optimizers.gradients import Gradient

Grads = list[Gradient]
_HOOKS = "_hvdkit_hooks"


@dataclasses.dataclass
class _Hooks:
    """What runs before the update of one optimizer; another call of `hook` replaces it."""

    exchange: Callable[[Grads], Grads] | None
    clip: Callable[[Grads, Callable[[Grads], Grads]], Grads] | None


def hook(
    optimizer: keras.optimizers.Optimizer,
    *,
    exchange: Callable[[Grads], Grads] | None = None,
    clip: Callable[[Grads, Callable[[Grads], Grads]], Grads] | None = None,
) -> None:
    """Installs the hook in an optimizer, in place of one that was installed before.

    So two wrappers of one optimizer, as after a second `compile`, do not both reduce its gradients: the wrapper that
    applies gradients calls this first.

    Args:
        optimizer: an optimizer that applies updates itself.
        exchange: takes the accumulated gradients and returns those reduced over all ranks; None skips this step.
        clip: takes these gradients and Keras' clipping function, and returns clipped gradients; None lets Keras clip.
    """

    hooks = getattr(optimizer, _HOOKS, None)
    if hooks is not None:
        hooks.exchange, hooks.clip = exchange, clip
        return
    hooks = _Hooks(exchange, clip)

    def make(keras_clip: Callable[[Grads], Grads]) -> Callable[[Grads], Grads]:
        def before_update(grads: Any) -> Grads:
            grads = grads if hooks.exchange is None else hooks.exchange(grads)
            return keras_clip(grads) if hooks.clip is None else hooks.clip(grads, keras_clip)

        return before_update

    replace_clipping(optimizer, make)
    setattr(optimizer, _HOOKS, hooks)

"""The one hook into Keras optimizers: it runs after gradient accumulation and before the update.

Keras clips gradients at this point. With gradient accumulation, the gradients are allreduced here, before Keras clips
them. Where ranks hold shards, clipping needs the norms of the other ranks. Keras has no public API for this point, so
this module replaces one Keras function. It replaces it once and serves both purposes in that order.
"""

from collections.abc import Callable
from typing import Any

import keras

from hvdkit.compat.keras3 import replace_clipping
from hvdkit.optimizers.gradients import Gradient

Grads = list[Gradient]


def hook(
    optimizer: keras.optimizers.Optimizer,
    *,
    exchange: Callable[[Grads], Grads] | None = None,
    clip: Callable[[Grads, Callable[[Grads], Grads]], Grads] | None = None,
) -> None:
    """Installs the hook in an optimizer. Call it once per optimizer.

    Args:
        optimizer: an optimizer that applies updates itself.
        exchange: takes the accumulated gradients and returns those reduced over all ranks; None skips this step.
        clip: takes these gradients and Keras' clipping function, and returns clipped gradients; None lets Keras clip.
    """

    def make(keras_clip: Callable[[Grads], Grads]) -> Callable[[Grads], Grads]:
        def before_update(grads: Any) -> Grads:
            grads = grads if exchange is None else exchange(grads)
            return keras_clip(grads) if clip is None else clip(grads, keras_clip)

        return before_update

    replace_clipping(optimizer, make)

"""The one hook into Keras' optimizers: what happens to gradients after accumulation, and before the update.

There Keras clips. With gradient accumulation the gradients are allreduced there, before Keras clips them; where ranks
hold shards, clipping needs the norms of the other ranks. There is no public place, and one function of Keras' to
replace: so it is replaced once, by both in their order.
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
    """Hooks into an optimizer's updates. Call it once an optimizer.

    Args:
        optimizer: one that takes steps itself.
        exchange: gets the accumulated gradients and returns those of all ranks; by default it is not called.
        clip: gets those and Keras' own clipping, and returns clipped gradients; by default Keras clips.
    """

    def make(keras_clip: Callable[[Grads], Grads]) -> Callable[[Grads], Grads]:
        def before_update(grads: Any) -> Grads:
            grads = grads if exchange is None else exchange(grads)
            return keras_clip(grads) if clip is None else clip(grads, keras_clip)

        return before_update

    replace_clipping(optimizer, make)

"""`BroadcastGlobalVariablesCallback`: all ranks start from the root rank's state."""

from collections.abc import Sequence
from typing import Any

import keras

from hvdkit import collectives, world
from hvdkit.collectives.mesh import share
from hvdkit.optimizers.distributed import keeps_local
from hvdkit.optimizers.state import make_seeds_differ


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Gives all ranks the root rank's weights, optimizer slots and non-trainable state before the first step.

    Horovod's callback of this name broadcasts after the first batch, so the first step uses unequal weights. This one
    also broadcasts random seeds, and then derives a different seed for each rank, reproducibly: with equal seeds,
    dropout would drop the same units on all ranks.

    Args:
        root_rank: the rank whose values all ranks take.
        device: ignored; accepted because Horovod's callback has it.
        local_variables: variables to keep out of the broadcast; each rank keeps its own values.

    Example: `model.fit(dataset, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])`
    """

    def __init__(
        self, root_rank: int = 0, device: str = "", local_variables: Sequence[Any] | Any | None = None
    ) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.device = device
        local = [] if local_variables is None else local_variables
        self._local = {id(v) for v in (local if isinstance(local, (list, tuple)) else [local])}

    def register_local_var(self, var: Any) -> None:
        """Keeps `var` out of the broadcast: each rank keeps its own value."""
        self._local.add(id(var))

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Broadcasts. First builds the optimizer, which Keras would build only at the first step."""
        model, optimizer = self.model, getattr(self.model, "optimizer", None)
        if not model.weights and world.size() > 1:
            raise RuntimeError(
                f"The model {model.name!r} has no variables yet when training begins, so they cannot be broadcast. "
                f"Build it first: model.build(input_shape), or call the model on one batch."
            )
        if optimizer is not None and not optimizer.built and model.weights:
            optimizer.build(model.trainable_variables)
        variables = [*model.variables, *getattr(optimizer, "variables", [])]
        variables = [v for v in variables if not keeps_local(optimizer, v)]
        collectives.broadcast_variables([v for v in variables if id(v) not in self._local], self.root_rank)
        share(model.weights)
        make_seeds_differ(model)

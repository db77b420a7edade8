"""`AverageStateCallback`: synchronizes BatchNormalization's statistics, which no optimizer updates."""

from typing import Any

import keras

from hvdkit import collectives
from hvdkit.collectives.mesh import copies_of
from hvdkit.optimizers.local_sgd import local_optimizers


class AverageStateCallback(keras.callbacks.Callback):
    """Averages float non-trainable weights over all ranks before they are used or saved.

    These are BatchNormalization's moving mean and variance, which each rank computes from its own examples. The
    callback averages them before each evaluation, at the end of each epoch (before a later callback writes a
    checkpoint) and at the end of training. It does not change weights that are equal on all ranks, such as frozen
    layers.
    """

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Averages before a validation pass, or before `evaluate`."""
        average_state(self.model)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Averages before later callbacks save the model."""
        average_state(self.model)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Averages once more, because steps may follow the end of the last epoch."""
        average_state(self.model)


def average_state(model: keras.Model) -> None:
    """Sets the model's float non-trainable weights to their mean over all ranks. Synchronizes `LocalSGD` first."""
    for optimizer in local_optimizers(model):
        optimizer.synchronise()
    state: list[Any] = [v for v in model.non_trainable_weights if "float" in keras.backend.standardize_dtype(v.dtype)]
    collectives.average_variables(state, copies_of(model))

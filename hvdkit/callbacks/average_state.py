"""`AverageStateCallback`: what ranks gather outside of the optimizer becomes common again."""

from typing import Any

import keras

from hvdkit import collectives
from hvdkit.collectives.mesh import copies_of
from hvdkit.optimizers.local_sgd import local_optimizers


class AverageStateCallback(keras.callbacks.Callback):
    """Averages float non-trainable weights over all ranks before they are used or saved.

    These are BatchNormalization's moving mean and variance, which each rank gathers on its own examples. The mean over
    ranks is taken before each evaluation, at the end of each epoch (before a checkpoint is written by a later
    callback) and at the end of training. Weights that are equal on all ranks, such as frozen layers, are left alone.
    """

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Averages before a validation pass, or before `evaluate`."""
        average_state(self.model)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Averages before later callbacks save the model."""
        average_state(self.model)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Averages what came after the last epoch's end."""
        average_state(self.model)


def average_state(model: keras.Model) -> None:
    """Sets the model's float non-trainable weights to their mean over all ranks; under `LocalSGD` they agree first."""
    for optimizer in local_optimizers(model):
        optimizer.synchronise()
    state: list[Any] = [v for v in model.non_trainable_weights if "float" in keras.backend.standardize_dtype(v.dtype)]
    collectives.average_variables(state, copies_of(model))

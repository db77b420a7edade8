"""`StopAtStepCallback`: ends training after a number of steps, also in the middle of an epoch."""

import keras

from hvdkit.optimizers import heartbeat


class StopAtStepCallback(keras.callbacks.Callback):
    """Stops `fit` after step `steps`, counted over all epochs; every rank stops at the same step.

    Args:
        steps: total number of steps to train.
        steps_per_epoch: steps per full epoch.
    """

    def __init__(self, steps: int, steps_per_epoch: int) -> None:
        super().__init__()
        self._steps = steps
        self._steps_per_epoch = steps_per_epoch
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Remembers the epoch."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Stops at the last step."""
        if self._epoch * self._steps_per_epoch + batch + 1 >= self._steps:
            self.model.stop_training = True
            heartbeat.current().all_stop = True

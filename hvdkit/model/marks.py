"""`Marks`: the callback that reports this rank's position in `fit` to the watchdog."""

import keras

from hvdkit import watchdog


class Marks(keras.callbacks.Callback):
    """The first callback of each `fit`: reports this rank's position to the watchdog."""

    checkpointed = False
    sees_executions = True
    _epoch = 0
    _begun: int | None = None
    _done: int | None = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Reports that an epoch starts: the watchdog now expects steps."""
        self._epoch = epoch
        self._begun = self._done = None
        watchdog.in_phase("training")

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Reports that a step starts."""
        self._begun = batch
        watchdog.at_step(self._epoch, batch)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Records that a step is done."""
        self._done = self._begun

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Reports that validation starts."""
        self._take_back()
        watchdog.in_phase("evaluating")

    def on_test_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Reports progress of the validation."""
        watchdog.at_step(self._epoch, batch)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Reports that an epoch is over: callbacks that run now may take long."""
        self._take_back()
        watchdog.in_phase("between")

    def on_train_end(self, logs: dict | None = None) -> None:
        """Reports that training is over, as at the end of an epoch."""
        watchdog.in_phase("between")

    def _take_back(self) -> None:
        """Reverts a step that did not run: Keras starts a step before it sees that a generator is empty."""
        if self._done is not None and self._done != self._begun:
            self._begun = self._done
            watchdog.at_step(self._epoch, self._done)

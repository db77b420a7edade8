"""`Marks`: the callback that tells the watchdog where in `fit` this rank is."""

import keras

from hvdkit import watchdog


class Marks(keras.callbacks.Callback):
    """The first callback of each `fit`: tells the watchdog where this rank is."""

    checkpointed = False
    _epoch = 0
    _begun: int | None = None
    _done: int | None = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """From here on a step must follow."""
        self._epoch = epoch
        self._begun = self._done = None
        watchdog.in_phase("training")

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """A step begins."""
        self._begun = batch
        watchdog.at_step(self._epoch, batch)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """A step is done."""
        self._done = self._begun

    def on_test_begin(self, logs: dict | None = None) -> None:
        """Validation begins."""
        self._take_back()
        watchdog.in_phase("evaluating")

    def on_test_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Validation moves on."""
        watchdog.at_step(self._epoch, batch)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """What callbacks do now may take its time."""
        self._take_back()
        watchdog.in_phase("between")

    def on_train_end(self, logs: dict | None = None) -> None:
        """As at an epoch's end."""
        watchdog.in_phase("between")

    def _take_back(self) -> None:
        """Keras begins a step before it sees that a generator has no more: this rank has not come that far."""
        if self._done is not None and self._done != self._begun:
            self._begun = self._done
            watchdog.at_step(self._epoch, self._done)

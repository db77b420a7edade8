"""Callbacks that keep the counters of a state up to date and commit it."""

from typing import Any

import keras

from hvdkit.optimizers import heartbeat


class CommitStateCallback(keras.callbacks.Callback):
    """Commits the state every `batches_per_commit` batches and at the end of each epoch.

    After the last batch of an epoch, only the end of the epoch commits. A commit in between would hold an epoch that is
    trained but not counted, and Keras cannot resume there: an epoch has at least one batch. Validation runs before the
    end of the epoch, so a rank that is lost during validation costs the batches since the last commit.

    A commit copies the state, and checks whether hosts were added or will be removed. Put this callback after the
    callbacks that update the state.

    Args:
        state: the `KerasState`.
        batches_per_commit: batches from one commit to the next; at most so many are lost with a rank, or those of one
            execution (`steps_per_execution`) if it has more.
    """

    def __init__(self, state: Any, batches_per_commit: int = 1) -> None:
        super().__init__()
        self.state = state
        self.batches_per_commit = batches_per_commit
        self._since = 0
        self._done = 0  # batches of this epoch in this `fit`

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Resets the count to 0, as on a rank that has just joined."""
        self._since = 0

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Counts the batches of the epoch from 0."""
        self._done = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Counts batches, of which an execution may have several, and commits after `batches_per_commit`."""
        self._since += batch + 1 - self._done
        self._done = batch + 1
        steps = self.params.get("steps")
        done = max(getattr(self.state, "batch", 0), batch + 1)  # of this epoch, before and after a reset
        if self._since >= self.batches_per_commit:
            self._since = 0
            if not steps or done < steps:
                self.state.commit()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Commits."""
        self.state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Updates `state.batch`, the number of batches done in this epoch; after a reset, shortens the epoch by it.

    Horovod's callback of this name stores the index of the last batch, which is one less. At a second reset it also
    loses the batches before the first reset. Put this callback before callbacks that stop the training, such as
    `EarlyStopping`.

    Args:
        state: the `KerasState`, created with `batch=0`.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self._before = 0
        self._cut = False

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Reads the number of batches done before a reset; 0 in all other epochs."""
        self._before = self.state.batch
        self._cut = False

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Counts batches; ends the first epoch after a reset where the interrupted epoch would have ended."""
        self.state.batch = self._before + batch + 1
        steps = self.params.get("steps")
        if self._before and steps and self.state.batch >= steps:
            self._cut = True
            self.model.stop_training = True  # Keras has no other way to end an epoch early
            heartbeat.current().all_stop = True

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Resets the count for the next epoch."""
        self.state.batch = 0
        if self._cut:
            self.model.stop_training = False


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Updates `state.epoch`, the number of epochs done, counted over all resets.

    Call `fit` with `epochs=N - state.epoch`, or with `epochs=N, initial_epoch=state.epoch`.

    Args:
        state: the `KerasState`, created with `epoch=0`.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self._offset: int | None = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Discards the offset of the last `fit`."""
        self._offset = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Computes at the first epoch the offset between Keras' epoch number and `state.epoch`."""
        if self._offset is None:
            self._offset = self.state.epoch - epoch

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Counts epochs."""
        self.state.epoch = (self._offset or 0) + epoch + 1

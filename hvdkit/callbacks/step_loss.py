"""`StepLossCallback`: the loss per step, for loss curves within an epoch."""

import csv
import logging
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_log = logging.getLogger(__name__)


class StepLossCallback(keras.callbacks.Callback):
    """Writes a CSV file of `step,loss` with one line per execution: the mean loss since the previous line.

    Keras' own logs contain the mean since the epoch began. The loss is that of this rank's examples.

    Args:
        path: the file to write.
        steps_per_epoch: steps per epoch.
        summaries: a folder for TensorBoard, which shows the losses as `loss_by_step`; None for none.

    Attributes:
        losses: pairs of the number of steps taken and the mean loss since the previous pair.
    """

    def __init__(self, path: Path, steps_per_epoch: int, summaries: Path | None = None) -> None:
        super().__init__()
        self.losses: list[tuple[int, float]] = []
        self._path = path
        self._steps_per_epoch = steps_per_epoch
        self._summaries = summaries
        self._writer: tf.summary.SummaryWriter | None = None
        self._summarized = 0  # of the losses
        self._epoch = 0
        self._sum = 0.0  # of the losses of this epoch's steps so far
        self._count = 0

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Resets the sums, as Keras resets its mean."""
        self._epoch, self._sum, self._count = epoch, 0.0, 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Computes the loss of the newest steps from the change of Keras' mean."""
        count = batch + 1
        total = (logs or {})["loss"] * count
        self.losses.append((self._epoch * self._steps_per_epoch + count, (total - self._sum) / (count - self._count)))
        self._sum, self._count = total, count

    def checkpoint_state(self) -> dict[str, Any]:
        """Returns all lines so far, and the sums of the epoch."""
        return {"losses": np.array(self.losses, np.float64), "mean": (self._epoch, self._sum, self._count)}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Restores what `checkpoint_state` returned."""
        self.losses = [(int(step), float(loss)) for step, loss in state["losses"]]
        self._epoch, self._sum, self._count = state["mean"]
        self._summarized = len(self.losses)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes the file."""
        self._write()
        if self._summaries:
            self._summarize(self._summaries)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Writes the file also where a run that resumes has no epoch left, and closes TensorBoard's file."""
        self._write()
        if self._writer:
            self._writer.close()

    def _write(self) -> None:
        """Writes the file. A full disk costs the file, but does not end the training."""
        try:
            with self._path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("step", "loss"), *self.losses])
        except OSError as error:
            _log.warning("%s cannot be written (%s). Training continues.", self._path, error.strerror)

    def _summarize(self, folder: Path) -> None:
        self._writer = self._writer or tf.summary.create_file_writer(str(folder))
        with self._writer.as_default():
            for step, loss in self.losses[self._summarized :]:
                tf.summary.scalar("loss_by_step", loss, step=step)
        self._writer.flush()
        self._summarized = len(self.losses)

"""`BestModelCheckpoint`: rank 0 saves the best model so far in one file."""

import os
from typing import Any

from hvdkit import world
from hvdkit.compat.keras3 import ModelCheckpoint


class BestModelCheckpoint(ModelCheckpoint):
    """Saves the model whenever `monitor` improves, and overwrites the file.

    Put it after `MetricAverageCallback` (or `standard()`): then it monitors the metric of all ranks together.

    Args:
        monitor: the metric to compare.
        verbose: 1 prints a line whenever a model is saved.
        save_weights_only: save only the weights (`filepath` must then end in `.weights.h5`).
        mode: "min", "max" or "auto", which depends on the metric's name.
        save_freq: "epoch", or a number of batches.
        filepath: the file. You can also set the attribute `filepath` later, as scripts for Horovod's callback of this
            name do: that one has no such argument.

    Raises:
        ValueError: no `filepath` is set when training begins.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: Any = "epoch",
        filepath: str | os.PathLike[str] | None = None,
    ) -> None:
        # Keras checks the extension here, so a file that is named later needs a valid placeholder.
        stand_in = "best.weights.h5" if save_weights_only else "best.keras"
        super().__init__(
            filepath or stand_in,
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
        )
        self.filepath: Any = os.fspath(filepath) if filepath else None

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks that there is a file to write."""
        if self.filepath is None:
            raise ValueError(
                "BestModelCheckpoint does not know where to save: pass filepath='best.keras', or set its attribute "
                "filepath before training."
            )
        self.filepath = os.fspath(self.filepath)
        super().on_train_begin(logs)

    def may_write(self) -> bool:
        """Rank 0 alone."""
        return world.rank() == 0

"""`CompressionGuard`: switches gradient compression off during training if it hurts the loss."""

import logging
import math
from typing import Any

import keras
import numpy as np

from hvdkit import collectives, world
from hvdkit.errors import UsageError
from hvdkit.optimizers.distributed import DistributedOptimizer

_log = logging.getLogger(__name__)


class CompressionGuard(keras.callbacks.Callback):
    """Falls back to uncompressed (dense) gradients if the loss rises too far above its lowest value.

    The first `dense_steps` steps use dense gradients and give a first lowest smoothed loss. Then compression begins. If
    the smoothed mean loss of all ranks rises above the lowest one so far by more than the fraction `tolerance`, or is
    NaN, all ranks use dense gradients for the rest of the training and log a warning.

    Args:
        dense_steps: uncompressed steps at the start, to measure the loss and to stabilize training (as PowerSGD's
            authors do).
        every: steps from one check to the next; a check is an allreduce of two numbers.
        tolerance: how far the loss may rise, as a fraction of the lowest.
        smoothing: weight of the newest mean of `every` steps in the exponential moving average, above 0 and up to 1.

    Attributes:
        fell_back_at: the step at which compression ended; None if it did not.

    Raises:
        UsageError: an argument is invalid, or the optimizer uses no compression that can be switched off.
    """

    def __init__(self, dense_steps: int = 100, every: int = 20, tolerance: float = 0.2, smoothing: float = 0.2) -> None:
        super().__init__()
        if dense_steps < 0 or every < 1 or tolerance <= 0 or not 0 < smoothing <= 1:
            raise UsageError(
                f"CompressionGuard needs dense_steps of 0 or more, every of 1 or more, tolerance above 0 and smoothing "
                f"above 0 and up to 1, but was given {dense_steps}, {every}, {tolerance} and {smoothing}."
            )
        self.fell_back_at: int | None = None
        self._dense_steps, self._every = dense_steps, every
        self._tolerance, self._smoothing = tolerance, smoothing
        self._step = self._in_epoch = self._looked = 0
        self._smoothed = math.nan
        self._lowest = math.inf

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Begins with dense gradients."""
        optimizer = self.model.optimizer
        compressor = optimizer.compression if isinstance(optimizer, DistributedOptimizer) else None
        if compressor is None:
            raise UsageError(
                "CompressionGuard needs hvdkit.DistributedOptimizer(..., compression=...) with int8, onebit, topk or "
                "powersgd. It cannot switch off casts (fp16, bf16)."
            )
        self._compressor = compressor
        if not self._is_alone() and self._step < self._dense_steps:
            compressor.set_dense(True)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Starts new sums: Keras logs the mean loss since the epoch began, from which `_look` takes the newest part."""
        self._in_epoch = 0
        self._sum = 0.0
        self._at_last_look = (0, 0.0)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Checks the loss if `every` steps have passed since the last check."""
        self._step += batch + 1 - self._in_epoch
        self._in_epoch = batch + 1
        if self._is_alone() or self.fell_back_at is not None:
            return
        self._sum = float((logs or {}).get("loss", math.nan)) * self._in_epoch
        if self._step // self._every > self._looked // self._every:
            self._looked = self._step
            self._look()

    def checkpoint_state(self) -> dict[str, Any]:
        """Returns the state to store in a checkpoint."""
        return {name: getattr(self, name) for name in _STATE}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Restores what `checkpoint_state` returned."""
        for name in _STATE:
            setattr(self, name, state[name])

    def _look(self) -> None:
        steps, total = self._in_epoch - self._at_last_look[0], self._sum - self._at_last_look[1]
        self._at_last_look = (self._in_epoch, self._sum)
        everyone = collectives.allreduce_sum(np.asarray([total, steps], np.float64), name="compression_guard")
        loss = float(everyone[0] / max(everyone[1], 1))
        old = loss if math.isnan(self._smoothed) else self._smoothed
        self._smoothed = old + self._smoothing * (loss - old)
        if self._compressor.is_dense:
            self._lowest = min(self._lowest, self._smoothed)
            if self._step >= self._dense_steps:
                self._compressor.set_dense(False)
        elif not self._smoothed <= self._lowest + self._tolerance * abs(self._lowest):  # NaN, too
            self._fall_back()
        else:
            self._lowest = min(self._lowest, self._smoothed)

    def _fall_back(self) -> None:
        self._compressor.set_dense(True)
        self.fell_back_at = self._step
        if world.rank() == 0:
            message = (
                "At step %d the smoothed loss is %.4g, more than %.0f %% above its lowest value, %.4g: gradients are "
                "no longer compressed."
            )
            _log.warning(message, self._step, self._smoothed, 100 * self._tolerance, self._lowest)

    def _is_alone(self) -> bool:
        return world.size() == 1


_STATE = ("fell_back_at", "_step", "_looked", "_smoothed", "_lowest")

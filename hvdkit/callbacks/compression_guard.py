"""`CompressionGuard`: compression that hurts the training is switched off while it trains."""

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
    """Falls back to dense gradients when the loss leaves the corridor that it had with dense ones.

    The first `dense_steps` are taken dense, and the lowest smoothed loss of that time is kept. Then gradients are
    compressed. If the smoothed loss, the mean over all ranks, rises above the lowest one so far by more than
    `tolerance` of it, or is no number, all ranks go back to dense gradients, for good, with a warning.

    Args:
        dense_steps: to learn the loss, and to let training find its direction (as PowerSGD's authors do).
        every: steps from one look to the next; a look is an exchange of two numbers.
        tolerance: how far the loss may rise, as a share of the lowest.
        smoothing: of the mean of `every` steps into the running one, above 0 and up to 1.

    Attributes:
        fell_back_at: the step at which compression ended; None if it did not.

    Raises:
        UsageError: an argument is wrong, or the model's optimizer compresses nothing that could be switched off.
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
        """Begins dense."""
        optimizer = self.model.optimizer
        compressor = optimizer.compression if isinstance(optimizer, DistributedOptimizer) else None
        if compressor is None:
            raise UsageError(
                "CompressionGuard needs hvdkit.DistributedOptimizer(..., compression=...) with int8, onebit, topk or "
                "powersgd: casts (fp16, bf16) are not switched off."
            )
        self._compressor = compressor
        if not self._is_alone() and self._step < self._dense_steps:
            compressor.set_dense(True)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Keras averages the loss over an epoch: what is new is taken apart."""
        self._in_epoch = 0
        self._sum = 0.0
        self._at_last_look = (0, 0.0)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Looks, if enough steps were taken."""
        self._step += batch + 1 - self._in_epoch
        self._in_epoch = batch + 1
        if self._is_alone() or self.fell_back_at is not None:
            return
        self._sum = float((logs or {}).get("loss", math.nan)) * self._in_epoch
        if self._step // self._every > self._looked // self._every:
            self._looked = self._step
            self._look()

    def checkpoint_state(self) -> dict[str, Any]:
        """What was learned so far."""
        return {name: getattr(self, name) for name in _STATE}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Undoes `checkpoint_state`."""
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
            self._compressor.set_dense(True)
            self.fell_back_at = self._step
            if world.rank() == 0:
                _log.warning(
                    "At step %d the loss, %.4g, has left its corridor (the lowest was %.4g, and %.0f %% above it are "
                    "allowed): from here on gradients are exchanged dense.",
                    self._step, self._smoothed, self._lowest, 100 * self._tolerance,
                )  # fmt: skip
        else:
            self._lowest = min(self._lowest, self._smoothed)

    def _is_alone(self) -> bool:
        return world.size() == 1


_STATE = ("fell_back_at", "_step", "_looked", "_smoothed", "_lowest")

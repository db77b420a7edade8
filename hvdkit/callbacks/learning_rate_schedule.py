"""`LearningRateScheduleCallback`: the learning rate as a multiple of its initial value, by epoch."""

from collections.abc import Callable
from typing import Any

import keras

from hvdkit.compat.keras3 import learning_rate_source, momentum_slots


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Sets the learning rate to `initial_lr * multiplier(epoch)` from `start_epoch` to `end_epoch`.

    Args:
        initial_lr: the rate to multiply; None takes the optimizer's rate when training begins.
        multiplier: a function of the epoch, or a number `m`, which means `m ** (epoch - start_epoch)`.
        start_epoch: the first epoch (from 0) of the schedule.
        end_epoch: the first epoch after the schedule; None for no end.
        staircase: if true, adjust at the beginning of each epoch, with the epoch as an integer. Otherwise adjust before
            each batch (or each execution of several), with the epoch as a fraction.
        momentum_correction: scale the accumulated velocity of SGD and RMSprop by the change of rate.
        steps_per_epoch: required if `staircase` is false and `fit` does not know it.

    Momentum correction is equation (10) of P. Goyal et al., "Accurate, Large Minibatch SGD", 2017,
    https://arxiv.org/abs/1706.02677. Horovod multiplies the momentum coefficient for one step, but Keras 3 compiles it
    into the graph as a constant. Scaling the velocity gives the same update.

    Raises:
        ValueError: the optimizer's rate is itself a schedule, or the number of steps per epoch is not known.
    """

    def __init__(
        self,
        initial_lr: float | None,
        multiplier: float | Callable[[float], float],
        start_epoch: float = 0,
        end_epoch: float | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        self.initial_lr = initial_lr
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.multiplier: Callable[[float], float] = (
            multiplier if callable(multiplier) else lambda epoch: multiplier ** (epoch - start_epoch)
        )
        self._epoch = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks that the rate can be set, and determines the number of steps per epoch."""
        _refuse_schedule(self.model.optimizer)
        if self.initial_lr is None:
            self.initial_lr = learning_rate_of(self.model.optimizer)
        self.steps_per_epoch = self.steps_per_epoch or self.params.get("steps")
        if not self.staircase and not self.steps_per_epoch:
            raise ValueError(
                f"{type(self).__name__} does not know how many steps an epoch has, because the data set has no known "
                f"length. Pass steps_per_epoch=... to the callback or to fit."
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Adjusts the rate if `staircase` is true."""
        self._epoch = epoch
        if self.staircase:
            self._adjust(epoch)

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Adjusts the rate if `staircase` is false."""
        if not self.staircase:
            self._adjust(self._epoch + batch / (self.steps_per_epoch or 1))

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Logs the rate as `lr`."""
        if logs is not None:
            logs["lr"] = learning_rate_of(self.model.optimizer)

    def _adjust(self, epoch: float) -> None:
        if self.start_epoch <= epoch and (self.end_epoch is None or epoch < self.end_epoch):
            self._set(self.multiplier(epoch))

    def _set(self, multiple: float) -> None:
        optimizer = self.model.optimizer
        old = learning_rate_of(optimizer)
        new = float((self.initial_lr or 0.0) * multiple)
        optimizer.learning_rate = new
        if self.momentum_correction and old > 0 and new != old:
            for velocity in momentum_slots(getattr(optimizer, "inner_optimizer", optimizer)):
                velocity.assign(velocity * (new / old))


def learning_rate_of(optimizer: Any) -> float:
    """Returns the optimizer's learning rate as a number."""
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def _refuse_schedule(optimizer: Any) -> None:
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    rate = learning_rate_source(inner)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        raise ValueError(
            f"The optimizer's learning rate is a {type(rate).__name__}, which sets itself at every step, so a callback "
            f"cannot set it too. Give the optimizer a number, or remove the callback."
        )

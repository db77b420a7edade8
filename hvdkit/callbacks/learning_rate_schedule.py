"""`LearningRateScheduleCallback`: the learning rate as a multiple of its initial value, by epoch."""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import keras

from hvdkit.compat.keras3 import calls_of_apply, learning_rate_source, momentum_slots
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Sets the learning rate to `initial_lr * multiplier(epoch)` from `start_epoch` to `end_epoch`.

    Args:
        initial_lr: the rate to multiply; None takes the optimizer's rate when training begins. If that is the result of
            such a callback (in an earlier `fit`, or in the run that saved the model, where training goes on with a
            later `initial_epoch`), it takes the rate of which this was a multiple.
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
        UsageError: training goes on in the middle of the schedule, and the rate that it multiplies cannot be known.
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
        self._begins = False  # until the first epoch is known

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks that the rate can be set, and determines the number of steps per epoch."""
        optimizer = self.model.optimizer
        _refuse_schedule(optimizer)
        self._found = learning_rate_of(optimizer)
        if self.initial_lr is None and not steps_taken(optimizer):
            self.initial_lr = self._found
        self._begins = self.initial_lr is None
        self.steps_per_epoch = self.steps_per_epoch or self.params.get("steps")
        if not self.staircase and not self.steps_per_epoch:
            raise ValueError(
                f"{type(self).__name__} does not know how many steps an epoch has, because the data set has no known "
                f"length. Pass steps_per_epoch=... to the callback or to fit."
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Adjusts the rate if `staircase` is true."""
        self._epoch = epoch
        if self._begins:
            self._begins = False
            self.initial_lr = self._rate_to_multiply(epoch)
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
        if self._acts_at(epoch):
            self._set(self.multiplier(epoch))

    def _acts_at(self, epoch: float) -> bool:
        return self.start_epoch <= epoch and (self.end_epoch is None or epoch < self.end_epoch)

    def _set(self, multiple: float) -> None:
        optimizer = self.model.optimizer
        old = learning_rate_of(optimizer)
        if self.initial_lr is None:
            rate, origin = _origins.get(_innermost(optimizer), (None, 0.0))
            self.initial_lr = origin if rate == old else self._found
        new = float(self.initial_lr * multiple)
        optimizer.learning_rate = new
        remember_origin(optimizer, self.initial_lr)
        if self.momentum_correction and old > 0 and new != old:
            for velocity in momentum_slots(_innermost(optimizer)):
                velocity.assign(velocity * (new / old))

    def _rate_to_multiply(self, epoch: int) -> float | None:
        """Returns the rate of which the optimizer's present one, of an earlier training, is a multiple.

        Args:
            epoch: the first epoch of this training.

        Returns:
            None if a callback for other epochs has set the present rate. It knows, when this one has to set a rate.
        """
        rate, origin = _origins.get(_innermost(self.model.optimizer), (None, 0.0))
        if rate == self._found:
            return origin
        last = self._last_of(epoch)
        if not epoch:
            return self._found
        if not self._acts_at(last):
            return None
        multiple = self._multiple_before(epoch, last)
        origin = self._found / multiple
        if multiple != 1:
            _log.warning(
                "%s goes on in epoch %d with a rate of %.6g, which it takes for %.6g times %.6g, the rate that it "
                "multiplies. If that is not so, pass initial_lr.",
                type(self).__name__,
                epoch + 1,
                self._found,
                multiple,
                origin,
            )
        remember_origin(self.model.optimizer, origin)
        return origin

    def _last_of(self, epoch: int) -> float:
        """Returns the place, in epochs, at which the rate was set for the last time before an epoch."""
        if self.staircase:
            return epoch - 1
        steps, together = self.steps_per_epoch or 1, self.model.steps_per_execution
        return epoch - 1 + (steps - 1) // together * together / steps

    def _multiple_before(self, epoch: int, last: float) -> float:
        """Returns the multiplier at the end of the training before `epoch`, and refuses to guess it."""
        multiple = self.multiplier(last)
        if multiple <= 0:
            raise self._cannot_know(epoch, f"was {multiple:g} times it")
        return multiple

    def _cannot_know(self, epoch: int, why: str) -> UsageError:
        return UsageError(
            f"{type(self).__name__} begins in epoch {epoch + 1}, and cannot know from the optimizer's present rate, "
            f"{self._found:.6g}, the one that it multiplies: the rate {why}. Give it initial_lr=..., the rate with "
            f"which the optimizer was made."
        )


# By optimizer: the rate that a callback has set last, and the one of which it is a multiple.
_origins: weakref.WeakKeyDictionary[Any, tuple[float, float]] = weakref.WeakKeyDictionary()


def remember_origin(optimizer: Any, origin: float) -> None:
    """Makes callbacks take the optimizer's present rate for a multiple of `origin`, unless it is changed before."""
    _origins[_innermost(optimizer)] = (learning_rate_of(optimizer), origin)


def has_schedule(optimizer: Any) -> bool:
    """Returns whether an optimizer's rate is a schedule of Keras', which sets itself at every step."""
    return isinstance(learning_rate_source(_innermost(optimizer)), keras.optimizers.schedules.LearningRateSchedule)


def steps_taken(optimizer: Any) -> int:
    """Returns how many times gradients were applied; a step that a loss scale skipped may not count."""
    return int(calls_of_apply(_innermost(optimizer)).numpy())


def _innermost(optimizer: Any) -> Any:
    """Returns the optimizer that a loss scale or a proxy wraps."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(inner, "__wrapped__", inner)


def learning_rate_of(optimizer: Any) -> float:
    """Returns the optimizer's learning rate as a number."""
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def _refuse_schedule(optimizer: Any) -> None:
    if has_schedule(optimizer):
        rate = learning_rate_source(_innermost(optimizer))
        raise ValueError(
            f"The optimizer's learning rate is a {type(rate).__name__}, which sets itself at every step, so a callback "
            f"cannot set it too. Give the optimizer a number, or remove the callback."
        )

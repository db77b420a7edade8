"""`LearningRateWarmupCallback`: raises the learning rate gradually to its scaled value."""

import logging

from hvdkit import world
from hvdkit.callbacks.learning_rate_schedule import LearningRateScheduleCallback, steps_taken

_log = logging.getLogger(__name__)


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from `initial_lr / size` to `initial_lr` over the first epochs.

    If you scale the rate by the number of ranks (`hvdkit.scaled`), training starts at the rate of one process. This is
    the gradual warm-up of P. Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 2.2,
    https://arxiv.org/abs/1706.02677::

        lr(epoch) = initial_lr / size * (1 + epoch * (size - 1) / warmup_epochs)

    Args:
        initial_lr: the rate to reach; None takes the optimizer's rate, or in the middle of a warm-up the one that this
            warm-up was to reach, as `LearningRateScheduleCallback` describes.
        warmup_epochs: length of the warm-up in epochs; may be a fraction.
        momentum_correction: see `LearningRateScheduleCallback`.
        steps_per_epoch: see `LearningRateScheduleCallback`.
        verbose: 1 logs a line when the warm-up is done.
        size: number of replicas; by default the number of ranks.
    """

    def __init__(
        self,
        initial_lr: float | None,
        warmup_epochs: float = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
        size: int | None = None,
    ) -> None:
        super().__init__(
            initial_lr,
            self._multiplier,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.warmup_epochs = warmup_epochs
        self.size = size
        self.verbose = verbose

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Begins the warm-up."""
        super().on_train_begin(logs)
        self._reached = False

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Leaves the rate alone if training goes on after a warm-up."""
        if self._begins and epoch >= self.warmup_epochs:
            self._reached = True
        super().on_epoch_begin(epoch, logs)

    def _multiplier(self, epoch: float) -> float:
        replicas = self.size or world.size()
        # One step ahead, as Horovod does: the last step of an epoch then counts as the full epoch.
        done = min(1.0, self._ahead(epoch) / self.warmup_epochs)
        return (1 + done * (replicas - 1)) / replicas

    def _multiple_before(self, epoch: int, last: float) -> float:
        steps = epoch * (self.steps_per_epoch or 1)
        taken = steps_taken(self.model.optimizer)
        multiple = super()._multiple_before(epoch, last)
        # After other numbers of steps it was trained on other data, or on another number of ranks.
        if multiple < 1 and not 0.9 * steps <= taken <= steps:
            raise self._cannot_know(
                epoch, f"is that after {taken} steps, and {epoch} epochs of {self.steps_per_epoch} steps are {steps}"
            )
        return multiple

    def _ahead(self, epoch: float) -> float:
        return epoch + 1 / (self.steps_per_epoch or 1)

    def _adjust(self, epoch: float) -> None:
        # Set the final rate exactly once, even if an execution of several steps jumps over the end of the warm-up.
        # After that, other callbacks may change the rate.
        if not self._reached:
            self._reached = self._ahead(epoch) >= self.warmup_epochs
            self._set(self.multiplier(epoch))

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Logs the rate, and the end of the warm-up."""
        super().on_epoch_end(epoch, logs)
        if self.verbose and epoch < self.warmup_epochs <= epoch + 1:
            _log.info("Epoch %d: finished gradual learning rate warm-up to %g.", epoch + 1, self.initial_lr)

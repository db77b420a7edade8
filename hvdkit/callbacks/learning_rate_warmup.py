"""`LearningRateWarmupCallback`: the scaled learning rate is reached gradually."""

import logging

from hvdkit import world
from hvdkit.callbacks.learning_rate_schedule import LearningRateScheduleCallback

_log = logging.getLogger(__name__)


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from `initial_lr / size` to `initial_lr` over the first epochs.

    With the rate scaled by the number of ranks (`hvdkit.scaled`), training starts at the rate of one process and ends
    at that of all: the gradual warm-up of P. Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 2.2,
    https://arxiv.org/abs/1706.02677::

        lr(epoch) = initial_lr / size * (1 + epoch * (size - 1) / warmup_epochs)

    Args:
        initial_lr: the rate to reach; None takes the optimizer's.
        warmup_epochs: the length of the warm-up in epochs; a fraction is allowed.
        momentum_correction: see `LearningRateScheduleCallback`.
        steps_per_epoch: likewise.
        verbose: 1 says when the warm-up is done.
        size: number of replicas to count with; by default the job's number of ranks.
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

    def _multiplier(self, epoch: float) -> float:
        replicas = self.size or world.size()
        # One step ahead, as Horovod does: the last step of an epoch then has the round number.
        done = min(1.0, self._ahead(epoch) / self.warmup_epochs)
        return (1 + done * (replicas - 1)) / replicas

    def _ahead(self, epoch: float) -> float:
        return epoch + 1 / (self.steps_per_epoch or 1)

    def _adjust(self, epoch: float) -> None:
        # The step that reaches the end is taken once, even where several steps an execution jump over it; then the
        # rate is left to others.
        if not self._reached:
            self._reached = self._ahead(epoch) >= self.warmup_epochs
            self._set(self.multiplier(epoch))

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Logs the rate, and the end of the warm-up."""
        super().on_epoch_end(epoch, logs)
        if self.verbose and epoch < self.warmup_epochs <= epoch + 1:
            _log.info("Epoch %d: finished gradual learning rate warm-up to %g.", epoch + 1, self.initial_lr)

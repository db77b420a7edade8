"""Keras callbacks that make `Model.fit` right on many ranks: one class a file; `standard()` for all a run needs."""

import keras

from hvdkit.callbacks.average_state import AverageStateCallback
from hvdkit.callbacks.broadcast import BroadcastGlobalVariablesCallback
from hvdkit.callbacks.learning_rate_schedule import LearningRateScheduleCallback
from hvdkit.callbacks.learning_rate_warmup import LearningRateWarmupCallback
from hvdkit.callbacks.metric_average import MetricAverageCallback
from hvdkit.callbacks.progress import ProgressCallback
from hvdkit.callbacks.root_output import RootOutputCallback
from hvdkit.callbacks.step_loss import StepLossCallback
from hvdkit.callbacks.stop_at_step import StopAtStepCallback

__all__ = [
    "AverageStateCallback",
    "BroadcastGlobalVariablesCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "ProgressCallback",
    "RootOutputCallback",
    "StepLossCallback",
    "StopAtStepCallback",
    "standard",
]


def standard(warmup_epochs: float = 0, root_rank: int = 0) -> list[keras.callbacks.Callback]:
    """What every distributed `fit` needs, in the right order; put your own callbacks after these.

    Args:
        warmup_epochs: length of the learning rate's warm-up from `lr / size` to the optimizer's `lr`; 0 for none.
        root_rank: the rank whose initial weights everyone takes.

    Returns:
        Callbacks that broadcast the initial state, average BatchNormalization's statistics and all metrics before
        later callbacks see them, warm up the learning rate, and keep all ranks but 0 silent.
    """
    callbacks = [
        BroadcastGlobalVariablesCallback(root_rank),
        AverageStateCallback(),
        MetricAverageCallback(),
        RootOutputCallback(),
    ]
    if warmup_epochs:
        callbacks.append(LearningRateWarmupCallback(initial_lr=None, warmup_epochs=warmup_epochs))
    return callbacks

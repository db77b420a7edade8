"""Keras callbacks that make `Model.fit` correct on several ranks. `standard()` returns all that a run needs."""

import keras

from hvdkit.callbacks.average_state import AverageStateCallback
from hvdkit.callbacks.best_model_checkpoint import BestModelCheckpoint
from hvdkit.callbacks.broadcast import BroadcastGlobalVariablesCallback
from hvdkit.callbacks.compression_guard import CompressionGuard
from hvdkit.callbacks.evaluation import EvaluationCallback
from hvdkit.callbacks.learning_rate_schedule import LearningRateScheduleCallback
from hvdkit.callbacks.learning_rate_warmup import LearningRateWarmupCallback
from hvdkit.callbacks.metric_average import MetricAverageCallback
from hvdkit.callbacks.progress import ProgressCallback
from hvdkit.callbacks.pulse import PulseCallback
from hvdkit.callbacks.replica_guard import ReplicaGuardCallback
from hvdkit.callbacks.root_output import RootOutputCallback
from hvdkit.callbacks.step_loss import StepLossCallback
from hvdkit.callbacks.stop_at_step import StopAtStepCallback
from hvdkit.checkpoint.callback import CheckpointCallback
from hvdkit.profiling.callback import ProfileCallback

__all__ = [
    "AverageStateCallback",
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "CheckpointCallback",
    "CompressionGuard",
    "EvaluationCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "ProfileCallback",
    "ProgressCallback",
    "PulseCallback",
    "ReplicaGuardCallback",
    "RootOutputCallback",
    "StepLossCallback",
    "StopAtStepCallback",
    "standard",
]


def standard(warmup_epochs: float = 0, root_rank: int = 0, guard_every: int = 500) -> list[keras.callbacks.Callback]:
    """Returns the callbacks that every distributed `fit` needs, in the right order. Put your own callbacks after these.

    Args:
        warmup_epochs: length of the learning rate's warm-up from `lr / size` to the optimizer's `lr`; 0 for none.
        root_rank: the rank whose initial weights all ranks take.
        guard_every: steps between two comparisons of the replicas; 0 for none.

    Returns:
        Callbacks that broadcast the initial state, average BatchNormalization's statistics and all metrics before
        later callbacks see them, warm up the learning rate, silence all ranks but 0, and stop all ranks if the
        replicas diverge.
    """
    callbacks = [
        BroadcastGlobalVariablesCallback(root_rank),
        AverageStateCallback(),
        MetricAverageCallback(),
        RootOutputCallback(),
    ]
    if warmup_epochs:
        callbacks.append(LearningRateWarmupCallback(initial_lr=None, warmup_epochs=warmup_epochs))
    if guard_every:
        callbacks.append(ReplicaGuardCallback(guard_every, root_rank=root_rank))
    return callbacks

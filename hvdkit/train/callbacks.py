"""The callbacks of the main job, and how many steps one execution of the graph takes."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from hvdkit import callbacks
from hvdkit.checkpoint.store import Checkpoint
from hvdkit.errors import UsageError
from hvdkit.strategies import Strategy
from hvdkit.train.data import TrainingData
from hvdkit.train.settings import Settings

_log = logging.getLogger(__name__)
_MAX_OVERHEAD = 0.05  # share of the training time that checkpoints of epochs may take


def checkpoint_callback(
    settings: Settings,
    strategy: Strategy,
    workdir: Path,
    identity: dict[str, Any],
    found: Checkpoint | None,
    data: TrainingData,
) -> callbacks.CheckpointCallback:
    """The callback that writes the run's checkpoints, with the data position and warm-up for a resumed run."""
    warmup = {"warmup_epochs": settings.warmup_epochs, "warmup_replicas": _warmup_replicas(strategy, found)}
    return callbacks.CheckpointCallback(
        workdir / "checkpoints",
        every=settings.checkpoint_steps,
        max_overhead=_MAX_OVERHEAD if settings.checkpoint_steps == "epoch" else None,
        resume="never",  # the checkpoint is already open, in `found`
        resumed=found,
        keep=settings.keep,
        keep_best=settings.keep_best,
        monitor=monitored(settings),
        mode=settings.monitor_mode,
        on_error=settings.checkpoint_error,
        job=identity,
        extra=lambda epoch, step: {"stretches": data.stretches(epoch, step), **warmup},
    )


def monitored(settings: Settings) -> str:
    """Returns the name in `fit`'s logs of the metric that decides which epoch is better."""
    return f"{'val_' if settings.eval_every else ''}{settings.monitor or 'loss'}"


def _warmup_replicas(strategy: Strategy, found: Checkpoint | None) -> int:
    """The number of replicas for the warm-up: the one with which training started."""
    return found.state["extra"]["warmup_replicas"] if found else strategy.size


def training_callbacks(
    settings: Settings, strategy: Strategy, steps: int, steps_per_epoch: int, workdir: Path, found: Checkpoint | None
) -> list[keras.callbacks.Callback]:
    """The callbacks of the training, in the order in which Keras calls them."""
    chosen: list[keras.callbacks.Callback] = []
    epochs = steps / steps_per_epoch
    warmup = min(settings.warmup_epochs, epochs / 2)
    if warmup < settings.warmup_epochs:
        _log.info("the warm-up is cut to %.3g epochs, half of the training", warmup)
    if warmup:
        chosen.append(callbacks.LearningRateWarmupCallback(None, warmup, size=_warmup_replicas(strategy, found)))
    if settings.lr_schedule == "cosine":
        multiplier = _cosine(warmup, epochs)
        chosen.append(callbacks.LearningRateScheduleCallback(None, multiplier, start_epoch=warmup, staircase=False))
    if settings.profile:
        start, _, stop = ("32:96" if settings.profile == "auto" else settings.profile).partition(":")
        chosen.append(callbacks.ProfileCallback(workdir / "profile", int(start), int(stop)))
    if settings.compression_guard and strategy.size > 1:
        chosen.append(callbacks.CompressionGuard(settings.compression_guard))
    if steps % steps_per_epoch and steps > steps_per_epoch:
        chosen.append(callbacks.StopAtStepCallback(steps, steps_per_epoch))
    if settings.early_stopping:
        name, mode = monitored(settings), settings.monitor_mode
        chosen.append(keras.callbacks.EarlyStopping(name, patience=settings.early_stopping, mode=mode))
    if strategy.world.is_root:
        chosen.append(keras.callbacks.CSVLogger(workdir / "history.csv"))
        summaries = workdir / "tensorboard" / "steps" if settings.tensorboard else None
        chosen.append(callbacks.StepLossCallback(workdir / "loss.csv", steps_per_epoch, summaries))
        chosen.append(callbacks.PulseCallback(workdir / "logs" / "pulse"))
        if settings.tensorboard:
            chosen.append(_TensorBoard(workdir / "tensorboard", write_graph=False))
    return chosen


class _TensorBoard(keras.callbacks.TensorBoard):
    """Keras' callback for epochs. Steps are those of `StepLossCallback`.

    Keras logs the rate as `learning_rate`: the warm-up's own name for it, `lr`, is left out.
    """

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Does nothing: Keras makes a summary of each log, and with `update_freq="epoch"` throws it away."""

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_epoch_end(epoch, {name: value for name, value in (logs or {}).items() if name != "lr"})


def _cosine(start: float, end: float) -> Callable[[float], float]:
    """From 1 at epoch `start` to 0 at epoch `end` (I. Loshchilov and F. Hutter, "SGDR", 2017, without restarts)."""
    return lambda epoch: 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, epoch - start) / (end - start))))


def steps_per_execution(
    wanted: int | None, steps: int, steps_per_epoch: int, found: Checkpoint | None, most: int = 16
) -> int:
    """Steps that run in one call of the graph.

    The number must divide an epoch, and a shorter last epoch, evenly: otherwise Keras runs beyond the epoch's end. It
    must also divide the step at which training resumes.
    """
    common = math.gcd(min(steps, steps_per_epoch), steps % steps_per_epoch)
    if found:
        common = math.gcd(common, found.state["step_in_epoch"])
    chosen = wanted or max(n for n in range(1, most + 1) if common % n == 0)
    if common % chosen:
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise UsageError(
            f"--steps-per-execution={wanted} does not divide an epoch of {steps_per_epoch} steps in a training of "
            f"{steps}. Use one of {fitting}, or leave it out."
        )
    return chosen

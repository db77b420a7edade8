"""Adapts the user's callbacks to a job of several ranks."""

import os
from collections.abc import Iterable
from typing import Any

import keras

from hvdkit import collectives, world
from hvdkit.callbacks import AverageStateCallback, CheckpointCallback, MetricAverageCallback
from hvdkit.errors import UsageError
from hvdkit.optimizers.sharded import ShardedOptimizer

_BY_METRICS = (keras.callbacks.EarlyStopping, keras.callbacks.ReduceLROnPlateau, keras.callbacks.ModelCheckpoint)
# Callbacks that write files, and the attribute with the path.
_WRITERS = {
    keras.callbacks.ModelCheckpoint: "filepath",
    keras.callbacks.CSVLogger: "filename",
    keras.callbacks.TensorBoard: "log_dir",
    keras.callbacks.BackupAndRestore: "backup_dir",
}


def for_all_ranks(callbacks: list[Any]) -> list[Any]:
    """Returns the user's callbacks after those for exact metrics and averaged statistics; each file has one writer.

    Raises:
        UsageError: only some ranks have a `CheckpointCallback`.
    """
    paths = [p for c in callbacks for p in _paths(c)]
    needs = any(isinstance(c, (*_BY_METRICS, MetricAverageCallback)) for c in callbacks)
    saves = any(isinstance(c, CheckpointCallback) for c in callbacks)
    everyone = collectives.allgather_object((paths, needs, saves), name="callbacks")
    if len({saves for *_, saves in everyone}) > 1:
        without = ", ".join(str(rank) for rank, (*_, saves) in enumerate(everyone) if not saves)
        raise UsageError(
            f"CheckpointCallback is not among the callbacks of rank(s) {without}, and would wait for them for ever. "
            f"Give it to all ranks: it writes on rank 0 alone."
        )
    if any(needs for _, needs, _ in everyone):  # one rank may have a callback that others do not have
        callbacks = [MetricAverageCallback(), *(c for c in callbacks if not isinstance(c, MetricAverageCallback))]
    if not any(isinstance(c, AverageStateCallback) for c in callbacks):
        callbacks = [AverageStateCallback(), *callbacks]
    written = {path for lower, *_ in everyone[: world.rank()] for path in lower}
    return [c for c in callbacks if not written.intersection(_paths(c))]


def check_averages(callbacks: Iterable[Any], optimizers: Iterable[Any]) -> None:
    """Refuses `SwapEMAWeights` where each rank keeps a part of the moving averages.

    Raises:
        UsageError: it is among the callbacks, and an optimizer is a `ShardedOptimizer`.
    """
    swaps = any(isinstance(c, keras.callbacks.SwapEMAWeights) for c in callbacks)
    if swaps and any(isinstance(optimizer, ShardedOptimizer) for optimizer in optimizers):
        raise UsageError(
            "SwapEMAWeights swaps weights with their moving averages, of which each rank of a ShardedOptimizer keeps a "
            "part. Use hvd.DistributedOptimizer, or leave the callback out: after fit the weights are the averages."
        )


def _paths(callback: Any) -> Iterable[str]:
    """Yields the path that one of Keras' own callbacks writes to; a subclass may do more than write."""
    path = getattr(callback, _WRITERS.get(type(callback), ""), None)
    if path is not None:
        yield f"{type(callback).__name__}:{os.path.abspath(os.fspath(path))}"  # noqa: PTH100 - gs:// and the like, too

"""`ProfileCallback`: profiles some steps on all ranks."""

import contextlib
import json
import logging
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.compat.keras3 import strategy_of
from hvdkit.errors import UsageError
from hvdkit.profiling import marks, shares, trace

_log = logging.getLogger(__name__)


class ProfileCallback(keras.callbacks.Callback):
    """Profiles a range of steps: time for input, computation, waiting and gradient allreduce, and which rank is slow.

    Give the callback to all ranks. It does not change the training. Rank 0 writes into `folder`: `summary.md`, a
    readable page; `summary.json`, the same for programs; and `trace.json.gz`, all ranks' steps and operations
    (`tf.profiler`) on one clock, for https://ui.perfetto.dev. With HOROVOD_TIMELINE=DYNAMIC on all ranks, the trace
    includes Horovod's timeline. Its writer then keeps a core of rank 0 busy, also outside of the range.

    Args:
        folder: where to write; created if missing.
        start: the first step to profile, counted from 0. The first steps of a training are not typical.
        stop: the step after the last one. With several steps per execution, whole executions are profiled.
        operations: whether to record operations with `tf.profiler` too, which slows steps down a little.

    Raises:
        UsageError: the range has fewer than three steps, or the model trains under `tf.distribute`.

    Example: `model.fit(dataset, callbacks=[*hvd.callbacks.standard(), hvd.callbacks.ProfileCallback("profile")])`
    """

    def __init__(
        self, folder: str | os.PathLike[str], start: int = 32, stop: int = 96, operations: bool = True
    ) -> None:
        super().__init__()
        if start < 0 or stop < start + 3:
            raise UsageError(f"A profile needs a window of three steps or more, but was given {start} to {stop}.")
        self._folder, self._start, self._stop = Path(folder), start, stop
        self._operations = operations
        self._marks: marks.Marks | None = None
        self._step = self._in_epoch = 0
        self._state = "before"

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Adds the marks, before the step is traced."""
        model = self.model
        if strategy_of(model) is not None:
            raise UsageError("ProfileCallback does not see inside tf.distribute: leave it out under such a strategy.")
        self._marks = marks.start(self._stop - self._start + 256)
        self._own = vars(model).get("train_step")
        model.train_step = self._marks.wrap(model.train_step)
        model.make_train_function(force=True)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Resets the step in the epoch."""
        self._in_epoch = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Starts and ends the profile."""
        self._step += batch + 1 - self._in_epoch
        self._in_epoch = batch + 1
        if self._state == "before" and self._step >= self._start:
            self._open()
        elif self._state == "open" and self._step >= self._stop:
            self._close()

    def on_train_end(self, logs: dict | None = None) -> None:
        """Ends an open profile, and restores the model's training step."""
        if self._state == "open":
            self._close()
        elif self._state == "before" and world.rank() == 0:
            _log.warning("Training ended after %d steps, before the profile's window began.", self._step)
        marks.stop()
        del self.model.train_step
        if self._own is not None:
            self.model.train_step = self._own
        self.model.train_function = None

    def _open(self) -> None:
        self._state = "open"
        if world.rank() == 0:
            with contextlib.suppress(OSError):  # said when the profile is written
                self._folder.mkdir(parents=True, exist_ok=True)
        collectives.barrier(name="profile")
        self._scratch = self._folder / f"rank-{world.rank():04d}"
        self._timeline = self._folder.resolve() / "horovod-timeline.json"
        self._timeline_began = 0.0
        if world.size() > 1 and os.environ.get("HOROVOD_TIMELINE") == "DYNAMIC":
            world.horovod().start_timeline(str(self._timeline))
            self._timeline_began = time.time()
        if self._operations:
            with contextlib.suppress(tf.errors.AlreadyExistsError, tf.errors.UnavailableError):  # the user profiles
                self._profiler_began = time.time()
                tf.profiler.experimental.start(str(self._scratch))
        if self._marks:
            self._marks.reset()

    def _close(self) -> None:
        self._state = "closed"
        mine = self._marks.read() if self._marks else np.zeros([0, 4])
        if self._operations:
            with contextlib.suppress(tf.errors.UnavailableError):
                tf.profiler.experimental.stop()
        if self._timeline_began:
            world.horovod().stop_timeline()
        # Operations have the times of this rank's clock; rank 0 subtracts the offset once it is known.
        operations = trace.of_profiler(self._scratch, world.rank(), self._profiler_began) if self._operations else []
        shutil.rmtree(self._scratch, ignore_errors=True)
        told = (mine, operations, f"rank {world.rank()} on {socket.gethostname()}")
        everyone: list[Any] = collectives.allgather_object(told, name="profile")
        if world.rank() == 0:
            try:
                self._write(everyone)
            except OSError as error:  # such as a full disk
                _log.warning("The profile cannot be written to %s (%s). Training continues.", self._folder, error)

    def _write(self, everyone: list[Any]) -> None:
        try:
            profile = shares.analyse([times for times, *_ in everyone])
        except ValueError as error:
            _log.warning("There is no profile: %s", error)
            return
        names = [name for *_, name in everyone]
        (self._folder / "summary.md").write_text(shares.page(profile, names))
        content = {
            "ranks": names,
            "step_seconds": profile.step,
            "seconds": [dict(zip(shares.PARTS, map(float, row), strict=True)) for row in profile.seconds],
            "verdict": shares.verdict(profile, names),
            "advice": shares.advice(profile),
            "clock_error_seconds": profile.clock_error,
        }
        (self._folder / "summary.json").write_text(json.dumps(content, indent=2) + "\n")
        events = trace.of_marks(profile, names)
        for rank, (times, operations, _) in enumerate(everyone):
            offset = float(times[0, 3] - profile.times[rank, 0, 3])
            events += [{**event, "ts": event["ts"] - offset * 1e6} for event in operations]
        if self._timeline_began:
            events += trace.of_timeline(self._timeline, self._timeline_began)
            self._timeline.unlink(missing_ok=True)
        trace.write(self._folder / "trace.json.gz", events)
        _log.info("%s %s", content["verdict"], f"See {self._folder / 'summary.md'}.")

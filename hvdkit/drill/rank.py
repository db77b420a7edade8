"""What each rank of a drill runs: the training job, with a record of its examples and the injected fault."""

import contextlib
import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives, reporting, world
from hvdkit.drill.report import hashes
from hvdkit.train import flags as train_flags
from hvdkit.train.__main__ import main as train

_SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "term": signal.SIGTERM}
_SLOW_SECONDS = 0.2  # per step
_FULL_STEPS = 60  # minimum number of steps with a full disk; enough for a checkpoint to fail


@dataclasses.dataclass(frozen=True)
class Fault:
    """The kind of fault, its rank, and the number of steps after which it happens."""

    kind: str
    rank: int
    step: int


class Notes(keras.callbacks.Callback):
    """Records what is trained, and when: one file for each start and rank.

    Args:
        folder: the folder of all records.
    """

    checkpointed = False

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._epoch = 0

    def tap(self, batches: tf.data.Dataset, first_step: int) -> tf.data.Dataset:
        """Returns the same batches, and records hashes of their examples."""
        began = collectives.broadcast_object(f"{time.time():.3f}", name="drill")
        path = self._folder / f"{began}-rank-{world.rank():04d}.jsonl"
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._write(first=first_step)

        def note(number: Any, *inputs: Any) -> Any:
            self._write(step=int(number), hashes=hashes(*inputs))
            return np.int64(0)

        def pass_on(number: Any, batch: Any) -> Any:
            inputs = [leaf for leaf in tf.nest.flatten(batch[0]) if isinstance(leaf, tf.Tensor)]  # not the ragged ones
            noted = tf.numpy_function(note, [number, *inputs], tf.int64)
            with tf.control_dependencies([noted]):
                return tf.nest.map_structure(tf.identity, batch)

        return batches.enumerate(first_step).map(pass_on)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Stores the epoch."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Records the number of steps done."""
        self.done = self._epoch * self.params["steps"] + batch + 1
        if world.rank() == 0:
            self._write(time=time.time(), done=self.done)

    def _write(self, **note: Any) -> None:
        self._file.write(json.dumps(note) + "\n")


class Trouble(keras.callbacks.Callback):
    """Injects the fault, once over all starts.

    Args:
        fault: the fault.
        notes: this rank's `Notes`, for the number of steps done; it comes before this callback in the list.
        folder: where `fault.json` records that the fault has happened.
        checkpoint_every: steps between checkpoints.
    """

    checkpointed = False

    def __init__(self, fault: Fault, notes: Notes, folder: Path, checkpoint_every: int) -> None:
        super().__init__()
        self._full_steps = max(_FULL_STEPS, checkpoint_every + checkpoint_every // 2)
        self._fault = fault
        self._notes = notes
        self._told = folder / "fault.json"
        self._filler = folder.parent / "checkpoints" / "filler"

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Injects the fault at its step."""
        done, fault = self._notes.done, self._fault
        if world.rank() != fault.rank or done < fault.step:
            return
        if fault.kind == "slow":
            time.sleep(_SLOW_SECONDS)
        if fault.kind == "disk-full" and done >= fault.step + self._full_steps:
            self._filler.unlink(missing_ok=True)
        if not self._told.exists():
            host = os.uname().nodename
            reporting.write_json(self._told, {"rank": fault.rank, "host": host, "step": done, "time": time.time()})
            self._happen()

    def _happen(self) -> None:
        if self._fault.kind in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[self._fault.kind])
        elif self._fault.kind == "disk-full":
            with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
                while file.write(b"\0" * 65536):
                    pass


def main(what: str, flags: list[str]) -> int:
    """Trains; `what` is KIND:RANK:STEP:FOLDER."""
    kind, rank, step, folder = what.split(":", 3)
    notes = Notes(Path(folder))
    every = train_flags.parse(["hvdkit.drill", *flags]).checkpoint_steps
    fault = Fault(kind, int(rank), int(step))
    trouble = Trouble(fault, notes, Path(folder), every if isinstance(every, int) else 0)
    return train(["hvdkit.train", *flags], [notes, trouble], notes.tap)

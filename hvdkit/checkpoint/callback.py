"""`CheckpointCallback`: interrupted training resumes with the same results as without the interruption."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import keras

from hvdkit import collectives, outcome, world
from hvdkit.checkpoint import learnt, lock, randomness, rates, resuming, store, variables
from hvdkit.checkpoint.background import Writer
from hvdkit.checkpoint.best import Best
from hvdkit.checkpoint.callback_state import CallbackStates, arrays_of, checksums, unlike
from hvdkit.checkpoint.overhead import Overhead
from hvdkit.checkpoint.plain import pack, unpack
from hvdkit.checkpoint.preemption import Listener
from hvdkit.checkpoint.running_fit import RunningFit
from hvdkit.checkpoint.store import Checkpoint
from hvdkit.compat.keras3 import set_first_epoch
from hvdkit.errors import UsageError
from hvdkit.optimizers.parts import optimizers_of
from hvdkit.optimizers.state import METRIC, UNTRACKED, Kept, kept_of
from hvdkit.signals import SIGNALS, Preempted

_log = logging.getLogger(__name__)

_MORE_IS_BETTER = ("acc", "auc", "f1", "precision", "recall", "iou", "r2")


class CheckpointCallback(keras.callbacks.Callback):
    """Saves the complete state of `fit` and resumes from it, bit for bit, even in the middle of an epoch.

    Put the callback on all ranks, anywhere in the list, and make a new one for each `fit`. It saves weights, optimizer
    slots and loss scale, the learning rate, the state of all callbacks (including Keras'), the metrics of the epoch so
    far, epoch and step, every rank's seeds, and the position in the data. Also what Keras itself does not save: states
    of stateful RNNs, `tf.Variable`s in layers, and plain values and arrays in attributes of your own layers and metrics
    that change while training. What it leaves out is named in a warning before the first checkpoint. Rank 0 writes in a
    thread while training continues.

    With another number of ranks, the saved learning rate is multiplied by the ratio of those with which the optimizer
    is made, so a rate in `hvdkit.scaled` stays scaled.

    A data set of your own (arrays, `tf.data.Dataset`, `PyDataset`) must give the same batches in each run: shuffle
    with a fixed seed, or after `keras.utils.set_random_seed`. When training resumes, the batches of the interrupted
    epoch that were already trained on are read again and skipped; of an infinite data set, all earlier batches.

    A signal (SIGTERM, SIGUSR1), to one rank or to all, saves a checkpoint and ends the job on all ranks after the same
    step, with exit code 85. Run the same command again to resume. A signal during evaluation takes effect at the end
    of the epoch.

    Args:
        directory: where rank 0 writes checkpoints.
        every: steps between checkpoints, or "epoch". The end of training is always saved.
        max_overhead: with `every="epoch"`, the largest share of the training time that checkpoints may take: an epoch
            that ends too early for the next one is not saved, unless it is one of the best or the last. None saves each
            epoch.
        resume: "auto" resumes from the newest intact checkpoint in `directory`, if there is one; "never"; or the path
            of a checkpoint, or of a run that has some.
        keep: how many of the newest checkpoints to keep.
        keep_best: how many of the best checkpoints to keep in addition, by `monitor`. Every epoch is judged, and saved
            if it is among the best, also where `every` would not save it.
        monitor: a metric in an epoch's logs.
        mode: "min", "max", or "auto", which infers it like Keras, from the metric, and otherwise from its name.
        on_error: what to do when a checkpoint cannot be written: "warn" continues training, "stop" ends the job.
        job: what identifies this run: JSON values by name. A checkpoint with another value for one of them is rejected.
        extra: a function of the (epoch, step) at which training would resume. Its result, of JSON types, is saved in
            `state["extra"]`.
        resumed: the checkpoint to resume from, if the caller has opened it and made a data set that starts at its
            step. Then no batch is skipped.
        signals: the signals on which to save and exit.

    Attributes:
        resumed: the checkpoint that training resumed from; None if it started from the beginning.

    Raises:
        UsageError: an argument is wrong, the checkpoint is of another model or another job, or another job that runs
            now writes to `directory`.

    Example: `model.fit(dataset, epochs=9, callbacks=[*hvd.callbacks.standard(), CheckpointCallback("run", every=500)])`
    """

    checkpointed = False

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every: int | str = "epoch",
        resume: str | os.PathLike[str] = "auto",
        keep: int = 3,
        keep_best: int = 0,
        monitor: str = "val_loss",
        mode: str = "auto",
        on_error: str = "warn",
        job: Mapping[str, Any] | None = None,
        extra: Callable[[int, int], Any] | None = None,
        resumed: Checkpoint | None = None,
        signals: Iterable[int] = SIGNALS,
        max_overhead: float | None = None,
    ) -> None:
        super().__init__()
        if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise UsageError(f"every must be 'epoch' or a number of steps, 1 or more, but is {every!r}.")
        if keep < 1 or keep_best < 0:
            raise UsageError(f"keep must be 1 or more and keep_best 0 or more, but they are {keep} and {keep_best}.")
        if max_overhead is not None and (every != "epoch" or not 0 < max_overhead <= 1):
            raise UsageError(
                f"max_overhead must be a share of the time, over 0 and at most 1, and every 'epoch' with it, but they "
                f"are {max_overhead} and {every!r}."
            )
        for name, value, choices in (("mode", mode, ("auto", "min", "max")), ("on_error", on_error, ("warn", "stop"))):
            if value not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, but is {value!r}.")
        self.directory = Path(directory).expanduser()
        self.every = every
        self.resume = os.fspath(resume)
        self.keep = keep
        self.keep_best = keep_best
        self.monitor = monitor
        more = any(part in monitor for part in _MORE_IS_BETTER)
        self.infers_mode = mode == "auto"
        self.mode = mode if mode != "auto" else "max" if more else "min"
        self.on_error = on_error
        self.job = dict(job or {})
        self.extra = extra
        self.resumed = resumed
        self.data_begins_there = resumed is not None
        self.signals = tuple(signals)
        self.max_overhead = max_overhead
        self._used = False

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Adds the callback that saves behind all other callbacks, where their state is final."""
        if self._used:
            raise UsageError(
                "This CheckpointCallback has served a fit already. Give the next fit a new one, with another "
                "directory: a run that resumes must find the checkpoints of each fit apart."
            )
        self._used = True
        fit = RunningFit(self.model)
        keeper = _Keeper(self, fit)
        keeper.set_params(self.params)
        keeper.set_model(self.model)
        fit.callbacks.append(keeper)  # Keras is iterating over this list and reaches the new callback last

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Does nothing, but its presence keeps Keras from calling hooks in other threads."""


class _Keeper(keras.callbacks.Callback):
    """The last callback, behind Keras' own ones: saves and restores for a `CheckpointCallback`."""

    checkpointed = False

    def __init__(self, settings: CheckpointCallback, fit: RunningFit) -> None:
        super().__init__()
        self._settings = settings
        self._fit = fit
        self._writer = Writer()
        self._overhead = Overhead(settings.max_overhead)
        self._listener = Listener(settings.model, settings.signals)
        self._epoch = self._step = 0  # the position of training: `_step` steps of this epoch are done
        self._before = 0  # steps of the previous epochs
        self._looked = 0  # total steps when `_is_time` was last called
        self._stopped = False
        self._waited = 0.0  # seconds that training has waited for snapshots
        self._saved = False  # a first checkpoint
        self._pending: Checkpoint | None = None  # to restore when the epoch has begun
        self._logs: dict[str, Any] = {}

    # ---- Resuming -------------------------------------------------------------------------------------------------
    def on_train_begin(self, logs: dict | None = None) -> None:
        """Restores, after `on_train_begin` of all callbacks, and after the ranks are synchronized."""
        self._refuse_process_sets()
        settings = self._settings
        self._states = CallbackStates(self._fit.callbacks, self.model)
        self._rates = rates.rates_of(self.model)
        resuming.occupy(settings.directory)
        there = store.metrics(settings.directory) if settings.keep_best and world.rank() == 0 else []
        self._best = Best(self.model, settings.keep_best, settings.monitor, settings.mode, settings.infers_mode, there)
        found = settings.resumed or resuming.open_checkpoint(settings.directory, settings.resume)
        if found:
            resuming.refuse_another_job(found, settings.job)
            self._resume(found)
        self._listener.start()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """When training resumes in the middle of an epoch, undoes what Keras and the callbacks do at its start."""
        self._epoch, self._step = epoch, 0
        if self._pending:
            self._step = self._pending.state["step_in_epoch"]
            self._restore(self._pending)
            self._pending = None

    def _resume(self, found: Checkpoint) -> None:
        state, steps = found.state, self.model.steps_per_execution
        self._settings.resumed = found
        if state["step_in_epoch"] % steps:
            raise UsageError(
                f"The checkpoint {found.path} is of step {state['step_in_epoch']} of an epoch, and steps_per_execution="
                f"{steps} skips this step. Use a divisor of it."
            )
        self._fit.build()
        kept = kept_of(self.model)
        resuming.refuse_another_model(found, variables.difference(kept, _signatures(state)))
        resuming.refuse_another_model(found, learnt.difference(self.model, state.get("learnt", [])))
        self._tell_what_is_not_restored(found, kept)
        self._before, self._looked = state["step"] - state["step_in_epoch"], state["step"]
        self._restore(found)
        self._pending = found if state["step_in_epoch"] else None
        self._stopped = state["stopped"]
        where = f"step {state['step_in_epoch']} of epoch {state['epoch'] + 1}"
        if world.rank() == 0:  # a warning, because Python hides lower levels by default
            outcome.tell(outcome.Resumed(state["step"]))
            _log.warning("resuming from %s: %s", found.path, "training was over" if self._stopped else where)
        if self._stopped:
            self._fit.leave_epochs_out(self.params["epochs"])
            return
        self._fit.begin_at(
            state["epoch"],
            state["step_in_epoch"],
            steps=state["steps_per_epoch"],
            data_begins_there=self._settings.data_begins_there,
            then=lambda: self._restore_randomness(found),
            logs=unpack(state["logs"], found.arrays),
        )

    def _tell_what_is_not_restored(self, found: Checkpoint, kept: list[Kept]) -> None:
        state, ranks = found.state, len(found.state["ranks"])
        missing = variables.missing(kept, _signatures(state))
        if state["step_in_epoch"] and any(k.kind == METRIC for k in missing):
            _log.warning("The metrics are not those of %s: in this epoch they start from zero.", found.path)
        lost = [k.path for k in missing if k.kind == UNTRACKED]
        if lost:
            _log.warning("%s does not have %s: it is left as it is.", found.path, " and ".join(lost[:3]))
        moved = [k.path for k in kept if k.kind == UNTRACKED and k.path not in lost]
        if moved and ranks != world.size():
            message = "%s is of %d ranks and their data: each of the %d ranks takes that of one of them."
            _log.warning(message, " and ".join(moved[:3]), ranks, world.size())
        rates.tell(self.model, self._rates, state.get("rates", []), ranks)

    def _restore(self, found: Checkpoint) -> None:
        state = found.state
        variables.restore(kept_of(self.model), _signatures(state), found.arrays)
        learnt.settle(self.model)
        ranks = state["ranks"]
        if len(ranks) != world.size():
            rates.rescale(self.model, self._rates, state.get("rates", []))
        saved = world.rank() if world.rank() < len(ranks) else 0
        self._states.restore(ranks[saved]["callbacks"], arrays_of(saved, found.arrays))

    def _restore_randomness(self, found: Checkpoint) -> None:
        ranks = found.state["ranks"]
        if world.rank() < len(ranks):
            randomness.restore(unpack(ranks[world.rank()]["random"], found.arrays))
        found.arrays.clear()  # frees memory of the model's size; everything is restored

    def _refuse_process_sets(self) -> None:
        for optimizer in optimizers_of(self.model):
            exchange = getattr(optimizer, "_self_gradients", None)
            if exchange is not None and exchange.process_set.process_set_id:
                raise UsageError(
                    "CheckpointCallback saves a model that all ranks train, but the optimizer averages gradients "
                    "within a process set. Use Keras' ModelCheckpoint on one rank of the set."
                )

    # ---- Saving ---------------------------------------------------------------------------------------------------
    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Saves if it is time, or if a rank received a stop request."""
        self._step = batch + 1
        self._logs = dict(logs or {})
        self._stop_on_error()
        leaving = self._listener.after_execution()
        if self._fit.steps is not None and self._step >= self._fit.steps:
            return  # `on_epoch_end` comes next, and saves
        if leaving:
            self._leave(self._save(self._epoch, self._step))
        elif self._is_time():
            self._save(self._epoch, self._step, may_drop=True)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Saves the start of the next epoch if it is time, training ends, or a rank received a stop request."""
        self._stop_on_error()
        leaving, is_due = self._listener.ask_all_whether(self._epoch_is_due())
        self._stopped = bool(self.model.stop_training)
        over = self._stopped or epoch + 1 >= self.params["epochs"]
        is_time = self._is_time()
        cut_short = self._stopped and self._fit.steps is not None and self._step < self._fit.steps
        position = (epoch, self._step) if cut_short else (epoch + 1, 0)
        is_best = self._best.takes(_numbers(logs))
        if is_due or is_time or over or leaving or is_best:
            names = self._save(*position, metrics=_numbers(logs), may_drop=not (over or leaving or is_best))
            if leaving:
                self._leave(names)
        self._before += self._step

    def on_train_end(self, logs: dict | None = None) -> None:
        """Waits until the last checkpoint is written."""
        self._listener.stop()
        self._writer.wait()
        lock.free(self._settings.directory)
        set_first_epoch(self.model, None)
        self._stop_on_error()
        count = self._writer.count
        if count:
            message = "%d checkpoint(s), each written in %.3f s while training continued after a snapshot of %.4f s"
            _log.info(message, count, self._writer.seconds / count, self._waited / count)

    def _is_time(self) -> bool:
        every, now = self._settings.every, self._before + self._step
        before, self._looked = self._looked, now
        return isinstance(every, int) and now // every > before // every

    def _epoch_is_due(self) -> bool:
        """Whether this rank wants the epoch to be saved. Of the time that it takes, rank 0 decides, which writes."""
        if self._settings.every != "epoch" or world.rank():
            return False
        if self._settings.max_overhead is not None and self._writer.busy:
            return False  # what it costs is not known yet
        return self._overhead.allows(self._writer.processor_seconds)

    def _save(
        self, epoch: int, step: int, metrics: Mapping[str, float] | None = None, may_drop: bool = False
    ) -> list[str | None]:
        """Takes a snapshot on all ranks, and starts to write it on rank 0.

        Args:
            epoch: the epoch at which to resume.
            step: the step of that epoch.
            metrics: the metrics of the epoch.
            may_drop: skip this checkpoint if the previous one is still being written.

        Returns:
            The name of the signal that each rank received, or None.
        """
        began = time.perf_counter()
        if not self._saved:
            self._saved = True
            self._tell_what_is_not_saved()
            self._learnt = learnt.digests(self.model)
        arrays: dict[str, Any] = {}
        own_arrays: dict[str, Any] = {}
        kept = kept_of(self.model)
        snapshot = variables.Snapshot(kept)
        random_arrays: dict[str, Any] = {}
        mine = {
            "callbacks": self._states.pack(arrays, own_arrays),
            "checksums": checksums(own_arrays),
            "random": pack(randomness.state(), random_arrays, f"random/{world.rank()}"),
            "random_arrays": random_arrays,
            "heard": self._listener.heard,
            **({"variables": snapshot.signatures} if snapshot.divided else {}),
        }
        ranks = collectives.allgather_object(mine, name="checkpoint.ranks")
        others = unlike(own_arrays, ranks[0]["checksums"])
        everyone = collectives.gather_object((snapshot.own, others), name="checkpoint.own")
        heard = [rank["heard"] for rank in ranks]
        if world.rank():
            return heard
        now = self._before + self._step
        if may_drop and self._writer.busy:
            _log.info("no checkpoint of step %d: the previous one is still being written", now)
            return heard
        arrays |= own_arrays
        for rank, (_, others) in zip(ranks, everyone, strict=True):
            arrays |= {**rank["random_arrays"], **others}
        state = {
            **self._position(epoch, step),
            "logs": pack(self._logs, arrays, "logs"),
            "variables": snapshot.signatures,
            "ranks": [
                {name: rank[name] for name in ("callbacks", "random", "variables") if name in rank} for rank in ranks
            ],
        }
        waited = time.perf_counter() - began
        self._waited += waited
        self._overhead.add(began, waited)
        own = [values for values, _ in everyone]
        self._writer.start(now, lambda: self._write(now, state, {**arrays, **snapshot.arrays(own)}, metrics or {}))
        return heard

    def _position(self, epoch: int, step: int) -> dict[str, Any]:
        """Returns what a checkpoint says of the job, besides the values of variables and callbacks."""
        return {
            "step": self._before + self._step,
            "epoch": epoch,
            "step_in_epoch": step,
            "steps_per_epoch": self._fit.steps,
            "stopped": self._stopped,
            "job": self._settings.job,
            "extra": self._settings.extra(epoch, step) if self._settings.extra else None,
            "learnt": self._learnt,
            "rates": self._rates,
            "versions": {"keras": keras.__version__},
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def _tell_what_is_not_saved(self) -> None:
        unsaved = self._states.unsaved()
        if unsaved and world.rank() == 0:
            _log.warning(
                "Checkpoints do not have %s: a run that resumes begins with what the program makes. Give its owner the "
                "methods checkpoint_state() and restore_state(state), or make it a variable.",
                " and ".join(unsaved[:3]),
            )

    def _write(self, step: int, state: dict[str, Any], arrays: dict[str, Any], metrics: Mapping[str, float]) -> Path:
        settings = self._settings
        path = store.write(settings.directory, step, state, arrays, metrics)
        store.retain(settings.directory, settings.keep, settings.keep_best, settings.monitor, self._best.mode)
        return path

    def _stop_on_error(self) -> None:
        if self._settings.on_error == "stop" and self._writer.error and not self._writer.busy:
            raise RuntimeError(
                f"A checkpoint could not be written to {self._settings.directory} ({self._writer.error}), and "
                f"on_error='stop' ends training then. Older checkpoints are intact."
            ) from self._writer.error

    def _leave(self, heard: list[str | None]) -> None:
        """Ends the job on all ranks, after the checkpoint is written."""
        told = [f"rank {rank} ({name})" for rank, name in enumerate(heard) if name]
        message = f"{', '.join(told[:8])}{', ...' * (len(told) > 8)} was told to stop after step "
        message += f"{self._before + self._step}; "
        if world.rank() == 0:
            self._writer.wait()
            message += "it could not be saved, older checkpoints are intact" if self._writer.error else "it is saved"
            message += f"; all ranks exit with code {outcome.PREEMPTED}: run the same command again to resume."
            _log.warning("%s", message)
        # All ranks wait here until it is written: a launcher ends the job when the first rank exits.
        message = collectives.broadcast_object(message, name="checkpoint.leave")
        self._listener.stop()
        lock.free(self._settings.directory)
        set_first_epoch(self.model, None)
        raise Preempted(message)


def _signatures(state: dict[str, Any]) -> list[Any]:
    """The signatures of this rank's saved variables; under model parallelism they differ between ranks."""
    ranks = state["ranks"]
    return list(ranks[world.rank() % len(ranks)].get("variables", state["variables"]))


def _numbers(logs: dict | None) -> dict[str, float]:
    return {name: float(value) for name, value in (logs or {}).items() if isinstance(value, (int, float))}

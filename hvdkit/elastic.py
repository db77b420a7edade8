"""`hvdkit.elastic`: training that continues when ranks are lost or hosts are added.

    state = hvd.elastic.KerasState(model, epoch=0, batch=0)

    @hvd.elastic.run
    def train(state):
        state.model.fit(make_dataset(), epochs=10 - state.epoch, callbacks=[
            hvd.elastic.UpdateEpochStateCallback(state),
            hvd.elastic.UpdateBatchStateCallback(state),
            hvd.elastic.CommitStateCallback(state, batches_per_commit=50),
        ])

    train(state)

Start it with `python -m hvdkit.launch --elastic -H h1:2,h2:2 --workdir DIR -- python train.py`, or with Horovod's
`horovodrun -np 2 --min-np 1 --host-discovery-script ./hosts.sh python train.py`. When a rank is lost, the others return
to the last commit. When hosts are added, training continues from its current state. In both cases ranks and size may
change, all ranks take rank 0's state, and `train` is called again. Create inside `train` everything that depends on the
size, such as this rank's shard of the data.

The two launchers work differently. Horovod's keeps the processes of the remaining ranks and restarts Horovod in them.
hvdkit's restarts all processes: this discards any state of a failed collective. There, rank 0 keeps its commits in the
launcher's `--workdir`.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives, runtime, world
from hvdkit.callbacks.learning_rate_schedule import has_schedule, learning_rate_of, remember_origin, steps_taken
from hvdkit.checkpoint.commits import Commits
from hvdkit.checkpoint.preemption import Listener
from hvdkit.errors import UsageError
from hvdkit.optimizers import heartbeat
from hvdkit.optimizers.parts import optimizers_of
from hvdkit.optimizers.sharded import ShardedOptimizer
from hvdkit.optimizers.state import make_seeds_differ
from hvdkit.signals import Preempted

world.horovod()  # raises an error with instructions if Horovod is missing
from horovod.common.elastic import ObjectState, run_fn  # noqa: E402
from horovod.common.exceptions import HorovodInternalError  # noqa: E402

__all__ = [
    "CommitStateCallback",
    "KerasState",
    "TensorFlowKerasState",
    "TensorFlowState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]

# The errors that TensorFlow raises if an operation of Horovod fails, and a pattern for their text.
_BROKEN = (
    tf.errors.AbortedError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
)
_FOLDER = "HVDKIT_ELASTIC"  # variable for rank 0's commit folder; set by a launcher that restarts the ranks
_OF_HOROVOD = re.compile(r"horovod|gloo|nccl|hvdkit\.", re.IGNORECASE)


class TensorFlowState(ObjectState):
    """The state of a training loop in memory, with `commit`, `restore`, and `sync` over all ranks.

    It contains variables and the keyword arguments, which become attributes.

    Args:
        variables: list of `tf.Variable`s or `keras.Variable`s, in the same order on all ranks.
        session: ignored, accepted for compatibility with Horovod.
        **kwargs: further values, such as `epoch=0` and `batch=0`; see `KerasState`.

    Raises:
        UsageError: there are no variables. TensorFlow 2 keeps no list of all variables, which Horovod takes by default.
    """

    def __init__(self, variables: Sequence[Any] | None = None, session: Any = None, **kwargs: Any) -> None:
        if not variables:
            raise UsageError(
                "TensorFlowState was given no variables, and TensorFlow 2 keeps no list of all variables: write "
                "TensorFlowState([*model.variables, *optimizer.variables], ...), or use KerasState(model)."
            )
        self.variables = list(variables)
        self._start(None, kwargs)

    def _start(self, model: keras.Model | None, attributes: dict[str, Any]) -> None:
        """Keeps the first values.

        Args:
            model: the model whose `fit` a signal interrupts; None for a training loop of one's own.
            attributes: the user's keyword arguments.
        """
        self._committed = self._values()
        self._commits: Commits | None = None
        self._listener = Listener(model)
        broadcast = functools.partial(collectives.broadcast_object, name="elastic.state")
        super().__init__(bcast_object=broadcast, get_rank=world.rank, **attributes)

    def save(self) -> None:
        """Copies the state, for `restore`. Part of `commit`."""
        self._committed = self._values()
        super().save()

    def restore(self) -> None:
        """Restores the last commit."""
        for variable, value in zip(self._variables(), self._committed, strict=True):
            variable.assign(value)
        self._tell_rate()
        super().restore()

    def sync(self) -> None:
        """Broadcasts rank 0's state to all ranks and commits it."""
        with horovod_errors():
            collectives.broadcast_variables(self._variables())
            self._tell_rate()
            super().sync()
        self.save()

    def commit(self) -> None:
        """Saves the state, and checks whether hosts were added or will be removed; a collective call.

        Raises:
            Preempted: a rank received a stop request (SIGTERM, SIGUSR1). All ranks stop, and the next start resumes
                from this commit.
        """
        if not os.environ.get(_FOLDER):
            super().commit()
            return
        self.save()
        leaving = self._listener.ask_all()
        if self._commits:
            self._commits.keep(self._committed, self._saved_state, may_drop=not leaving)
        if leaving:
            self._leave()

    @contextlib.contextmanager
    def kept_in(self, folder: Path) -> Iterator[None]:
        """Restores the last commit that rank 0 finds in a folder, and keeps later commits there; for `run`."""
        if world.rank() == 0:
            self._commits = Commits(folder)
            if found := self._commits.newest(self._committed):
                self._committed, attributes = found
                for name, value in attributes.items():
                    setattr(self, name, value)
                super().save()
                self.restore()
        self._listener.start()
        try:
            yield
        finally:
            self._listener.stop()
            if self._commits:
                self._commits.close()

    def forget_commits(self) -> None:
        """Waits until all ranks are done, then deletes the commits on disk."""
        collectives.barrier()
        if self._commits:
            self._commits.forget()

    def reset(self) -> None:
        """Does nothing: a graph of one's own is traced by one's own function."""

    def _tell_rate(self) -> None:
        """Does nothing: variables alone have no learning rate."""

    def _leave(self) -> None:
        error = self._commits.wait() if self._commits else ""
        # No rank may stop before the commit is written: a launcher ends the job with the first rank that exits.
        error = collectives.broadcast_object(error, name="elastic.leave")
        outcome = f"could not be written ({error}), but an older one is kept" if error else "is written"
        raise Preempted(f"A rank received a stop request. The commit {outcome}. All ranks stop; start the job again.")

    def _variables(self) -> list[Any]:
        return self.variables

    def _values(self) -> list[np.ndarray]:
        return [np.array(keras.ops.convert_to_numpy(v)) for v in self._variables()]


class KerasState(TensorFlowState):
    """The state of a training run in memory, with `commit`, `restore`, and `sync` over all ranks.

    It contains the model's weights and random seeds, the optimizers' slots, iterations and learning rates, and the
    keyword arguments, which become attributes.

    Args:
        model: a built Keras model. The state also has optimizers in its attributes, as of a GAN.
        optimizer: by default the optimizer of the compiled model.
        **kwargs: further values, such as `epoch=0` and `batch=0`. With Horovod's launcher: anything that can be
            pickled. With hvdkit's launcher, which does not pickle: numbers, strings, arrays, and lists, tuples and
            dicts of these.

    Raises:
        ValueError: the model is not built, or has no optimizer and none is given.
        UsageError: an optimizer is a `ShardedOptimizer`, or one in an attribute is not built.
    """

    def __init__(self, model: keras.Model, optimizer: Any = None, **kwargs: Any) -> None:
        if not model.built:
            raise ValueError(
                f"The model {model.name!r} has no variables yet, so there is no state to keep. Build it first: "
                f"model.build(input_shape)."
            )
        optimizer = optimizer if optimizer is not None else getattr(model, "optimizer", None)
        if optimizer is None:
            raise ValueError(f"The model {model.name!r} has no optimizer: compile it, or pass one to KerasState.")
        others = [o for o in optimizers_of(model) if o is not optimizer]
        if any(isinstance(o, ShardedOptimizer) for o in [optimizer, *others]):
            raise UsageError(
                "KerasState cannot keep the state of a ShardedOptimizer: it is divided over the ranks, and the part of "
                "a lost rank is lost, too. Use hvdkit.callbacks.CheckpointCallback, or DistributedOptimizer."
            )
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        unbuilt = next((o for o in others if not o.built), None)
        if unbuilt is not None:
            raise UsageError(
                f"The model {model.name!r} has a second optimizer, {unbuilt.name!r}, which has no slots yet. Build it "
                f"for the variables that it trains before KerasState is made: optimizer.build(variables)."
            )
        self.model = model
        self.optimizer = optimizer
        self._optimizers = [optimizer, *others]
        # Of a new optimizer; what is restored may be in the middle of a warm-up.
        is_new = not steps_taken(optimizer) and not has_schedule(optimizer)
        self._made_with = learning_rate_of(optimizer) if is_new else None
        self._start(model, kwargs)

    def sync(self) -> None:
        """Broadcasts rank 0's state to all ranks and commits it; then makes random seeds differ between ranks."""
        super().sync()
        make_seeds_differ(self.model)
        self.save()

    def reset(self) -> None:
        """Discards the graphs that were traced for a different number of ranks."""
        if self.model.compiled:
            self.model.make_train_function(force=True)
            self.model.make_test_function(force=True)
        self.model.make_predict_function(force=True)

    def _tell_rate(self) -> None:
        """Lets warm-ups and schedules multiply the rate with which the optimizer was made, not the restored one."""
        if self._made_with is not None:
            remember_origin(self.optimizer, self._made_with)

    def _variables(self) -> list[Any]:
        slots = [v for optimizer in self._optimizers for v in optimizer.variables]
        return list({id(v): v for v in [*self.model.variables, *slots]}.values())


class TensorFlowKerasState(KerasState):
    """`KerasState` by the name that Horovod gives it in `horovod.tensorflow.elastic`.

    Args:
        model: a built Keras model.
        optimizer: by default the optimizer of the compiled model.
        backend: ignored, accepted for compatibility with Horovod.
        **kwargs: further values; see `KerasState`.
    """

    def __init__(self, model: keras.Model, optimizer: Any = None, backend: Any = None, **kwargs: Any) -> None:
        super().__init__(model, optimizer, **kwargs)


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function `func(state, ...)` elastic: it is called again whenever ranks are lost or added.

    Args:
        func: trains from `state`; its first statement must not be a collective.

    Returns:
        A function with the same arguments. It returns what the last call of `func` returns.
    """

    @functools.wraps(func)
    def training(state: Any, *args: Any, **kwargs: Any) -> Any:
        with horovod_errors():
            return func(state, *args, **kwargs)

    under_horovod = run_fn(training, _reset)

    @functools.wraps(func)
    def elastic(state: Any, *args: Any, **kwargs: Any) -> Any:
        folder = os.environ.get(_FOLDER)
        if not folder:
            return under_horovod(state, *args, **kwargs)
        if not isinstance(state, TensorFlowState):
            raise UsageError(
                f"hvdkit's launcher needs a hvd.elastic.KerasState or TensorFlowState, but was given "
                f"{type(state).__name__}, which it cannot keep for the next start. Use one of them, or Horovod's own "
                f"launcher, horovodrun."
            )
        with state.kept_in(Path(folder)):
            state.sync()
            result = func(state, *args, **kwargs)
            state.forget_commits()
            return result

    return elastic


@contextlib.contextmanager
def horovod_errors() -> Iterator[None]:
    """Turns TensorFlow's error from a failed collective into a `HorovodInternalError`, from which a rank can recover.

    Horovod's own `run` recognizes such an error only by the name of the failed node, and ignores all others.
    """
    try:
        yield
    except _BROKEN as error:
        if _OF_HOROVOD.search(str(error)):
            raise HorovodInternalError(str(error)) from error
        raise


def _reset() -> None:
    """Restarts Horovod, and retries if another rank is lost meanwhile."""
    while True:
        runtime.shutdown()
        try:
            with horovod_errors():
                runtime.init()
        except HorovodInternalError:
            continue
        return


class CommitStateCallback(keras.callbacks.Callback):
    """Commits the state every `batches_per_commit` batches and at the end of each epoch.

    After the last batch of an epoch, only the end of the epoch commits. A commit in between would hold an epoch that is
    trained but not counted, and Keras cannot resume there: an epoch has at least one batch. Validation runs before the
    end of the epoch, so a rank that is lost during validation costs the batches since the last commit.

    A commit copies the state, and checks whether hosts were added or will be removed. Put this callback after the
    callbacks that update the state.

    Args:
        state: the `KerasState`.
        batches_per_commit: batches from one commit to the next; at most so many are lost with a rank, or those of one
            execution (`steps_per_execution`) if it has more.
    """

    def __init__(self, state: Any, batches_per_commit: int = 1) -> None:
        super().__init__()
        self.state = state
        self.batches_per_commit = batches_per_commit
        self._since = 0
        self._done = 0  # batches of this epoch in this `fit`

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Resets the count to 0, as on a rank that has just joined."""
        self._since = 0

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Counts the batches of the epoch from 0."""
        self._done = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Counts batches, of which an execution may have several, and commits after `batches_per_commit`."""
        self._since += batch + 1 - self._done
        self._done = batch + 1
        steps = self.params.get("steps")
        done = max(getattr(self.state, "batch", 0), batch + 1)  # of this epoch, before and after a reset
        if self._since >= self.batches_per_commit:
            self._since = 0
            if not steps or done < steps:
                self.state.commit()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Commits."""
        self.state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Updates `state.batch`, the number of batches done in this epoch; after a reset, shortens the epoch by it.

    Horovod's callback of this name stores the index of the last batch, which is one less. At a second reset it also
    loses the batches before the first reset. Put this callback before callbacks that stop the training, such as
    `EarlyStopping`.

    Args:
        state: the `KerasState`, created with `batch=0`.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self._before = 0
        self._cut = False

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Reads the number of batches done before a reset; 0 in all other epochs."""
        self._before = self.state.batch
        self._cut = False

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Counts batches; ends the first epoch after a reset where the interrupted epoch would have ended."""
        self.state.batch = self._before + batch + 1
        steps = self.params.get("steps")
        if self._before and steps and self.state.batch >= steps:
            self._cut = True
            self.model.stop_training = True  # Keras has no other way to end an epoch early
            heartbeat.current().all_stop = True

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Resets the count for the next epoch."""
        self.state.batch = 0
        if self._cut:
            self.model.stop_training = False


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Updates `state.epoch`, the number of epochs done, counted over all resets.

    Call `fit` with `epochs=N - state.epoch`, or with `epochs=N, initial_epoch=state.epoch`.

    Args:
        state: the `KerasState`, created with `epoch=0`.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self._offset: int | None = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Discards the offset of the last `fit`."""
        self._offset = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Computes at the first epoch the offset between Keras' epoch number and `state.epoch`."""
        if self._offset is None:
            self._offset = self.state.epoch - epoch

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Counts epochs."""
        self.state.epoch = (self._offset or 0) + epoch + 1

"""`hvdkit.elastic`: training that goes on when ranks come and go.

    state = hvd.elastic.KerasState(model, epoch=0, batch=0)

    @hvd.elastic.run
    def train(state):
        state.model.fit(make_dataset(), epochs=10 - state.epoch, callbacks=[
            hvd.elastic.UpdateEpochStateCallback(state),
            hvd.elastic.UpdateBatchStateCallback(state),
            hvd.elastic.CommitStateCallback(state, batches_per_commit=50),
        ])

    train(state)

started with `python -m hvdkit.launch --elastic -H h1:2,h2:2 --workdir DIR -- python train.py`, or with Horovod's
`horovodrun -np 2 --min-np 1 --host-discovery-script ./hosts.sh python train.py`. When a rank is lost, the others go
back to the last commit; when hosts are added, they go on from where they are, with other ranks and another size: all
take rank 0's state, and `train` is called again. It must not hold on to what depends on the size, such as this rank's
share of the data.

The two launchers differ in how. Horovod's keeps the processes of ranks that are left, and starts Horovod anew in them.
hvdkit's starts all processes anew, which no state of a broken exchange can survive; there rank 0 keeps its commits in
the launcher's `--workdir`.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives, runtime, world
from hvdkit.checkpoint.commits import Commits
from hvdkit.checkpoint.preemption import Listener, Preempted
from hvdkit.errors import UsageError
from hvdkit.optimizers import heartbeat
from hvdkit.optimizers.sharded import ShardedOptimizer
from hvdkit.optimizers.state import tell_seeds_apart

world.horovod()  # says how to get Horovod where it is missing
from horovod.common.elastic import ObjectState, run_fn  # noqa: E402
from horovod.common.exceptions import HorovodInternalError  # noqa: E402

__all__ = ["CommitStateCallback", "KerasState", "UpdateBatchStateCallback", "UpdateEpochStateCallback", "run"]

# What TensorFlow raises where an operation of Horovod fails, and what then stands in the text.
_BROKEN = (
    tf.errors.AbortedError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
)
_FOLDER = "HVDKIT_ELASTIC"  # set by a launcher that starts ranks anew: where rank 0 keeps what it has committed
_OF_HOROVOD = re.compile(r"horovod|gloo|nccl|hvdkit\.", re.IGNORECASE)


class KerasState(ObjectState):
    """All that a training run must not lose, in memory: committed, restored, and common to all ranks after `sync`.

    These are the model's weights and random seeds, the optimizer's slots, iterations and learning rate, and the
    keyword arguments, which become attributes.

    Args:
        model: a built Keras model.
        optimizer: by default the one that the model is compiled with.
        **kwargs: further values, such as `epoch=0` and `batch=0`: what can be pickled, under Horovod's launcher;
            numbers, texts, arrays, and lists, tuples and dicts of these, under hvdkit's, which pickles nothing.

    Raises:
        ValueError: the model is not built, or has no optimizer and none is given.
        UsageError: it is a `ShardedOptimizer`.
    """

    def __init__(self, model: keras.Model, optimizer: Any = None, **kwargs: Any) -> None:
        if not model.built:
            raise ValueError(
                f"The model {model.name!r} has no variables yet, so there is no state to keep. Build it first: "
                f"model.build(input_shape)."
            )
        optimizer = optimizer if optimizer is not None else getattr(model, "optimizer", None)
        if optimizer is None:
            raise ValueError(f"The model {model.name!r} has no optimizer: compile it, or pass KerasState one.")
        if isinstance(optimizer, ShardedOptimizer):
            raise UsageError(
                "KerasState keeps what each rank has, but a ShardedOptimizer's state is divided over the ranks, and a "
                "rank that is lost takes its part along. Use hvdkit.callbacks.CheckpointCallback, or "
                "DistributedOptimizer."
            )
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        self.model = model
        self.optimizer = optimizer
        self._committed = self._values()
        self._commits: Commits | None = None
        self._listener = Listener(model)
        broadcast = functools.partial(collectives.broadcast_object, name="elastic.state")
        super().__init__(bcast_object=broadcast, get_rank=world.rank, **kwargs)

    def save(self) -> None:
        """Copies the state: this is what `restore` goes back to. Part of `commit`."""
        self._committed = self._values()
        super().save()

    def restore(self) -> None:
        """Goes back to the last commit."""
        for variable, value in zip(self._variables(), self._committed, strict=True):
            variable.assign(value)
        super().restore()

    def sync(self) -> None:
        """Gives all ranks rank 0's state, and makes it the committed one. Random seeds are told apart afterwards."""
        with broken_exchanges_as_horovods():
            collectives.broadcast_variables(self._variables())
            super().sync()
        tell_seeds_apart(self.model)
        self.save()

    def commit(self) -> None:
        """Saves, and looks whether hosts were added or are leaving; a collective call.

        Raises:
            Preempted: a rank was told to leave (SIGTERM, SIGUSR1): all leave, and the next start goes on from here.
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
        """Goes on from the last commit that rank 0 finds in a folder, and keeps more there; for `run`."""
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
                self._commits.wait()

    def forget_commits(self) -> None:
        """Removes what is kept on disk, when all ranks are done."""
        collectives.barrier()
        if self._commits:
            self._commits.forget()

    def _leave(self) -> None:
        error = self._commits.wait() if self._commits else ""
        # Nobody leaves before it is written: a launcher ends the job with the first to go.
        error = collectives.broadcast_object(error, name="elastic.leave")
        outcome = f"it could not be kept ({error}), an older one is" if error else "it is kept"
        raise Preempted(f"A rank was told to leave after a commit; {outcome}. All ranks leave; start the job again.")

    def reset(self) -> None:
        """Drops the graphs that were made for another number of ranks."""
        if self.model.compiled:
            self.model.make_train_function(force=True)
            self.model.make_test_function(force=True)
        self.model.make_predict_function(force=True)

    def _variables(self) -> list[Any]:
        return [*self.model.variables, *self.optimizer.variables]

    def _values(self) -> list[np.ndarray]:
        return [np.array(keras.ops.convert_to_numpy(v)) for v in self._variables()]


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function `func(state, ...)` elastic: it is called again whenever ranks were lost or added.

    Args:
        func: trains from `state`; the first statement must not be an exchange between ranks.

    Returns:
        A function of the same arguments that returns what `func` returns in the end.
    """

    @functools.wraps(func)
    def training(state: Any, *args: Any, **kwargs: Any) -> Any:
        with broken_exchanges_as_horovods():
            return func(state, *args, **kwargs)

    under_horovod = run_fn(training, _reset)

    @functools.wraps(func)
    def elastic(state: Any, *args: Any, **kwargs: Any) -> Any:
        folder = os.environ.get(_FOLDER)
        if not folder:
            return under_horovod(state, *args, **kwargs)
        if not isinstance(state, KerasState):
            raise UsageError(
                f"{type(state).__name__} cannot be kept for the job's next start. Use hvd.elastic.KerasState, or start "
                f"the job with Horovod's own launcher, horovodrun."
            )
        with state.kept_in(Path(folder)):
            state.sync()
            result = func(state, *args, **kwargs)
            state.forget_commits()
            return result

    return elastic


@contextlib.contextmanager
def broken_exchanges_as_horovods() -> Iterator[None]:
    """Turns TensorFlow's error out of a broken exchange into the `HorovodInternalError` that a rank can recover from.

    Horovod's own `run` knows it by the name of the failed node, and drops all other errors of this kind.
    """
    try:
        yield
    except _BROKEN as error:
        if _OF_HOROVOD.search(str(error)):
            raise HorovodInternalError(str(error)) from error
        raise


def _reset() -> None:
    """Starts Horovod anew; again, if one more rank is lost meanwhile."""
    while True:
        runtime.shutdown()
        try:
            with broken_exchanges_as_horovods():
                runtime.init()
        except HorovodInternalError:
            continue
        return


class CommitStateCallback(keras.callbacks.Callback):
    """Commits the state every `batches_per_commit` batches and at the end of each epoch.

    A commit copies the state, and looks whether hosts were added or are leaving. Put it behind the callbacks that
    update the state.

    Args:
        state: the `KerasState`.
        batches_per_commit: how many batches may be lost with a rank.
    """

    def __init__(self, state: Any, batches_per_commit: int = 1) -> None:
        super().__init__()
        self.state = state
        self.batches_per_commit = batches_per_commit
        self._since = 0

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Begins to count at 0, as a rank that has just joined does."""
        self._since = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Counts, and commits."""
        self._since += 1
        if self._since >= self.batches_per_commit:
            self._since = 0
            self.state.commit()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Commits."""
        self.state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Keeps `state.batch`, the number of batches done in this epoch, and shortens the epoch after a reset by them.

    Horovod's callback of this name stores the number of the last batch, one less, and forgets at a second reset what
    was done before the first. Put it before callbacks that stop the training by themselves, such as `EarlyStopping`.

    Args:
        state: the `KerasState`, made with `batch=0`.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self._before = 0
        self._cut = False

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Takes what was done before a reset; 0 in all other epochs."""
        self._before = self.state.batch
        self._cut = False

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Counts, and ends the first epoch after a reset where the epoch before the reset would have ended."""
        self.state.batch = self._before + batch + 1
        steps = self.params.get("steps")
        if self._before and steps and self.state.batch >= steps:
            self._cut = True
            self.model.stop_training = True  # the only way out of an epoch that Keras has
            heartbeat.current().all_stop = True

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """The next epoch begins at 0."""
        self.state.batch = 0
        if self._cut:
            self.model.stop_training = False


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Keeps `state.epoch`, the number of epochs done, over all resets.

    `fit` may be called with `epochs=N - state.epoch`, or with `epochs=N, initial_epoch=state.epoch`.

    Args:
        state: the `KerasState`, made with `epoch=0`.
    """

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state
        self._offset: int | None = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Forgets the last `fit`."""
        self._offset = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Learns at the first epoch from which number Keras counts."""
        if self._offset is None:
            self._offset = self.state.epoch - epoch

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Counts."""
        self.state.epoch = (self._offset or 0) + epoch + 1

"""The state of a training: in memory, the same on all ranks, and on disk where a launcher restarts the ranks."""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from horovod.common.elastic import ObjectState

from hvdkit import collectives, world
from hvdkit.callbacks.learning_rate_schedule import has_schedule, learning_rate_of, remember_origin, steps_taken
from hvdkit.checkpoint.commits import Commits
from hvdkit.checkpoint.preemption import Listener
from hvdkit.elastic.errors import horovod_errors
from hvdkit.errors import UsageError
from hvdkit.optimizers.parts import optimizers_of
from hvdkit.optimizers.sharded import ShardedOptimizer
from hvdkit.optimizers.state import make_seeds_differ
from hvdkit.signals import Preempted

COMMIT_FOLDER = "HVDKIT_ELASTIC"  # variable for rank 0's commit folder; set by a launcher that restarts the ranks


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
        if not os.environ.get(COMMIT_FOLDER):
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

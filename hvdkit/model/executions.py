"""`Executions`: runs several training steps in one call of the graph, where nobody can see the difference.

A step of a small model takes less time than Keras needs around it: a call of a graph, its results, the callbacks.
Keras' remedy is `compile(steps_per_execution=16)`, of which few users know, and for which the steps of an epoch should
be a multiple of it. In a job of several ranks, hvdkit does this by itself

- if no callback looks at single batches, so all that callbacks see happens at the same steps as without it;
- if the length of an epoch is known: the last execution of an epoch is shorter, and none reads beyond the data;
- with as many steps as take about `_SECONDS`, so that an interrupt, the progress bar and a stall are seen in time.

The results have the same bits as without it. `HVDKIT_STEPS_PER_EXECUTION=1` turns it off; another number sets it.
"""

import itertools
import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdkit import collectives
from hvdkit.compat import fit_loop
from hvdkit.errors import UsageError

_SECONDS = 0.1
_MOST = 64
_MEASURED = (2, 6)  # the steps that are measured: the first ones trace the graph, and fill caches
_VARIABLE = "HVDKIT_STEPS_PER_EXECUTION"
# Keras' callbacks with batch hooks that do nothing unless they are told to save after a number of batches.
_SAVE_BY_EPOCH = (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)
_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")


def may_join(model: keras.Model, callbacks: Sequence[Any]) -> bool:
    """Returns whether several steps of this `fit` may run in one execution, as far as this rank knows."""
    if model.steps_per_execution != 1 or model.run_eagerly or model.jit_compile or tf.config.functions_run_eagerly():
        return False
    return _asked_for() != 1 and not any(map(_looks_at_batches, callbacks))


def _asked_for() -> int:
    """Returns the number of steps that the user's environment asks for; 0 if hvdkit may choose."""
    text = os.environ.get(_VARIABLE, "0")
    if not text.isdecimal():
        raise UsageError(f"{_VARIABLE} must be a number of steps, 1 or more, but is {text!r}.")
    return int(text)


def _looks_at_batches(callback: Any) -> bool:
    if getattr(callback, "sees_executions", False):
        return False
    if type(callback) in _SAVE_BY_EPOCH:
        return callback.save_freq != "epoch"
    base = keras.callbacks.Callback
    overrides = any(getattr(type(callback), hook, None) is not getattr(base, hook) for hook in _HOOKS)
    return overrides or any(hook in vars(callback) for hook in _HOOKS)  # LambdaCallback sets attributes


class Executions(keras.callbacks.Callback):
    """Joins the steps of each epoch into executions. All ranks have it, or none.

    It must come after the callbacks that change a model when training begins.
    """

    checkpointed = False
    sees_executions = True

    def __init__(self) -> None:
        super().__init__()
        self._may_join: bool | None = None
        self._done = 0  # steps
        self._began = 0.0
        self._seconds: list[float] = []
        self._steps = _asked_for()  # of an execution; 0 until it is measured

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Replaces the steps of this epoch by executions."""
        iterator, _ = fit_loop.of(self.model)
        if self._may_join is None:
            known = fit_loop.has_known_length(iterator)
            self._may_join = all(collectives.allgather_object(known, name="length_is_known"))
        if self._may_join:
            self.model.train_function = _joined(self.model)
            fit_loop.replace_next_epoch(iterator, self._join)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Measures some of the first steps."""
        if not self._steps and self._done in range(*_MEASURED):
            self._seconds.append(time.perf_counter() - self._began)
        self._done += 1

    def on_train_end(self, logs: dict | None = None) -> None:
        """Gives the model its own function back."""
        if isinstance(self.model.train_function, JoinedFunction):
            self.model.train_function = self.model.train_function.original

    def _join(self, start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Yields Keras' items, each of as many steps as an execution has.

        It asks for no item after an epoch's last one before that has run: Keras then tells the data of the epoch's end.
        """
        iterator, _ = fit_loop.of(self.model)
        items = start()
        for first in items:
            left = iterator.num_batches - fit_loop.step_of(first)
            together = [first, *itertools.islice(items, min(self._length(), left) - 1)]
            self.model.train_function.steps = len(together)
            self._began = time.perf_counter()
            yield fit_loop.joined(together[0], together[-1])

    def _length(self) -> int:
        """Returns the number of steps of the next execution. A collective call, at the same step on all ranks."""
        if not self._steps and self._done >= _MEASURED[1]:
            mine = statistics.median(self._seconds)
            slowest = max(collectives.allgather_object(mine, name="seconds_of_a_step"))
            self._steps = max(1, min(_MOST, round(_SECONDS / slowest)))
        return self._steps or 1


class JoinedFunction:
    """A model's training function, which runs `steps` steps in one call, and returns the last one's logs.

    Args:
        step: takes a batch and returns logs.
        original: the function that Keras made. It runs when `steps` is 0, as after each call.
    """

    def __init__(self, step: Callable[[Any], Any], original: Callable) -> None:
        self.original = original
        self.steps = 0
        self._step = tf.function(step, reduce_retracing=True)
        self._run = tf.function(self._loop, reduce_retracing=True, autograph=False)

    def __call__(self, iterator: Any) -> Any:
        """Runs the steps.

        Raises:
            StopIteration: the data have ended.
        """
        steps, self.steps = self.steps, 0
        if not steps or not isinstance(iterator, tf.data.Iterator):
            return self.original(iterator)
        try:
            return self._run(iterator, tf.constant(steps))
        except tf.errors.OutOfRangeError:
            raise StopIteration from None

    def _loop(self, iterator: Any, steps: tf.Tensor) -> Any:
        """Runs steps in the graph: the first one outside the loop, so its logs show what the loop returns."""
        logs = self._step(iterator.get_next())
        _, logs = tf.while_loop(
            lambda done, _: done < steps,
            lambda done, _: (done + 1, self._step(iterator.get_next())),
            [tf.constant(1), logs],
            parallel_iterations=1,
        )
        return logs


# By the function that Keras made, so that a second `fit` does not trace it again.
_made: weakref.WeakKeyDictionary[Callable, JoinedFunction] = weakref.WeakKeyDictionary()


def _joined(model: keras.Model) -> JoinedFunction:
    original = model.train_function
    if isinstance(original, JoinedFunction):
        return original
    if original not in _made:
        _made[original] = JoinedFunction(_step_of(weakref.ref(model)), original)
    return _made[original]


def _step_of(model: Any) -> Callable[[Any], Any]:
    def one_step(data: Any) -> Any:
        return model().train_step(data)

    return one_step

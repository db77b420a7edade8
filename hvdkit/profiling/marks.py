"""Four times of each step, recorded inside the graph: Python cannot see the steps within one execution.

    batch     the batch is available, and the step starts
    ready     this rank's gradients are available: end of the computation
    reduced   the reduced gradients are available: end of the gradient allreduce
    end       the weights are updated

Marks are added while a step is traced, so `start` must be called before that. In a step without an allreduce, `ready`
and `reduced` equal `end`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

NAMES = ("batch", "ready", "reduced", "end")

_current: "Marks | None" = None


class Marks:
    """The times of the most recent steps.

    Args:
        steps: number of steps to keep.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        with tf.init_scope():
            self._times = tf.Variable(np.zeros([steps, len(NAMES)]), trainable=False, name="profile_times")
            self._step = tf.Variable(0, trainable=False, dtype=tf.int32, name="profile_step")

    def wrap(self, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Returns a training step that records its start and its end."""

        @tf.function
        def inner(data: Any) -> Any:
            return step(data)

        def marked(data: Any) -> Any:
            self.note("batch", tf.nest.flatten(data))
            result = inner(data)
            # `inner` is a tf.function: its result is available only after all its updates are done.
            self.note("end", tf.nest.flatten(result))
            with tf.control_dependencies(tf.nest.flatten(result)):
                self._step.assign_add(1)
            return result

        return marked

    def note(self, name: str, after: Sequence[Any]) -> list[Any]:
        """Records the time at which the values in `after` are available.

        Returns:
            The same values: tensors and `tf.IndexedSlices` that depend on the recorded time. Use these from then on.
        """
        tensors = [t for t in tf.nest.flatten(list(after), expand_composites=True) if isinstance(t, tf.Tensor)]
        with tf.control_dependencies(tensors):
            place = [[self._step.read_value() % self._steps, NAMES.index(name)]]
            noted = self._times.scatter_nd_update(place, [tf.timestamp()])
        with tf.control_dependencies([noted]):
            later = iter([tf.identity(t) for t in tensors])
            return tf.nest.map_structure(
                lambda t: next(later) if isinstance(t, tf.Tensor) else t, list(after), expand_composites=True
            )

    def reset(self) -> None:
        """Removes all recorded times."""
        self._step.assign(0)
        self._times.assign(tf.zeros_like(self._times))

    def read(self) -> np.ndarray:
        """Seconds since 1970 of the steps since `reset`, float64 [steps, 4]; 0 where nothing was recorded."""
        return self._times.numpy()[: int(self._step.numpy())]


def start(steps: int) -> Marks:
    """Makes steps that are traced from now on record their times."""
    global _current
    _current = Marks(steps)
    return _current


def stop() -> None:
    """Undoes `start` for steps that are traced later."""
    global _current
    _current = None


def note(name: str, after: Sequence[Any]) -> list[Any]:
    """Records the time at which gradients are available, after `start`. Use the returned values from then on."""
    if _current is None or tf.executing_eagerly():
        return list(after)
    return _current.note(name, after)

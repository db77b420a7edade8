"""Four times of each step, taken inside the graph: where Python looks on only now and then, nothing else sees them.

    batch     the batch is there, and the step begins
    ready     this rank's gradients are there: computation was until here
    reduced   those of all ranks are there: the exchange was until here
    end       the weights are updated

Marks are made while a step is traced, so they must be asked for before that. A step without an exchange has its
`ready` and `reduced` at the end.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

NAMES = ("batch", "ready", "reduced", "end")

_current: "Marks | None" = None


class Marks:
    """The times of the last steps.

    Args:
        steps: how many are kept.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        with tf.init_scope():
            self._times = tf.Variable(np.zeros([steps, len(NAMES)]), trainable=False, name="profile_times")
            self._step = tf.Variable(0, trainable=False, dtype=tf.int32, name="profile_step")

    def wrap(self, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A training step that notes its beginning and its end."""

        @tf.function
        def inner(data: Any) -> Any:
            return step(data)

        def marked(data: Any) -> Any:
            self.note("batch", tf.nest.flatten(data))
            result = inner(data)
            # The call is over when all that it updates is updated.
            self.note("end", tf.nest.flatten(result))
            with tf.control_dependencies(tf.nest.flatten(result)):
                self._step.assign_add(1)
            return result

        return marked

    def note(self, name: str, after: Sequence[Any]) -> list[Any]:
        """Notes the time at which what is given is there.

        Returns:
            The same, for what is to come later: tensors and `tf.IndexedSlices` that are there once it is noted.
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
        """Forgets all steps."""
        self._step.assign(0)
        self._times.assign(tf.zeros_like(self._times))

    def read(self) -> np.ndarray:
        """Seconds since 1970 of the steps since `reset`, float64 [steps, 4]; 0 where nothing was noted."""
        return self._times.numpy()[: int(self._step.numpy())]


def start(steps: int) -> Marks:
    """Makes exchanges that are traced from now on note their times."""
    global _current
    _current = Marks(steps)
    return _current


def stop() -> None:
    """Ends that, for what is traced later."""
    global _current
    _current = None


def note(name: str, after: Sequence[Any]) -> list[Any]:
    """Notes the time at which gradients are there, if anybody wants to know, and returns them for what comes after."""
    if _current is None or tf.executing_eagerly():
        return list(after)
    return _current.note(name, after)

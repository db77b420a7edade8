"""What a rank with a single core does differently in `fit`, so that its threads do not wait for each other.

Where the kernel does not preempt, a thread that is woken on a busy core waits for the scheduler's next tick, up to
4 ms. Two defaults of TensorFlow hand work to other threads, with no gain on one core:

- TensorFlow's executor runs operations that are ready at the same time in a pool of threads. `inline_execution` runs
  them one after another on the thread that called the graph.
- tf.data's autotuning measures the pipeline, and gives its stages more threads and memory where that helps. `OneCore`
  turns it off.
"""

import contextlib

import keras
import tensorflow as tf

from hvdkit import native
from hvdkit.compat import fit_loop
from hvdkit.world.devices import usable_cores

_INLINE = "HVDKIT_INLINE"  # in native/executor.cc


def inline_execution() -> contextlib.AbstractContextManager:
    """Returns a context in which graphs run on the calling thread if this process has one core, and no GPU."""
    if usable_cores() > 1 or not native.is_built() or tf.config.get_visible_devices("GPU"):
        return contextlib.nullcontext()
    native.load()
    return tf.experimental.function_executor_type(_INLINE)


class OneCore(keras.callbacks.Callback):
    """Turns off the autotuning of the training data if this rank has one core and the user has not set it."""

    checkpointed = False
    sees_executions = True

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Changes the options of the data, before an iterator is made from them."""
        if usable_cores() == 1:
            fit_loop.stop_autotuning(fit_loop.of(self.model)[0])

"""`OneCore`: the callback that keeps the input pipeline of a rank with a single core from delaying its steps.

tf.data's autotuning measures the pipeline, and gives its stages more threads and memory where that helps. With one
core it has nothing to give. But it makes the threads of pipeline and model wait for each other, and where the kernel
does not preempt, such a wait ends with the scheduler's next tick: steps take whole multiples of 4 ms. On such a
machine, plain Keras' `fit` of LeNet took 19.9 ms a step, of which 13 to 18 were computation; without autotuning it took
no more than the computation.
"""

import keras

from hvdkit.compat import fit_loop
from hvdkit.world.devices import usable_cores


class OneCore(keras.callbacks.Callback):
    """Turns off the autotuning of the training data if this rank has one core and the user has not set it."""

    checkpointed = False
    sees_executions = True

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Changes the options of the data, before an iterator is made from them."""
        if usable_cores() == 1:
            fit_loop.stop_autotuning(fit_loop.of(self.model)[0])

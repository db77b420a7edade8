"""Trains elastically and says after each epoch where it is: what the tests of elastic runs start.

Its argument is how many seconds a batch takes.
"""

import os
import sys
import time

import keras
import numpy as np

import hvdkit as hvd

EPOCHS, STEPS = 6, 20


class Slow(keras.callbacks.Callback):
    """Leaves time for ranks to come and go, and tells."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(float(sys.argv[1]))

    def on_epoch_end(self, epoch, logs=None):
        iterations = int(self.model.optimizer.iterations)
        say(f"rank {hvd.rank()} of {hvd.size()} did epoch {self.state.epoch} after {iterations} steps")


def say(text):
    print(text, f"(process {os.getpid()} of {os.environ.get('HOROVOD_HOSTNAME')})", flush=True)


def main():
    hvd.init()
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dropout(0.5), keras.layers.Dense(2)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), loss="mse", jit_compile=False)
    state = hvd.elastic.KerasState(model, epoch=0, batch=0, sizes=[])

    @hvd.elastic.run
    def train(state):
        say(f"rank {hvd.rank()} of {hvd.size()} starts at epoch {state.epoch}, batch {state.batch}")
        state.sizes = [*state.sizes, hvd.size()]
        generator = np.random.default_rng(hvd.rank())
        inputs, targets = generator.normal(size=[STEPS * 4, 4]), generator.normal(size=[STEPS * 4, 2])
        callbacks = [
            hvd.elastic.UpdateBatchStateCallback(state),
            hvd.elastic.UpdateEpochStateCallback(state),
            hvd.elastic.CommitStateCallback(state, batches_per_commit=5),
            Slow(state),
        ]
        model.fit(inputs, targets, batch_size=4, epochs=EPOCHS - state.epoch, callbacks=callbacks, verbose=0)

    train(state)
    seed = [int(v.numpy()[0]) for v in model.variables if "seed" in v.path]
    total = float(sum(np.abs(w).sum() for w in model.get_weights()[-2:]))
    steps = int(model.optimizer.iterations)
    here = f"rank {hvd.rank()} of {hvd.size()}"
    say(f"{here} is done: {state.epoch} epochs, {steps} steps, weights {total!r}, seed {seed}, sizes {state.sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

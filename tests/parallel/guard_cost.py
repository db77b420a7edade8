"""Measures what `ReplicaGuardCallback` costs: the time of a check against that of the steps between two of them.

.venv/bin/python -m hvdkit.launch -np 2 -- \\
    .venv/bin/python tests/parallel/guard_cost.py [MODEL:HEIGHTxWIDTHxCHANNELS:LOCAL_BATCH ...]
"""

import inspect
import statistics
import sys
import time

import hvdkit_models
import keras
import numpy as np

import hvdkit as hvd

DEFAULT = ["mnist_mlp:28x28x1:64", "cifar_cnn:32x32x3:64", "resnet:32x32x3:64"]
STEPS, CHECKS = 60, 20


class Timed(hvd.callbacks.ReplicaGuardCallback):
    """Keeps the seconds of each step and of each check."""

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self.steps, self.checks, self._begun = [], [], None

    def on_train_batch_begin(self, batch, logs=None):
        super().on_train_batch_begin(batch, logs)
        self._begun = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(time.perf_counter() - self._begun)
        super().on_train_batch_end(batch, logs)

    def _check(self):
        start = time.perf_counter()
        super()._check()
        self.checks.append(time.perf_counter() - start)


def main(cases):
    hvd.init()
    default = inspect.signature(hvd.callbacks.ReplicaGuardCallback).parameters["every"].default
    for case in cases:
        name, shape, batch = case.split(":")
        shape, batch = [int(n) for n in shape.split("x")], int(batch)
        model = hvdkit_models.load(name).build(shape, 10)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam()), loss=loss, metrics=["accuracy"])
        x = np.random.default_rng(hvd.rank()).uniform(0, 255, [STEPS * batch, *shape]).astype("float32")
        guard = Timed(every=STEPS // CHECKS)
        callbacks = [*hvd.callbacks.standard(guard_every=0), guard]
        model.fit(x, np.arange(len(x)) % 10, batch_size=batch, verbose=0, callbacks=callbacks)
        # The first ones trace.
        step, check = statistics.median(guard.steps[5:]), statistics.median(guard.checks[2:])
        if hvd.rank() == 0:
            print(
                f"{name}, {model.count_params():,} weights, local batch {batch}: a step {1e3 * step:.1f} ms, a check "
                f"{1e3 * check:.1f} ms, with every={default} {check / (default * step):.2%} of the training",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:] or DEFAULT)

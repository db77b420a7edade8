"""Benchmark `fit` of Keras 3 on JAX, data-parallel over processes whose collectives use Gloo.

    python -m hvdkit.launch -np 2 -- keras_jax.py mlp,lenet

Each process has one CPU device: two CPU devices in one process deadlock.
"""

import os
import sys

import models
import setting
import timing

os.environ["KERAS_BACKEND"] = "jax"


def main():
    rank, size, local_rank = setting.rank_and_size()
    setting.pin(local_rank)
    os.environ["NPROC"] = str(setting.threads())  # the size of XLA's thread pools
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    import keras
    from jax.experimental import multihost_utils

    keras.utils.set_random_seed(0)  # before `initialize`, which otherwise draws a seed
    keras.distribution.initialize(",".join(setting.addresses()), size, rank)
    # Each process has data of its own.
    parallel = keras.distribution.DataParallel(devices=keras.distribution.list_devices(), auto_shard_dataset=False)
    keras.distribution.set_distribution(parallel)
    for name in setting.chosen():
        measure(keras, name, rank, size, lambda value: float(multihost_utils.broadcast_one_to_all(value)))
    jax.distributed.shutdown()


def measure(keras, name, rank, size, agree):
    import numpy as np

    keras.utils.set_random_seed(0)
    model = models.build_keras(keras, name)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(models.optimizer_of(keras, name), loss, steps_per_execution=timing.STEPS_PER_CALL)
    batch = models.BATCHES[name]
    images, labels = models.examples(name, rank)

    def run(steps, windows, clock):
        how = {"epochs": windows, "steps_per_epoch": steps, "callbacks": [timing.callback(keras, clock)], "verbose": 0}
        model.fit(images, labels, batch_size=batch, **how)

    weights = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    timing.measure(run, agree, workload=name, rank=rank, global_batch=batch * size, weights=weights)


if __name__ == "__main__":
    sys.exit(main())

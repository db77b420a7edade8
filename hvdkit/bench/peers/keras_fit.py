"""Benchmark `fit` of Keras 2 or 3 under Horovod, tf.distribute, or hvdkit with Keras' defaults.

keras_fit.py horovod|mirrored|multiworker|hvdkit mlp,lenet
"""

import json
import os
import socket
import subprocess
import sys

import models

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # faster kernels, which hvdkit also enables


def start_workers():
    """Start this program once for each worker, with a TF_CONFIG that lists all workers; return the exit code."""
    size = int(os.environ["HVDKIT_BENCH_RANKS"])
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    workers = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={
                **os.environ,
                "TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}),
            },
        )
        for rank in range(size)
    ]
    return max(worker.wait() for worker in workers)


def main():
    how = sys.argv[1]
    if how == "multiworker" and "TF_CONFIG" not in os.environ:
        sys.exit(start_workers())
    rank, size, callbacks, wrap, strategy = 0, int(os.environ["HVDKIT_BENCH_RANKS"]), [], lambda o: o, None
    if how == "multiworker":
        rank = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    if how in ("horovod", "hvdkit"):
        rank = int(os.environ["HOROVOD_RANK"])
    if how == "hvdkit":  # as in a user's script: the launcher has bound the rank, and hvd.init chooses the threads
        return measure_hvdkit(rank, size)
    models.pin(0 if how == "mirrored" else rank)
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(models.threads())
    tf.config.threading.set_inter_op_parallelism_threads(max(2, models.threads()))
    if how == "horovod":
        import horovod.tensorflow.keras as hvd

        hvd.init()
        keras, wrap = tf.keras, hvd.DistributedOptimizer
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    elif how == "multiworker":
        import tf_keras as keras

        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        import keras

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * size)
        strategy = tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(size)])
    for name in models.chosen():
        measure(tf, keras, name, rank, size, strategy, wrap, first=callbacks)
    return None


def measure_hvdkit(rank, size):
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    hvd.init()
    for name in models.chosen():
        always = hvd.callbacks.standard()
        measure(tf, keras, name, rank, size, None, hvd.DistributedOptimizer, (), always, steps_per_execution=1)


def measure(tf, keras, name, rank, size, strategy, wrap, first, always=(), steps_per_execution=models.STEPS_PER_CALL):
    keras.utils.set_random_seed(0)
    batch = models.BATCHES[name] * (size if strategy else 1)  # tf.distribute expects the global batch size

    def build():
        model = models.build_keras(keras, name)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        # Keras 3 fails under MirroredStrategy with more than one step per execution (Keras 3.15, TensorFlow 2.21).
        steps = 1 if isinstance(strategy, tf.distribute.MirroredStrategy) else steps_per_execution
        model.compile(wrap(models.optimizer_of(keras, name)), loss, steps_per_execution=steps)
        return model

    if strategy:
        with strategy.scope():
            model = build()
    else:
        model = build()
    images = tf.random.uniform([models.EXAMPLES, *models.SHAPES[name]], 0, 255)
    labels = tf.random.uniform([models.EXAMPLES], 0, 10, tf.int64)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).cache().shuffle(models.EXAMPLES).repeat()
    data = data.batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    if strategy:
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        data = data.with_options(options)
    given = [*first, *always]

    def run(steps):
        model.fit(data, epochs=1, steps_per_epoch=steps, callbacks=given, verbose=0)
        given[:] = always  # broadcast the variables only once

    weights = sum(int(tf.size(w)) for w in model.trainable_weights)
    models.timed(run, rank, name, models.BATCHES[name] * size, weights)


if __name__ == "__main__":
    main()

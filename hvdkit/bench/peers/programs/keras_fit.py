"""Benchmark `fit` of Keras 2 or 3 under Horovod, tf.distribute, hvdkit with Keras' defaults, or in one plain process.

keras_fit.py horovod|mirrored|multiworker|hvdkit|single mlp,lenet
"""

import json
import os
import sys

import models
import setting
import timing

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # faster kernels, which hvdkit also enables


def main():
    {"hvdkit": hvdkit, "single": single, "horovod": horovod, "multiworker": multiworker, "mirrored": mirrored}[
        sys.argv[1]
    ]()


def hvdkit():
    """As in a user's script: the launcher has bound the rank, and hvd.init chooses the threads."""
    import keras

    import hvdkit as hvd

    hvd.init()
    measure_all(
        keras,
        *(hvd.rank(), hvd.size(), lambda value: hvd.broadcast_object(value, root_rank=0)),
        wrap=hvd.DistributedOptimizer,
        always=hvd.callbacks.standard(),
        steps_per_execution=1,
    )


def single():
    """As in a script that knows nothing of ranks."""
    import keras

    measure_all(keras, 0, 1, float, steps_per_execution=1)


def horovod():
    rank, size, local_rank = setting.rank_and_size()
    tf = limit_threads(local_rank)
    import horovod.tensorflow as hvd
    from horovod.tensorflow.keras import DistributedOptimizer
    from horovod.tensorflow.keras.callbacks import BroadcastGlobalVariablesCallback

    hvd.init()
    first = [BroadcastGlobalVariablesCallback(0)]
    measure_all(tf.keras, rank, size, hvd_mean(tf, hvd), wrap=DistributedOptimizer, first=first)


def hvd_mean(tf, hvd):
    return lambda value: float(hvd.allreduce(tf.constant(value, tf.float64)))


def multiworker():
    rank, size, local_rank = setting.rank_and_size()
    task = {"cluster": {"worker": setting.addresses()}, "task": {"type": "worker", "index": rank}}
    os.environ["TF_CONFIG"] = json.dumps(task)
    tf = limit_threads(local_rank)
    import tf_keras

    strategy = tf.distribute.MultiWorkerMirroredStrategy()

    def mean(value):
        each = strategy.run(lambda: tf.constant(value, tf.float64))
        return float(strategy.reduce(tf.distribute.ReduceOp.MEAN, each, axis=None))

    measure_all(tf_keras, rank, size, mean, strategy=strategy)


def mirrored():
    size = setting.ranks()
    tf = limit_threads(0)
    import keras

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * size)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(size)])
    # Keras 3 fails under MirroredStrategy with more than one step per execution (Keras 3.15, TensorFlow 2.21).
    measure_all(keras, 0, size, float, strategy=strategy, steps_per_execution=1)


def limit_threads(local_rank):
    setting.pin(local_rank)
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(setting.threads())
    tf.config.threading.set_inter_op_parallelism_threads(max(2, setting.threads()))
    return tf


def measure_all(keras, rank, size, agree, **how):
    for name in setting.chosen():
        measure(keras, name, rank, size, agree, **how)


def measure(
    keras,
    name,
    rank,
    size,
    agree,
    *,
    strategy=None,
    wrap=lambda optimizer: optimizer,
    first=(),
    always=(),
    steps_per_execution=timing.STEPS_PER_CALL,
):
    import tensorflow as tf

    keras.utils.set_random_seed(0)

    def build():
        model = models.build_keras(keras, name)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(wrap(models.optimizer_of(keras, name)), loss, steps_per_execution=steps_per_execution)
        return model

    if strategy:
        with strategy.scope():
            model = build()
    else:
        model = build()
    data = dataset(tf, name, rank, size if strategy else 1)  # tf.distribute expects the global batch size
    given = [*first, *always]

    def run(steps, windows, clock):
        callbacks = [*given, timing.callback(keras, clock)]
        model.fit(data, epochs=windows, steps_per_epoch=steps, callbacks=callbacks, verbose=0)
        given[:] = always  # broadcast the variables only once

    weights = sum(int(tf.size(w)) for w in model.trainable_weights)
    batch = models.BATCHES[name] * size
    timing.measure(run, agree, workload=name, rank=rank, global_batch=batch, weights=weights)


def dataset(tf, name, rank, batches):
    data = tf.data.Dataset.from_tensor_slices(models.examples(name, rank)).cache().shuffle(models.EXAMPLES).repeat()
    data = data.batch(models.BATCHES[name] * batches, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    if batches > 1:
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        data = data.with_options(options)
    return data


if __name__ == "__main__":
    main()

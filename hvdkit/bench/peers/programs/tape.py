"""Benchmark plain Horovod: an optimized GradientTape loop with a Keras 3 model and optimizer.

horovodrun -np 2 tape.py mlp
"""

import os

import models
import setting
import timing

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"


def measure(tf, hvd, keras, name):
    keras.utils.set_random_seed(0)
    model, optimizer = models.build_keras(keras, name), models.optimizer_of(keras, name)
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    data = (
        tf.data.Dataset.from_tensor_slices(models.examples(name, hvd.rank())).cache().shuffle(models.EXAMPLES).repeat()
    )
    batches = iter(data.batch(models.BATCHES[name], drop_remainder=True).prefetch(tf.data.AUTOTUNE))

    @tf.function
    def steps():
        for _ in tf.range(timing.STEPS_PER_CALL):
            x, y = next(batches)
            with tf.GradientTape() as tape:
                loss = loss_of(y, model(x, training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(hvd.grouped_allreduce(gradients, op=hvd.Average), model.trainable_variables)

    def run(number, windows, clock):
        for _ in range(windows):
            clock.begin()
            for _ in range(number // timing.STEPS_PER_CALL):
                steps()
                clock.end_execution(timing.STEPS_PER_CALL)
            clock.end()

    def mean(value):
        return float(hvd.allreduce(tf.constant(value, tf.float64)))

    hvd.broadcast_variables([v.value for v in model.variables], root_rank=0)
    weights = sum(int(tf.size(w)) for w in model.trainable_weights)
    batch = models.BATCHES[name] * hvd.size()
    timing.measure(run, mean, workload=name, rank=hvd.rank(), global_batch=batch, weights=weights)


def main():
    setting.pin(int(os.environ.get("HOROVOD_LOCAL_RANK", 0)))
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(setting.threads())
    tf.config.threading.set_inter_op_parallelism_threads(max(2, setting.threads()))
    hvd.init()
    for name in setting.chosen():
        measure(tf, hvd, keras, name)


if __name__ == "__main__":
    main()

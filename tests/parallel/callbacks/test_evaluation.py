"""Metrics that need all examples at once are those of one process on any number of ranks."""

import numpy as np


class Median:
    """Of all errors: no sum over batches gives it."""

    metrics = ("median", "examples")

    def measure(self, inputs, targets, outputs):
        return np.abs(np.asarray(targets) - np.asarray(outputs)).ravel().tolist()

    def summarize(self, measured):
        return {"median": float(np.median(measured)), "examples": len(measured)}


def evaluated():
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    me = hvd.init()
    keras.utils.set_random_seed(1)
    x = np.random.default_rng(2).normal(size=(23, 3)).astype("float32")
    y = x[:, :1] ** 2
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse", jit_compile=False)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).shard(me.size, me.rank).batch(4)
    training = tf.data.Dataset.from_tensor_slices((x, y)).batch(23)
    judge = hvd.callbacks.EvaluationCallback(Median(), batches)
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(logs["val_median"])

    average = hvd.callbacks.MetricAverageCallback()
    how = {"validation_data": batches, "epochs": 2, "verbose": 0, "callbacks": [average, judge, Watch()]}
    history = model.fit(training, **how).history
    alone = float(np.median(np.abs(y - model.predict(x, verbose=0))))
    again = model.evaluate(batches, verbose=0, return_dict=True, callbacks=[average, judge])
    return history["val_median"], seen, history["val_examples"], again, alone


def test_metrics_of_all_examples_are_those_of_one_process(ranks):
    for history, seen, examples, again, alone in ranks(2, evaluated):
        assert history == seen
        assert examples == [23, 23]
        assert history[-1] == again["median"]
        assert abs(again["median"] - alone) < 1e-6
        assert set(again) == {"loss", "median", "examples"}

"""Steps that are joined train what single steps train, and callbacks see the same."""

import numpy as np
import pytest


def trained(joined, steps_per_epoch=None):
    """The weights, the history, and what callbacks saw; 23 batches of which the last one is smaller."""
    import os

    import keras
    import tensorflow as tf

    import hvdkit as hvd

    class Seen(keras.callbacks.Callback):
        sees_executions = True

        def on_train_begin(self, logs=None):
            self.batches = []

        def on_train_batch_end(self, batch, logs=None):
            self.batches.append(batch)

    os.environ["HVDKIT_STEPS_PER_EXECUTION"] = joined
    me = hvd.init()
    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input([8]), layers.Dense(6), layers.BatchNormalization(), layers.Dropout(0.3), layers.Dense(3)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01)), loss, metrics=["accuracy"])
    generator = np.random.default_rng(me.rank)
    data = tf.data.Dataset.from_tensor_slices(
        (generator.normal(size=[89, 8]).astype("float32"), generator.integers(0, 3, 89))
    ).batch(4)
    seen = Seen()
    callbacks = [*hvd.callbacks.standard(guard_every=10), seen, keras.callbacks.EarlyStopping("loss", patience=5)]
    if steps_per_epoch:
        data = data.repeat()
    history = model.fit(data, epochs=3, steps_per_epoch=steps_per_epoch, callbacks=callbacks, verbose=0)
    del os.environ["HVDKIT_STEPS_PER_EXECUTION"]
    return b"".join(w.tobytes() for w in model.get_weights()), history.history, seen.batches


@pytest.mark.parametrize("steps_per_epoch", [None, pytest.param(20, marks=pytest.mark.slow)])
def test_joined_steps_train_what_single_steps_train(ranks, steps_per_epoch):
    single = ranks(2, trained, joined="1", steps_per_epoch=steps_per_epoch)
    joined = ranks(2, trained, joined="7", steps_per_epoch=steps_per_epoch)
    steps = steps_per_epoch or 23
    assert single[0][2] == [*range(steps)] * 3
    assert joined[0][2] == [6, 13, min(20, steps - 1), *([22] if steps > 21 else [])] * 3
    assert [found[:2] for found in joined] == [found[:2] for found in single]


def chosen(seconds):
    """How many batches a callback saw, of a fit of 200 steps whose executions may take so many seconds."""
    import keras

    import hvdkit as hvd
    from hvdkit.model import executions

    me = hvd.init()
    executions._SECONDS = seconds[me.rank]
    seen = []
    callback = keras.callbacks.Callback()
    callback.sees_executions = True
    callback.on_train_batch_end = lambda batch, logs=None: seen.append(batch)
    model = keras.Sequential([keras.Input([8]), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01)), "mse")
    model.fit(np.ones([800, 8]), np.ones([800, 1]), batch_size=4, callbacks=[callback], verbose=0)
    return seen


def test_all_ranks_choose_the_same_number_from_the_time_of_a_step(ranks):
    """The first steps are measured one by one; no step takes 1000 seconds, or none."""
    assert ranks(2, chosen, seconds=[1e5, 1e5]) == [[0, 1, 2, 3, 4, 5, 69, 133, 197, 199]] * 2
    assert ranks(2, chosen, seconds=[1e-9, 1e-9]) == [[*range(200)]] * 2

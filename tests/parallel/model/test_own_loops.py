"""What loops, losses and metrics of the user's own do on two ranks: what one process does, or a warning."""

import contextlib
import logging

import numpy as np

EXAMPLES, WIDTH = 16, 5


def _data():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(EXAMPLES, WIDTH)).astype("float32")
    return x, (x + generator.normal(0, 0.1, size=x.shape)).astype("float32"), x[:, :1] - 2 * x[:, 1:2]


def _model(outputs, seed=1):
    import keras

    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input([WIDTH]), keras.layers.Dense(4, "tanh"), keras.layers.Dense(outputs)])


def _flat(model):
    return np.concatenate([np.ravel(w.numpy()) for w in model.trainable_variables])


@contextlib.contextmanager
def _said():
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("hvdkit").addHandler(handler)
    yield messages
    logging.getLogger("hvdkit").removeHandler(handler)


def _contrasted(gather, optimizer, rows, compiled):
    """Weights after three steps of a loss in which each example is compared with those that `gather` brings."""
    import tensorflow as tf

    x, partners, _ = _data()
    model = _model(3)

    def step(mine, theirs):
        with tf.GradientTape() as tape:
            logits = 5 * tf.matmul(model(mine), gather(model(theirs)), transpose_b=True)
            labels = tf.range(rows.start, rows.stop)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    take = tf.function(step) if compiled else step
    for _ in range(3):
        take(tf.constant(x[rows]), tf.constant(partners[rows]))
    return _flat(model)


def _clipped(rows):
    """Weights after steps whose gradients are clipped before the optimizer averages them."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    x, _, y = _data()
    model, optimizer = _model(1), hvd.DistributedOptimizer(keras.optimizers.SGD(0.5))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x[rows]) - y[rows]) ** 2)
        grads, _ = tf.clip_by_global_norm(tape.gradient(loss, model.trainable_variables), 0.1)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

    step()


def loops():
    """Differences from one process, and what is said meanwhile."""
    import keras

    import hvdkit as hvd

    me = hvd.init()
    half = EXAMPLES // 2
    uneven = [slice(0, 6), slice(6, EXAMPLES)][me.rank]
    rows, whole = slice(me.rank * half, (me.rank + 1) * half), slice(0, EXAMPLES)
    alone = _contrasted(lambda z: z, keras.optimizers.SGD(0.5), whole, compiled=False)
    found = {
        "eager": _contrasted(hvd.whole_batch, hvd.DistributedOptimizer(keras.optimizers.SGD(0.5)), rows, False),
        "compiled": _contrasted(hvd.whole_batch, hvd.DistributedOptimizer(keras.optimizers.SGD(0.5)), rows, True),
    }
    differences = {name: np.abs(weights - alone).max() for name, weights in found.items()}
    moved = np.abs(alone - _flat(_model(3))).max()
    gathered = hvd.whole_batch(_data()[0][uneven]).numpy()
    with _said() as of_allgather:
        _contrasted(hvd.allgather, hvd.DistributedOptimizer(keras.optimizers.SGD(0.5)), rows, True)
    with _said() as of_clipping:
        _clipped(rows)

    x, _, y = _data()
    model = _model(1, seed=me.rank)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss="mse", jit_compile=False)
    with _said() as on_batch:
        for _ in range(3):
            model.train_on_batch(x[rows], y[rows])
    single = _model(1, seed=0)
    single.compile(keras.optimizers.SGD(0.1), loss="mse", jit_compile=False)
    for _ in range(3):
        single.train_on_batch(x, y)
    differences["train_on_batch"] = np.abs(_flat(model) - _flat(single)).max()
    return differences, moved, gathered, {"allgather": of_allgather, "clipping": of_clipping, "on_batch": on_batch}


def test_loops_of_ones_own_train_the_model_of_one_process_or_say_so(ranks):
    for rank, (differences, moved, gathered, said) in enumerate(ranks(2, loops)):
        assert moved > 0.1
        assert {name: far for name, far in differences.items() if not far < 1e-5} == {}
        np.testing.assert_array_equal(gathered, _data()[0])
        on_root = {
            "allgather": "A loss takes the gradient of hvd.allgather",
            "clipping": "The gradients are clipped by the norm that they have on each rank",
        }
        for name, sentence in on_root.items():
            assert [sentence in message for message in said[name]] == [True] * (rank == 0), said[name]
        assert len(said["on_batch"]) == 1, said["on_batch"]
        assert "differ between the ranks when training begins; all take those of rank 0" in said["on_batch"][0]


def of_batch(y, predictions):
    import keras

    return keras.ops.sum(y * predictions) / keras.ops.sum(keras.ops.abs(y) + keras.ops.abs(predictions))


def of_examples(y, predictions):
    import keras

    return keras.ops.sum(y * predictions, axis=-1)


def _metrics(keras):
    class Largest(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name="largest")
            self.value = self.add_variable((), "zeros", name="value")

        def update_state(self, y, predictions, sample_weight=None):
            self.value.assign(keras.ops.maximum(self.value, keras.ops.max(y - predictions)))

        def result(self):
            return self.value

    class Added(Largest):
        def update_state(self, y, predictions, sample_weight=None):
            self.value.assign(self.value + keras.ops.sum(y - predictions))

    class InPython(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name="in_python")
            self.rows = []

        def update_state(self, y, predictions, sample_weight=None):
            self.rows.append(np.asarray(y))

        def reset_state(self):
            self.rows = []

        def result(self):
            return float(np.median(np.concatenate(self.rows))) if self.rows else 0.0

    added = Added()
    added.name = "added"
    return [Largest(), added, InPython(), of_batch, of_examples, "mae"]


def metrics_of_ones_own():
    """What `fit` says of metrics, and how it ends with `SwapEMAWeights` on a sharded optimizer."""
    import keras

    import hvdkit as hvd

    me = hvd.init()
    x, _, y = _data()
    rows = slice(me.rank * 8, me.rank * 8 + 8)
    model = _model(1)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    model.compile(optimizer, loss="mse", metrics=_metrics(keras), run_eagerly=True)
    with _said() as said:
        for _ in range(2):
            model.fit(x[rows], y[rows], verbose=0, callbacks=[hvd.callbacks.MetricAverageCallback()])
    model.compile(hvd.ShardedOptimizer(keras.optimizers.Adam(use_ema=True)), loss="mse", run_eagerly=True)
    try:
        model.fit(x[rows], y[rows], verbose=0, callbacks=[keras.callbacks.SwapEMAWeights()])
    except hvd.UsageError as error:
        return said, str(error)
    return said, ""


def test_metrics_that_are_no_sums_over_ranks_are_named(ranks):
    (first, refused), (second, _) = ranks(2, metrics_of_ones_own)
    assert "of which each rank of a ShardedOptimizer keeps a part" in refused
    assert second == []
    expected = {
        "'largest' is not that of one process over 2 ranks: it sets value to something else than a sum",
        "'in_python' is not that of one process over 2 ranks: it keeps its state in Python",
        "'of_batch' is not that of one process over 2 ranks: it returns one number for a batch",
    }
    assert len(first) == len(expected), first
    assert all(any(part in message for message in first) for part in expected), first

"""Ranks normalise their batches as one process does the global batch, forwards and backwards."""

import subprocess
import sys

import numpy as np
import pytest

STEPS = 6


def _batches(size):
    """Global batches whose parts differ in length from rank to rank, and in their mean and variance by a lot."""
    generator = np.random.default_rng(6)
    lengths = [6, 3, 5][:size]
    bounds = np.cumsum([0, *lengths])
    x = generator.normal(size=(STEPS, bounds[-1], 4, 3)).astype("float32")
    for rank in range(size):
        x[:, bounds[rank] : bounds[rank + 1]] = x[:, bounds[rank] : bounds[rank + 1]] * (1 + rank) + 30 * rank
    x[:, ::2, 2:] = 0.0  # masked positions: more on some ranks than on others
    return x, generator.integers(2, size=(STEPS, bounds[-1])), bounds


def _small(normalization):
    """Nested, masked, on two axes, one layer called twice, one without gamma and beta."""
    import keras

    keras.utils.set_random_seed(5)
    twice = normalization(momentum=0.7)
    inner = keras.Sequential([keras.layers.Input([4, 6]), normalization(axis=1), keras.layers.Activation("tanh")])
    inputs = keras.layers.Input([4, 3])
    masked = normalization()(keras.layers.Masking()(inputs))
    hidden = twice(keras.layers.Dense(6)(masked))
    hidden = keras.layers.Flatten()(inner(twice(keras.layers.Dense(6)(hidden))))
    hidden = normalization(center=False, scale=False)(hidden)
    return keras.Model(inputs, keras.layers.Dense(2)(hidden))


def _trained(model, optimizer, x, y, **options):
    import keras
    import tensorflow as tf

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, jit_compile=False, **options)
    model.fit(tf.data.Dataset.from_tensor_slices((x, y)), epochs=1, verbose=0)
    return [np.asarray(w) for w in model.get_weights()]


def trained_with_normalization(path, names):
    import keras

    import hvdkit as hvd

    world = hvd.init()
    x, y, bounds = _batches(world.size)
    mine = slice(bounds[world.rank], bounds[world.rank + 1])

    def everywhere(model, **options):
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05))
        return _trained(model, optimizer, x[:, mine], y[:, mine], **options)

    if world.is_root:
        _small(hvd.SyncBatchNormalization)  # Keras numbers this rank's layers differently from now on
    plain, synchronized = keras.layers.BatchNormalization, hvd.SyncBatchNormalization
    ways = {
        "functional": lambda: everywhere(_small(synchronized)),
        "changed": lambda: everywhere(hvd.synchronize_batch_normalization(_small(plain))),
        "local": lambda: everywhere(_small(plain)),
        "eager": lambda: everywhere(_small(synchronized), run_eagerly=True),
        "cloned": lambda: everywhere(_copy(_small(synchronized))),
        "several steps": lambda: everywhere(_small(synchronized), steps_per_execution=3),
        "subclassed": lambda: everywhere(_subclassed(_small(synchronized))),
    }
    results = {name: ways[name]() for name in names}
    results["one process"] = _trained(_small(plain), keras.optimizers.SGD(0.05), x, y)
    if world.is_root:
        model = _small(hvd.SyncBatchNormalization)
        model.set_weights(results[names[0]])
        model.save(path)
        results["saved"] = model.predict(x[0], verbose=0)
    return results, _half_precision(world, x[0], mine)


def _copy(model):
    import keras

    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def _subclassed(inner):
    import keras

    class Wrapper(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def call(self, inputs, training=None):
            return self.inner(inputs, training=training)

    return Wrapper()


def _half_precision(world, x, mine):
    """The layer alone under mixed_float16, with a mean far from 0 and an empty batch on rank 1."""
    import keras
    import tensorflow as tf

    import hvdkit as hvd

    def run(layer, part):
        inputs = tf.constant(part)
        layer.build(inputs.shape)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True)
            loss = tf.reduce_sum(tf.cast(outputs, tf.float32) ** 3)
        return outputs.numpy(), tape.gradient(loss, inputs).numpy(), layer.moving_variance.numpy()

    values = x + 1000.0
    empty = values[:0] if world.rank == 1 else values[mine]
    whole = np.delete(values, range(6, 9), axis=0)
    everything = run(keras.layers.BatchNormalization(dtype="mixed_float16"), whole)
    rows = slice(0, 6) if world.rank == 0 else slice(6, 6 + len(empty))
    return run(hvd.SyncBatchNormalization(dtype="mixed_float16"), empty), [
        *(a[rows] for a in everything[:2]),
        everything[2],
    ]


_SOME = ["functional", "local"]
_OTHERS = ["changed", "eager", "cloned", "several steps", "subclassed"]


@pytest.mark.parametrize(
    ("size", "names"),
    [(2, _SOME), pytest.param(2, _OTHERS, marks=pytest.mark.slow), pytest.param(3, _SOME, marks=pytest.mark.slow)],
)
def test_it_trains_the_model_of_one_process(ranks, size, names, tmp_path):
    path = tmp_path / "x.keras"
    everyone = ranks(size, trained_with_normalization, path=str(path), names=names)
    for found in everyone:
        check_normalization(found, names)
    _opens_in_plain_keras(path, _batches(size)[0][0], everyone[0][0]["saved"], tmp_path)


def check_normalization(found, names):
    """Check what a rank returns from `trained_with_normalization`."""
    results, (ours, alone) = found
    for name in names:
        difference = max(
            np.abs(w - e).max() / max(1, np.abs(e).max())
            for w, e in zip(results[name], results["one process"], strict=True)
        )
        assert (difference > 1e-2) if name == "local" else (difference < 1e-5), f"{name}: {difference}"
    for mine, plain in zip(ours, alone, strict=True):
        assert mine.dtype == plain.dtype
        assert mine.shape == plain.shape
        assert np.abs(mine - plain).max(initial=0) <= 2e-3 * max(1, np.abs(plain).max(initial=0))


def _opens_in_plain_keras(path, inputs, outputs, folder):
    np.savez(folder / "x.npz", inputs=inputs, outputs=outputs)
    program = f"""
import sys
sys.modules["hvdkit"] = sys.modules["horovod"] = None  # importing either raises ImportError
import keras, numpy
model, data = keras.models.load_model({str(path)!r}), numpy.load({str(folder / "x.npz")!r})
assert numpy.abs(model.predict(data["inputs"], verbose=0) - data["outputs"]).max() < 1e-5
model.compile("sgd", "sparse_categorical_crossentropy")
model.fit(data["inputs"], numpy.zeros(len(data["inputs"])), verbose=0)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def saved_by_a_callback(folder):
    import keras

    import hvdkit as hvd

    world = hvd.init()
    x, _, bounds = _batches(world.size)
    part = slice(bounds[world.rank], bounds[world.rank + 1])
    model = _small(keras.layers.BatchNormalization)
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == STEPS - 1:
                seen.append([np.array(w) for w in self.model.non_trainable_weights])

    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.05)), loss="mse", jit_compile=False)
    data = np.concatenate(x[:, part]), np.zeros([STEPS * (part.stop - part.start), 2])
    save = keras.callbacks.ModelCheckpoint(f"{folder}/{{epoch}}.keras")
    model.fit(*data, batch_size=part.stop - part.start, epochs=2, shuffle=False, verbose=0, callbacks=[Watch(), save])
    return seen


def test_a_checkpoint_holds_the_mean_of_all_ranks_statistics(ranks, tmp_path):
    import keras

    (tmp_path / "saved").mkdir()
    first, second = ranks(2, saved_by_a_callback, folder=str(tmp_path / "saved"))
    for epoch, (mine, others) in enumerate(zip(first, second, strict=True), 1):
        assert max(np.abs(a - b).max() for a, b in zip(mine, others, strict=True)) > 1, "they must differ before"
        saved = keras.models.load_model(tmp_path / "saved" / f"{epoch}.keras").non_trainable_weights
        for value, one, other in zip(saved, mine, others, strict=True):
            assert np.allclose(value, (one + other) / 2, rtol=1e-6, atol=1e-6), value.path
    assert len(first) == 2

"""Training goes on from a file as if it had never stopped."""

import keras
import numpy as np
import pytest


def _batches(rank):
    generator = np.random.default_rng(rank)
    return [
        (generator.normal(size=[8, 6]).astype("float32"), generator.normal(size=[8, 2]).astype("float32"))
        for _ in range(10)
    ]


def _build():
    keras.utils.set_random_seed(4)
    return keras.Sequential([keras.layers.Input([6]), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(2)])


def _optimizer(hvd, kind):
    inner = keras.optimizers.SGD(0.05, momentum=0.9) if kind == "sgd" else keras.optimizers.Adam(0.01)
    return hvd.DistributedOptimizer(inner)


def _compiled(hvd, kind):
    model = _build()
    # By class: Keras cannot read its own .h5 files back when the loss was given as "mse".
    model.compile(_optimizer(hvd, kind), loss=keras.losses.MeanSquaredError(), jit_compile=False)
    return model


def _train(model, batches):
    for inputs, targets in batches:
        model.train_on_batch(inputs, targets)


def _state(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [keras.ops.convert_to_numpy(v).astype("float64") for v in variables]


def continued(kind, suffix, folder):
    import hvdkit as hvd

    world = hvd.init()
    if kind == "mixed":
        keras.config.set_dtype_policy("mixed_float16")
    batches = _batches(world.rank)
    whole = _compiled(hvd, kind)
    _train(whole, batches)

    path = f"{folder}/half{suffix}"
    half = _compiled(hvd, kind)
    _train(half, batches[:5])
    if world.is_root:
        half.save_weights(path) if "weights" in suffix else half.save(path)
    hvd.barrier()
    if "weights" in suffix:
        loaded = _compiled(hvd, kind)
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(path)
    else:
        loaded = hvd.load_model(path)
    at_once = [np.abs(a - b).max() for a, b in zip(_state(half), _state(loaded), strict=True)]
    _train(loaded, batches[5:])
    distances = [np.abs(a - b).max() for a, b in zip(_state(whole), _state(loaded), strict=True)]
    moved = max(np.abs(a - b).max() for a, b in zip(_state(half), _state(loaded), strict=True))
    wrapped = type(loaded.optimizer) is hvd.DistributedOptimizer
    hvd.barrier()
    return max(at_once), max(distances), moved, wrapped, type(loaded.optimizer.__wrapped__).__name__


@pytest.mark.parametrize(
    ("kind", "suffix", "inner"),
    [
        ("adam", ".keras", "Adam"),
        pytest.param("sgd", ".h5", "SGD", marks=pytest.mark.slow),
        ("mixed", ".keras", "LossScaleOptimizer"),
        pytest.param("adam", ".weights.h5", "Adam", marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_from_a_file(ranks, tmp_path, kind, suffix, inner):
    folder = tmp_path / "files"
    folder.mkdir()
    for at_once, distance, moved, wrapped, name in ranks(2, continued, kind=kind, suffix=suffix, folder=str(folder)):
        assert at_once == 0
        assert distance <= 1e-6
        assert moved > 1e-3, "the second half must have trained, or nothing is proved"
        assert wrapped
        assert name == inner


def exported(folder):
    import tensorflow as tf

    import hvdkit as hvd

    world = hvd.init()
    model = _compiled(hvd, "adam")
    _train(model, _batches(world.rank)[:2])
    inputs = _batches(0)[0][0]
    if world.is_root:
        model.export(folder, verbose=False)
        loaded = tf.saved_model.load(folder)  # must outlive the call: it holds the variables
        served = loaded.serve(inputs).numpy()
        return float(np.abs(served - model.predict(inputs, verbose=0)).max()), float(np.abs(served).max())
    return None


def test_a_wrapped_model_can_be_exported(ranks, tmp_path):
    (distance, size), _ = ranks(2, exported, folder=str(tmp_path / "served"))
    assert distance < 1e-6
    assert size > 0.01

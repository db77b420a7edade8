import keras
import numpy as np
import pytest

import hvdkit as hvd


def test_it_is_the_users_optimizer_for_everyone_who_asks():
    inner = keras.optimizers.SGD(0.5, momentum=0.9)
    wrapped = hvd.DistributedOptimizer(inner)
    assert isinstance(wrapped, keras.optimizers.SGD)
    assert isinstance(wrapped, hvd.DistributedOptimizer)
    assert keras.optimizers.get(wrapped) is wrapped
    assert keras.saving.serialize_keras_object(wrapped) == keras.saving.serialize_keras_object(inner)
    wrapped.learning_rate = 0.25
    assert float(keras.ops.convert_to_numpy(inner.learning_rate)) == 0.25


def test_gradients_that_are_none_are_passed_over():
    used, unused = keras.Variable([1.0]), keras.Variable([2.0])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    assert optimizer.apply_gradients([(keras.ops.ones(1), used), (None, unused)]).numpy() == 1
    assert (np.asarray(used).item(), np.asarray(unused).item()) == (0.0, 2.0)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("adam", r"needs a keras\.optimizers\.Optimizer, but was given 'adam' of type builtins\.str"),
        (keras.Model, r"needs a keras\.optimizers\.Optimizer"),
    ],
)
def test_what_is_not_an_optimizer_is_refused(optimizer, message):
    with pytest.raises(TypeError, match=message):
        hvd.DistributedOptimizer(optimizer)


def test_an_optimizer_of_keras_2_is_refused_with_its_new_name():
    legacy = type("SGD", (), {"__module__": "tf_keras.src.optimizers.legacy.gradient_descent"})
    with pytest.raises(
        TypeError, match=r"of Keras 2 or TensorFlow; write keras\.optimizers\.SGD\(\.\.\.\), with learning_rate"
    ):
        hvd.DistributedOptimizer(legacy())


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("lr", "read and set optimizer.learning_rate instead"),
        ("get_gradients", "take gradients with tf.GradientTape"),
        ("compute_gradients", "take gradients with tf.GradientTape"),
        ("minimize", "take gradients with tf.GradientTape"),
    ],
)
def test_what_optimizers_of_keras_2_had_is_answered_with_what_to_write(name, instead):
    wrapped = hvd.DistributedOptimizer(keras.optimizers.SGD(0.5))
    with pytest.raises(AttributeError, match=rf"Keras 3 has no optimizer\.{name}: {instead}"):
        getattr(wrapped, name)
    with pytest.raises(AttributeError, match=rf"Keras 3 has no optimizer\.{name}: {instead}"):
        setattr(wrapped, name, 0.1)
    assert not hasattr(wrapped.__wrapped__, name), "nothing was set in silence"


def test_wrapping_twice_is_refused():
    with pytest.raises(TypeError, match="is a DistributedOptimizer already"):
        hvd.DistributedOptimizer(hvd.DistributedOptimizer(keras.optimizers.Adam()))


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match=r"must be hvdkit\.Average, hvdkit\.Sum or hvdkit\.Adasum, but is 'Median'"):
        hvd.DistributedOptimizer(keras.optimizers.Adam(), op="Median")


def test_under_mixed_float16_the_loss_scale_is_inside():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        wrapped = hvd.DistributedOptimizer(keras.optimizers.Adam())
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(wrapped, keras.optimizers.LossScaleOptimizer)
    assert isinstance(wrapped.inner_optimizer, keras.optimizers.Adam)


def test_scaled_is_linear_in_the_number_of_ranks():
    from hvdkit import world

    world.enter(world.World(1, 4, 1, 4, 0, 1, "h1"))
    assert hvd.scaled(0.1) == pytest.approx(0.4)


@pytest.mark.parametrize(("kind", "dtype"), [("none", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_compression(kind, dtype):
    compression = getattr(hvd.Compression, kind)
    for value in (keras.ops.ones(3), keras.ops.ones(3, "int32"), keras.ops.ones(3, "float16")):
        wire, context = compression.compress(value)
        assert wire.dtype.name == (dtype if value.dtype == "float32" else value.dtype.name)
        assert compression.decompress(wire, context).dtype == value.dtype

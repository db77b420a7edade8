"""One operation a variable gives the bits of Keras' dozen, and where it does not fit Keras' own are used."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdkit import native
from hvdkit.optimizers.fused_update import fuse_updates

pytestmark = pytest.mark.skipif(not native.is_built(), reason="hvdkit.native is not compiled: launch/bootstrap.sh")

O = keras.optimizers  # noqa: E741
SHAPES = [(700, 300), (7,), (), (3, 5, 2)]  # the first is divided among TensorFlow's threads
OPTIMIZERS = {
    "adam": lambda: O.Adam(1e-2),
    "adam, other numbers": lambda: O.Adam(1e-2, beta_1=0.5, beta_2=0.7, epsilon=1e-3),
    "adam, clipped": lambda: O.Adam(1e-2, clipnorm=0.5, use_ema=True, ema_momentum=0.9),
    "adam, accumulated": lambda: O.Adam(1e-2, gradient_accumulation_steps=2),
    "adam, scheduled": lambda: O.Adam(O.schedules.ExponentialDecay(1e-2, 3, 0.5)),
    "adamw": lambda: O.AdamW(1e-2, weight_decay=0.1),
    "amsgrad": lambda: O.Adam(1e-2, amsgrad=True),
    "sgd": lambda: O.SGD(1e-2),
    "momentum": lambda: O.SGD(1e-2, momentum=0.9),
    "nesterov": lambda: O.SGD(1e-2, momentum=0.9, nesterov=True),
    "scaled": lambda: O.LossScaleOptimizer(O.Adam(1e-2)),
}


def trained(optimizer, gradients, *, fused, dtype="float32", shapes=SHAPES, jit_compile=False):
    """The weights, and the optimizer's variables, after five steps."""
    generator = np.random.default_rng(3)
    weights = [keras.Variable(generator.normal(size=shape), dtype=dtype) for shape in shapes]
    if fused:
        fuse_updates(optimizer)
    optimizer.build(weights)

    @tf.function(jit_compile=jit_compile)
    def step(number):
        optimizer.apply(gradients(tf.cast(number, dtype) + 1), weights)

    for number in range(5):
        step(tf.constant(number))
    return [tf.cast(v.value, tf.float64).numpy() for v in [*weights, *optimizer.variables]]


def dense(dtype, shapes=SHAPES):
    generator = np.random.default_rng(4)
    values = [tf.cast(generator.normal(size=shape), dtype) for shape in shapes]
    return lambda factor: [value * factor for value in values]


def rows(dtype, index="int64"):
    """Gradients of some rows of an embedding, one of them named three times."""
    values = tf.cast(np.random.default_rng(5).normal(size=(5, 8)), dtype)
    indices = tf.constant([3, 0, 3, 39, 3], index)
    return lambda factor: [tf.IndexedSlices(values * factor, indices, tf.constant([40, 8], tf.int64))]


def operations(optimizer, gradients, shapes=SHAPES, dtype="float32"):
    """The kinds of operations in the graph of a step."""
    weights = [keras.Variable(np.zeros(shape), dtype=dtype) for shape in shapes]
    fuse_updates(optimizer)
    optimizer.build(weights)
    step = tf.function(lambda: optimizer.apply(gradients(tf.ones([], dtype)), weights))
    definition = step.get_concrete_function().graph.as_graph_def()
    return {
        node.op
        for part in (definition, *definition.library.function)
        for node in (part.node if hasattr(part, "node") else part.node_def)
    }


def same_bits(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dense_gradients_give_the_bits_of_keras(name):
    make = OPTIMIZERS[name]
    gradients = dense("float32")
    same_bits(trained(make(), gradients, fused=True), trained(make(), gradients, fused=False))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_other_precisions_do_too(name, dtype):
    make, gradients = OPTIMIZERS[name], dense(dtype)
    same_bits(trained(make(), gradients, fused=True, dtype=dtype), trained(make(), gradients, fused=False, dtype=dtype))


@pytest.mark.parametrize("index", ["int32", "int64"])
@pytest.mark.parametrize("name", ["adam", "adamw", "adam, clipped", "sgd", "momentum"])
def test_so_do_gradients_of_rows(name, index):
    make, gradients = OPTIMIZERS[name], rows("float32", index)
    same_bits(*(trained(make(), gradients, fused=fused, shapes=[(40, 8)]) for fused in (True, False)))


def test_it_is_one_operation():
    assert "HvdkitAdam" in operations(O.Adam(), dense("float32"))
    assert "HvdkitSparseAdam" in operations(O.AdamW(), rows("float32"), shapes=[(40, 8)])
    assert "ResourceApplyKerasMomentum" in operations(O.SGD(momentum=0.5), dense("float32"))
    assert "ResourceApplyGradientDescent" in operations(O.SGD(), dense("float32"))


def test_what_does_not_fit_is_left_to_keras(monkeypatch):
    class Own(O.Adam):
        def update_step(self, gradient, variable, learning_rate):
            self.assign_sub(variable, gradient)

    class Assigns(O.Adam):
        def assign_sub(self, variable, value):
            super().assign_sub(variable, value / 2)

    set_by_hand = O.Adam()
    set_by_hand.update_step = Own().update_step
    left = [O.Adam(amsgrad=True), Own(), Assigns(), set_by_hand, O.RMSprop()]
    assert not any("HvdkitAdam" in operations(optimizer, dense("float32")) for optimizer in left)
    assert "HvdkitAdam" not in operations(O.Adam(), dense("float16"), dtype="float16")
    monkeypatch.setattr(native, "is_built", lambda: False)
    assert "HvdkitAdam" not in operations(O.Adam(), dense("float32"))


def test_all_that_hvdkit_wraps_is_fused():
    import hvdkit as hvd
    from hvdkit.strategies.single import SingleStrategy

    hvd.init()
    for wrap in (hvd.DistributedOptimizer, hvd.ShardedOptimizer, hvd.LocalSGD, SingleStrategy().distribute):
        assert "_adam" in str(wrap(O.Adam()).update_step), wrap
    wrapped = O.LossScaleOptimizer(hvd.DistributedOptimizer(O.Adam()))
    assert SingleStrategy().distribute(wrapped) is wrapped


def test_xla_compiles_keras_own():
    gradients = dense("float32")
    fused, plain = (trained(O.Adam(1e-2), gradients, fused=fused, jit_compile=True) for fused in (True, False))
    same_bits(fused, plain)


def test_a_value_that_was_read_before_a_step_stays():
    weights = [keras.Variable(np.ones((40, 8), "float32"))]
    optimizer = O.Adam(1e-2)
    fuse_updates(optimizer)
    optimizer.build(weights)
    for gradient in (tf.ones((40, 8)), rows("float32")(1.0)[0]):
        before = [v.value.read_value() for v in (*weights, *optimizer.variables[2:])]
        kept = [value.numpy().copy() for value in before]
        optimizer.apply([gradient], weights)
        same_bits(kept, [value.numpy() for value in before])
        assert np.any(weights[0].numpy() != kept[0])


def test_a_copy_of_an_optimizer_has_its_own_state():
    optimizer = O.Adam(1e-2)
    fuse_updates(optimizer)
    other = copy.deepcopy(optimizer)
    weights = [keras.Variable(np.ones(3, "float32"))]
    for one in (optimizer, other):
        one.build(weights)
    other.apply([tf.ones(3)], weights)
    assert not np.any(optimizer._momentums[0].numpy())
    assert np.all(other._momentums[0].numpy())


def test_a_row_that_is_not_there_is_an_error():
    weights = [keras.Variable(np.ones((2, 8), "float32"))]
    optimizer = O.Adam(1e-2)
    fuse_updates(optimizer)
    optimizer.build(weights)
    (gradient,) = rows("float32")(1.0)
    with pytest.raises(tf.errors.InvalidArgumentError, match="row that does not exist"):
        optimizer.apply([tf.IndexedSlices(gradient.values, gradient.indices)], weights)
    assert np.all(weights[0].numpy() == 1)


def test_rows_below_zero_are_left_out_as_keras_does():
    def gradients(factor):
        return [tf.IndexedSlices(tf.ones([2, 8]) * factor, tf.constant([-1, 3]), tf.constant([40, 8]))]

    same_bits(*(trained(O.Adam(1e-2), gradients, fused=fused, shapes=[(40, 8)]) for fused in (True, False)))


def test_a_gradient_that_keras_stretches_is_left_to_it():
    def gradients(factor):
        return [factor]

    for make in (OPTIMIZERS["adam"], OPTIMIZERS["momentum"]):
        same_bits(*(trained(make(), gradients, fused=fused, shapes=[(5,)]) for fused in (True, False)))

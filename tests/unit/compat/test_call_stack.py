"""What the call stack tells of the objects around a call, on this Keras and this TensorFlow."""

import keras
import pytest
import tensorflow as tf

from hvdkit.compat import call_stack
from hvdkit.compat.lookup import MissingNameError


class Asking(keras.optimizers.SGD):
    """An optimizer that asks, when it is built and in each update, who is around it."""

    def build(self, variables):
        self.around_build = call_stack.loss_scale_in_build(), call_stack.loss_scale_in_branch()
        super().build(variables)

    def apply(self, grads, trainable_variables=None):
        self.around_apply = call_stack.loss_scale_in_build(), call_stack.loss_scale_in_branch()
        super().apply(grads, trainable_variables)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_scale_around_is_found_when_building_and_in_its_branch(compiled):
    inner = Asking(0.5)
    outer = keras.optimizers.LossScaleOptimizer(inner)
    variable = keras.Variable(1.0)
    outer.build([variable])
    assert inner.around_build == (outer, None)

    def step():
        outer.apply([tf.constant(outer.initial_scale)], [variable])

    (tf.function(step) if compiled else step)()
    assert inner.around_apply == (None, outer)
    assert variable.numpy() == 0.5


def test_without_a_loss_scale_there_is_none():
    optimizer = Asking(0.5)
    optimizer.apply([tf.constant(1.0)], [keras.Variable(1.0)])
    assert optimizer.around_build == optimizer.around_apply == (None, None)


def test_a_branch_of_another_name_is_not_passed_over(monkeypatch):
    monkeypatch.delattr(keras.optimizers.LossScaleOptimizer, "_stateful_handle_finite_grads")
    with pytest.raises(MissingNameError, match=r"no LossScaleOptimizer\._stateful_handle_finite_grads"):
        call_stack.loss_scale_in_branch()


def test_xla_is_seen_from_whatever_depth():
    found = []

    def ask(x):
        found.append(call_stack.is_in_xla())
        return x

    ask(1)
    tf.function(ask)(1)
    tf.function(ask, jit_compile=False)(1)
    tf.function(ask, jit_compile=True).get_concrete_function(tf.TensorSpec([]))
    tf.function(lambda x: tf.function(ask)(x), jit_compile=True).get_concrete_function(tf.TensorSpec([]))
    assert found == [False, False, False, True, True]


def test_local_variables_of_a_method():
    class Owner:
        def method(self, x):
            y = x + 1
            return ask(self), y

    def ask(owner):
        return call_stack.locals_of("method", owner, ("x", "y"))

    assert Owner().method(1) == ({"x": 1, "y": 2}, 2)
    assert call_stack.locals_of("method", Owner(), ()) is None


def test_a_running_method_is_found_also_as_autograph_converts_it():
    class Owner:
        def method(self):
            found.append((call_stack.is_running("method", self), call_stack.is_running("method", Owner())))
            return tf.constant(0)

    found, owner = [], Owner()
    owner.method()
    tf.function(owner.method)()
    tf.function(lambda: owner.method())()
    assert found == [(True, False)] * 3
    assert not call_stack.is_running("method", owner)

"""The states: what a commit keeps, in one process."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdkit as hvd
from hvdkit import elastic
from tests.unit.elastic.training import make_data, values_of


def test_restore_goes_back_to_the_commit_with_slots_rate_and_seeds(model):
    state = elastic.KerasState(model, epoch=1)
    model.fit(*make_data(), verbose=0)
    state.epoch = 2
    state.commit()
    committed = values_of(model)
    model.optimizer.learning_rate = 0.5
    model.fit(*make_data(), verbose=0)
    state.epoch = 3
    assert any(not np.array_equal(a, b) for a, b in zip(committed, values_of(model), strict=True))
    state.restore()
    assert all(np.array_equal(a, b) for a, b in zip(committed, values_of(model), strict=True))
    assert abs(float(model.optimizer.learning_rate) - 0.1) < 1e-6
    assert state.epoch == 2


@pytest.mark.parametrize(
    "form", [lambda o: o, lambda o: [o], lambda o: {"second": (o,)}], ids=["alone", "list", "dict"]
)
def test_restore_goes_back_with_all_optimizers_of_the_model(model, form):
    second = hvd.DistributedOptimizer(keras.optimizers.Adam(0.1))
    model.second = form(second)
    with pytest.raises(hvd.UsageError, match="a second optimizer, .* Build it for the variables"):
        elastic.KerasState(model)
    second.build(model.trainable_variables)
    state = elastic.KerasState(model)

    def step():
        for optimizer in (model.optimizer, second):
            optimizer.apply([tf.ones_like(v.value) for v in model.trainable_variables], model.trainable_variables)

    step()
    state.save()
    committed = [np.array(v) for v in second.variables]
    step()
    state.restore()
    assert int(model.optimizer.iterations) == int(second.iterations) == 1
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(committed, second.variables, strict=True))


def test_a_warmup_after_a_restore_reaches_the_rate_of_the_new_optimizer(model):
    state = elastic.KerasState(model)
    model.optimizer.learning_rate = 0.025  # in the middle of a warm-up
    model.optimizer.iterations.assign(3)
    state.save()
    state.restore()
    warmup = hvd.callbacks.LearningRateWarmupCallback(None, warmup_epochs=4, size=4)
    warmup.set_model(model)
    warmup.set_params({"steps": 2})
    warmup.on_train_begin()
    warmup.on_epoch_begin(0)
    assert warmup.initial_lr == pytest.approx(0.1)


def test_a_reset_makes_new_graphs(model):
    model.fit(*make_data(), verbose=0)
    state, before = elastic.KerasState(model), model.train_function
    state.reset()
    assert model.train_function is not before
    model.fit(*make_data(), verbose=0)


def test_horovods_names_of_the_states(model):
    state = elastic.TensorFlowKerasState(model, backend=None, epoch=3)
    assert isinstance(state, elastic.KerasState)
    assert (state.optimizer, state.epoch, hasattr(state, "backend")) == (model.optimizer, 3, False)
    with pytest.raises(hvd.UsageError, match="TensorFlow 2 keeps no list of all variables: write TensorFlowState"):
        elastic.TensorFlowState(epoch=3)


def test_states_that_cannot_be_kept_are_refused():
    with pytest.raises(ValueError, match=r"has no variables yet.*model.build\(input_shape\)"):
        elastic.KerasState(keras.Sequential([keras.layers.Dense(1)]))
    with pytest.raises(ValueError, match="has no optimizer: compile it, or pass one to KerasState"):
        elastic.KerasState(keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)]))
